"""Pixelfly for a whole model: from a share of its weights to a mask for every layer.

`sparsify` follows the three steps of Dao et al. 2022b ("Pixelated Butterfly", figure 1). The budget goes to the layers
in proportion to their dense compute, so every layer keeps the same share of its weights. A quarter to a third of that
is for the low-rank term, the rest for the flat block butterfly of the largest stride that fits. Blocks are as large as
the device wants them and the widths allow. `magnitude_mask` makes the mask that pruning would take, to compare with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import floor, gcd

import torch
from torch import Tensor, nn

from . import analysis
from .nn.kinds import kind_of
from .spec import Spec
from .structures import BlockSparse, LowRank, Pixelfly
from .structures.block_sparse import write_mask
from .surgery import convertible, literal

HOPPER_BLOCKS = (128, 64, 32, 16)
"""Block sizes for a GPU of compute capability 9 or more, whose kernels fill their tiles from 64 on."""
OTHER_BLOCKS = (32, 16, 8)
"""Block sizes for everything else; 32 is that of the paper."""
ENOUGH = 0.8  # of a budget: a smaller block is tried only where a larger one spends less
FULL = 0.9  # of a budget: what is spent beyond is worth less than a rank of whole blocks
ALIGNED = 8  # what ranks should be multiples of for the kernels

Shape = tuple[int, int]


@dataclass(frozen=True)
class Sparsity:
    """What `sparsify` chose; prints as a table.

    Attributes:
        asked: the share of weights that was asked for.
        specs: name -> structure of every layer that becomes sparse.
        shapes: name -> (out_features, in_features) of every layer that was considered.
        kept: name -> why, of the layers that stay dense.
    """

    asked: float
    specs: Mapping[str, Pixelfly]
    shapes: Mapping[str, Shape]
    kept: Mapping[str, str]

    @property
    def rules(self) -> dict[str, Spec | None]:
        """Rules for `to_structured_`: every layer that becomes sparse and, with None, every one that stays dense."""
        return {literal(name): self.specs.get(name) for name in self.shapes}

    @property
    def density(self) -> float:
        """Weights of the sparse layers, low-rank terms included, as a share of those of the dense ones."""
        return self._share(self.specs)

    @property
    def overall(self) -> float:
        """The same over all layers that were considered, those that stay dense included."""
        return self._share(self.shapes)

    def _share(self, names: Mapping[str, object]) -> float:
        dense = sum(self.shapes[name][0] * self.shapes[name][1] for name in names)
        kept = sum(self.shapes[name][0] * self.shapes[name][1] for name in names if name in self.kept)
        sparse = sum(analysis.num_params(spec.plan(*self.shapes[name])) for name, spec in self.specs.items())
        return (sparse + kept) / dense

    def __str__(self) -> str:
        kinds = Counter((self.shapes[name], spec) for name, spec in self.specs.items())
        rows = [("layers", "shape", "structure", "weights", "low rank")]
        for (shape, spec), count in kinds.items():
            params = analysis.num_params(spec.plan(*shape))
            low = analysis.num_params(LowRank(spec.rank or 1).plan(*shape)) / params
            share = f"{params / shape[0] / shape[1]:.1%}"
            rows.append((str(count), f"{shape[0]}x{shape[1]}", str(spec), share, f"{low:.1%} of them"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        asked = f"{self.asked:.1%} was asked for"
        lines.append(f"{len(self.specs)} sparse layers have {self.density:.1%} of their dense weights; {asked}")
        lines.append(f"all {len(self.shapes)} linear layers have {self.overall:.1%}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        for why, (first, *more) in reasons.items():
            lines.append(f"{first} and {len(more)} more stay dense: {why}" if more else f"{first} stays dense: {why}")
        return "\n".join(lines)


def sparsify(
    model: nn.Module, density: float, block_size: int | Sequence[int] | None = None, layers: Sequence[str] = ("*",)
) -> Sparsity:
    """Pixelfly for every linear layer of ``model`` that it fits, at one density. The model is only looked at.

    >>> model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.Linear(1024, 10))
    >>> found = sparsify(model, 0.25, block_size=64)
    >>> print(found.specs["0"], f"{found.density:.3f}", *found.kept)
    pixelfly:block_size=64:rank=48 0.246 3

    Args:
        model: any module, on the meta device too; `to_structured_(model, found.rules)` converts it.
        density: weights of a layer as a share of its dense weights, above 0 and below 1.
        block_size: of the blocks, or sizes to choose from, the most wanted first: the first that spends four fifths of
            a layer's budget is taken, or the one that spends most. `HOPPER_BLOCKS` where a GPU of compute capability 9
            or more is there, else `OTHER_BLOCKS`.
        layers: globs over names; other layers are left out.

    Raises:
        ValueError: for a density or block size out of bounds, a glob that matches no linear layer, or a model of which
            no layer becomes sparse, with the reason of each.
    """
    if not 0 < density < 1:
        raise ValueError(f"density={density} is given; allowed: above 0 and below 1")
    blocks = block_sizes() if block_size is None else (block_size,) if isinstance(block_size, int) else (*block_size,)
    if not blocks or min(blocks) < 1:
        raise ValueError(f"block_size={block_size} is given; allowed: whole numbers from 1, one or more")
    fitting, kept = convertible(model, layers, "init")
    specs: dict[str, Pixelfly] = {}
    for name, shape in fitting.items():
        try:
            specs[name] = pixelfly_within(shape, density, blocks)
        except ValueError as error:
            kept[name] = str(error)
    if not specs:
        raise ValueError(f"no layer becomes sparse: {'; '.join(f'{name}: {why}' for name, why in kept.items())}")
    shapes: dict[str, Shape] = {}
    for name, module in model.named_modules():
        kind = kind_of(module) if name in specs or name in kept else None
        if kind is not None:
            shapes[name] = kind.shape_of(module)
    return Sparsity(density, specs, shapes, kept)


def block_sizes() -> tuple[int, ...]:
    """The block sizes for what this machine runs models on."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return HOPPER_BLOCKS if hopper else OTHER_BLOCKS


