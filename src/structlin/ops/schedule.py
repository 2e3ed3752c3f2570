"""The GEMMs and copies of a program for a number of tokens, worked out once and then replayed.

Everything that depends on shapes alone (sizes and strides of every operand, forward and in both gradients) is
computed here, so that running a layer costs little more host time than the calls it makes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..plan import Table, num_blocks
from .equation import parse
from .gemm import plan_contiguous
from .lookup import index_on, positions, uses
from .lowering import Permutation, program


@dataclass(frozen=True)
class Gemm:
    """Sizes and strides of the two operands and of the result as matrices, and the shape of the result.

    ``plain`` is (groups, k, n, whether k is innermost in b) where a is [t, g, k] and b one block of memory.
    """

    a: tuple[tuple[int, ...], tuple[int, ...]]
    b: tuple[tuple[int, ...], tuple[int, ...]]
    c: tuple[tuple[int, ...], tuple[int, ...]]
    shape: tuple[int, ...]
    plain: tuple[int, int, int, bool] | None

    def run(self, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
        """Multiply, or add the product to ``into``."""
        if into is not None and a.numel() == 0:
            return into  # cuBLAS refuses to add nothing
        left, right = a.as_strided(*self.a), b.as_strided(*self.b)
        result = a.new_empty(self.shape) if into is None else into
        out = result.as_strided(*self.c)
        if len(self.c[0]) == 2:
            torch.mm(left, right, out=out) if into is None else torch.addmm(out, left, right, out=out)
        else:
            torch.bmm(left, right, out=out) if into is None else torch.baddbmm(out, left, right, out=out)
        return result


@dataclass(frozen=True)
class Relayout:
    """A permutation of the axes of a contiguous tensor; ``swap`` is (a, b, r) where [.., a, b, r] -> [.., b, a, r]."""

    shape: tuple[int, ...]
    permutation: Permutation
    swap: tuple[int, int, int] | None

    def run(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy, or add the copy to ``into``."""
        shape = [self.shape[i] for i in self.permutation]
        if self.swap is not None and x.is_cuda and has_triton():
            from ..kernels.relayout import exchange

            result = x.new_empty(shape) if into is None else into
            exchange(x, result, *self.swap, add=into is not None)
            return result
        permuted = x.view(self.shape).permute(self.permutation)
        return permuted.contiguous() if into is None else into.view(shape).add_(permuted)


@dataclass(frozen=True)
class Gather:
    """Blocks looked up by a table, ``shape`` being (tokens, blocks, width), then a relayout of what was found."""

    shape: tuple[int, int, int]
    index: tuple[int, ...]
    relayout: Relayout | None
    swap: ClassVar[None] = None

    def run(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Look up, or add what was found to ``into``."""
        found = x.view(self.shape).index_select(1, index_on(x.device, self.index))
        found = found if self.relayout is None else self.relayout.run(found)
        return found if into is None else into.view_as(found).add_(found)


@dataclass(frozen=True)
class Collect:
    """The adjoint of a `Gather`: a relayout, then for each block of ``shape`` the sum of its uses."""

    shape: tuple[int, int, int]
    index: tuple[int, ...]
    relayout: Relayout | None
    swap: ClassVar[None] = None

    def run(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Sum, or add the sums to ``into``."""
        x = x if self.relayout is None else self.relayout.run(x)
        tokens, blocks, width = self.shape
        found = x.view(tokens, len(self.index), width).index_select(1, index_on(x.device, self.index))
        found = found.view(tokens, blocks, len(self.index) // blocks, width).sum(2)
        return found if into is None else into.view(self.shape).add_(found)


Move = Relayout | Gather | Collect
"""What a tensor goes through between two products."""


@dataclass(frozen=True)
class Product:
    """A GEMM, its operands, and the relayout of its result: what is left to do for one term of a sum."""

    gemm: Gemm
    relayout: Move | None
    a: Tensor
    b: Tensor


def add(products: list[Product]) -> Tensor:
    """The sum of products of one shape, each added to what is there."""
    total: Tensor | None = None
    for product in products:
        total = multiply_then(product.gemm, product.relayout, product.a, product.b, total)
    assert total is not None
    return total


def multiply_then(gemm: Gemm, relayout: Move | None, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """One GEMM and the relayout of its result, in one kernel where there is one; added to ``into`` if given."""
    if relayout is None:
        return gemm.run(a, b, into)
    if into is None and tensor_memory(a.device, a.dtype) and store_fits(gemm, relayout) and _aligned(a, b):
        from ..kernels.across import across

        assert relayout.swap is not None
        assert gemm.plain is not None
        groups, k, n, k_inner = gemm.plain
        return across(a, b, groups, k, n, relayout.swap[2], k_inner)
    return relayout.run(gemm.run(a, b), into)


def store_fits(gemm: Gemm, relayout: Move | None) -> bool:
    """Whether the kernel that stores across can write what ``relayout`` would make of the result."""
    if gemm.plain is None or relayout is None or relayout.swap is None or not has_triton():
        return False
    from ..kernels.across import fits

    groups, k, n, _ = gemm.plain
    first, second, run = relayout.swap
    return first == groups and second * run == n and fits(k, n, run)


def tensor_memory(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels for the tensor memory accelerator run: Triton, half precision, compute capability 9 or more."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _is_hopper(device)


def _aligned(a: Tensor, b: Tensor) -> bool:
    return a.shape[0] > 0 and a.data_ptr() % 16 == b.data_ptr() % 16 == 0


@dataclass(frozen=True)
class Step:
    """One factor: the product with it, its two gradients, and what reorders the result (``undo`` its gradient)."""

    forward: Gemm
    dgrad: Gemm
    wgrad: Gemm
    after: Move | None
    undo: Move | None


@dataclass(frozen=True)
class Sequence:
    """One term: what reorders the input (``undo`` its gradient), then the steps."""

    before: Move | None
    undo: Move | None
    steps: tuple[Step, ...]


@lru_cache(maxsize=1024)
def schedule(text: str, tokens: int) -> tuple[Sequence, ...]:
    """Everything that the program ``text`` runs for ``tokens`` tokens."""
    what = program(text)
    sizes = {"t": tokens, **what.sizes}
    sequences = []
    for chain in what.chains:
        equations = [parse(stage.equation) for stage in chain.stages]
        moves = [*(stage.relayout for stage in chain.stages), chain.relayout]
        shapes = [tuple(sizes[axis] for axis in x) for x, _, _ in equations]
        end = tuple(sizes[axis] for axis in equations[-1][2])
        shapes.append(tuple(end[i] for i in chain.relayout) if chain.relayout is not None else end)
        both = [_both_ways(shape, move) for shape, move in zip(shapes, moves, strict=True)]
        ends: list[tuple[Move | None, Move | None]] = [*both]
        if chain.gather is not None:
            ends[0] = _looked_up(tokens, chain.in_features, chain.gather, *both[0])
        if chain.collect is not None:
            ends[-1] = _looked_up(tokens, chain.out_features, chain.collect, *both[-1][::-1])[::-1]
        (before, undo), *after = ends
        gemms = [_three(x, w, y, sizes) for x, w, y in equations]
        sequences.append(Sequence(before, undo, tuple(Step(*g, *m) for g, m in zip(gemms, after, strict=True))))
    return tuple(sequences)


@cache
def has_triton() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def _is_hopper(device: torch.device) -> bool:
    return has_triton() and torch.cuda.get_device_capability(device) >= (9, 0)


def _three(
    x: tuple[str, ...], w: tuple[str, ...], y: tuple[str, ...], sizes: dict[str, int]
) -> tuple[Gemm, Gemm, Gemm]:
    """Forward, gradient of the input, gradient of the factor."""
    return _gemm(x, w, y, sizes), _gemm(y, w, x, sizes), _gemm(x, y, w, sizes)


def _gemm(a: tuple[str, ...], b: tuple[str, ...], c: tuple[str, ...], sizes: dict[str, int]) -> Gemm:
    plan = plan_contiguous(a, b, c, sizes)
    assert not plan.copies, f"{a}, {b} -> {c} does not run in place"
    assert plan.a is not None
    assert plan.b is not None
    assert plan.c is not None
    g, m, n, k = plan.sizes
    first = 1 if g == 1 else 0  # a single group is a plain matrix product
    plain = None
    if plan.a == (k, g * k, 1) and m == sizes["t"] and plan.b in ((n * k, 1, k), (n * k, n, 1)):
        plain = g, k, n, plan.b[1] == 1
    return Gemm(
        ((g, m, k)[first:], plan.a[first:]),
        ((g, k, n)[first:], plan.b[first:]),
        ((g, m, n)[first:], plan.c[first:]),
        tuple(sizes[axis] for axis in c),
        plain,
    )


def _looked_up(
    tokens: int, features: int, table: Table, relayout: Relayout | None, inverse: Relayout | None
) -> tuple[Gather, Collect]:
    """What looks blocks up and then reorders them, and its adjoint."""
    shape = tokens, num_blocks(table), features // num_blocks(table)
    return Gather(shape, positions(table), relayout), Collect(shape, uses(table), inverse)


def _both_ways(shape: tuple[int, ...], permutation: Permutation | None) -> tuple[Relayout | None, Relayout | None]:
    """The relayout that ends in ``shape``, and its inverse."""
    if permutation is None:
        return None, None
    inverse = tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
    return _relayout(tuple(shape[i] for i in inverse), permutation), _relayout(shape, inverse)


def _relayout(shape: tuple[int, ...], permutation: Permutation) -> Relayout:
    moved = [i for i, j in enumerate(permutation) if i != j]
    first, last = moved[0], moved[-1] + 1
    split = permutation[first]
    swap = None
    if permutation[first:last] == (*range(split, last), *range(first, split)):
        swap = prod(shape[first:split]), prod(shape[split:last]), prod(shape[last:])
    return Relayout(shape, permutation, swap)