@lru_cache(maxsize=256)  # a model has many layers of one shape
def pixelfly_within(shape: Shape, density: float, blocks: tuple[int, ...]) -> Pixelfly:
    """The pixelfly of a layer: of those with at most ``density`` of its weights, one that spends most.

    Its rank is the multiple of the block size nearest to a quarter of the weights, or a larger one up to a third; where
    that spends less than nine tenths of the budget, of a half, a quarter and so on of the block size, below 8 only
    where nothing else fits. Cells are whole blocks.

    Args:
        shape: (out_features, in_features).
        density: weights as a share of the dense ones.
        blocks: block sizes, the most wanted first, as for `sparsify`.

    Raises:
        ValueError: where none fits.
    """
    budget, best, sparsest = density * shape[0] * shape[1], None, list[int]()
    for block in blocks:
        masks = list(_masks(shape, block))
        sparsest += [params for params, _ in masks]
        choices = _within(shape, block, budget, masks)
        found = max(choices, key=lambda choice: _worth(budget, *choice), default=None)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
        if best is not None and best[0] >= ENOUGH * budget:
            break
    if best is not None:
        return best[2]
    given, sizes = f"{shape[0]}x{shape[1]}", f"blocks of {', '.join(map(str, blocks))}"
    if not sparsest:
        raise ValueError(f"{given} has no grid of {sizes}; give a size that divides both widths")
    share = min(sparsest) / (shape[0] * shape[1])
    does = f"allow {4 / 3 * share:.0%} or more" if share < 0.75 else "give smaller blocks"
    raise ValueError(
        f"no pixelfly with {sizes} has at most {density:.1%} of the weights of {given}; its sparsest butterfly has "
        f"{share:.1%}: {does}"
    )


def _masks(shape: Shape, block: int) -> Iterator[tuple[int, Pixelfly]]:
    """Weights of every flat block butterfly whose cells are whole blocks, and the butterfly."""
    if shape[0] % block or shape[1] % block:
        return
    cells = gcd(shape[0] // block, shape[1] // block)
    for size in (size for size in range(2, cells + 1) if cells % size == 0):
        for nfactors in range(1, size.bit_length()):
            spec = Pixelfly(block, size, nfactors)
            try:
                yield analysis.num_params(spec.plan(*shape)), spec
            except ValueError:
                break  # more factors than the size has


def _within(
    shape: Shape, block: int, budget: float, masks: Sequence[tuple[int, Pixelfly]]
) -> Iterator[tuple[int, int, Pixelfly]]:
    """Weights, what the rank is a multiple of, and the structure, for all that keep within the budget."""
    one, step = analysis.num_params(LowRank(1).plan(*shape)), block
    while step:
        first = max(step, round(budget / 4 / one / step) * step)
        for rank in range(first, floor(budget / 3 / one) + 1, step):
            for params, spec in masks:
                if params + rank * one <= budget:
                    yield params + rank * one, step, replace(spec, rank=rank)
        step //= 2


def _worth(budget: float, params: int, step: int, spec: Pixelfly) -> tuple[float, ...]:
    """What decides between choices, the most important first."""
    return step >= ALIGNED, min(params, FULL * budget), step, params, spec.nfactors


@torch.no_grad()
def magnitude_mask(weight: Tensor, nblocks: int, slots: int) -> BlockSparse:
    """The block-sparse structure that keeps most of a dense weight: no other mask has a larger norm in its cells.

    Every row and column of cells keeps ``slots``, which an integer program solves exactly. Needs scipy.

    Args:
        weight: (out_features, in_features), of any real dtype.
        nblocks: rows and columns of cells; divides both widths.
        slots: cells in a row.

    Raises:
        ValueError: for a weight that is no matrix, is not finite or on the meta device, and for sizes that do not fit.
    """
    if weight.dim() != 2 or weight.is_meta or not torch.isfinite(weight).all():
        raise ValueError(f"the weight is {tuple(weight.shape)} on {weight.device}; it must be a finite matrix")
    BlockSparse(nblocks, slots).plan(*weight.shape)
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye, kron

    cells = weight.double().unflatten(1, (nblocks, -1)).unflatten(0, (nblocks, -1)).square().sum((1, 3))
    norms = (cells / cells.max().clamp(min=1e-300)).flatten().cpu().numpy()
    rows, columns = kron(eye(nblocks), np.ones((1, nblocks))), kron(np.ones((1, nblocks)), eye(nblocks))
    found = milp(
        -norms,
        integrality=np.ones(len(norms)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(rows, slots, slots), LinearConstraint(columns, slots, slots)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    kept = found.x.reshape(nblocks, nblocks) > 0.5
    return BlockSparse(nblocks, slots, write_mask(tuple(tuple(np.flatnonzero(row).tolist()) for row in kept)))
