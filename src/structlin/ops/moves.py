"""What happens to a tensor between two products: its axes are reordered, or its blocks looked up or added up."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..plan import Table, num_blocks
from .lookup import index_on, positions, uses
from .lowering import Permutation


@cache
def has_triton() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


class Kernels(NamedTuple):
    """Which kernels of ours run: the copy that exchanges axes, and those for the tensor memory accelerator."""

    exchange: bool
    tensor_memory: bool


def kernels_on(device: torch.device, dtype: torch.dtype, wanted: bool = True) -> Kernels:
    """What runs there if ``wanted``: with Triton on a GPU the copy; the others in half precision, from compute
    capability 9 on."""
    if not wanted or device.type != "cuda" or not has_triton():
        return Kernels(False, False)
    return Kernels(True, dtype in (torch.bfloat16, torch.float16) and _is_hopper(device))


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def aligned(x: Tensor) -> Tensor:
    """``x``, copied if it does not start where the tensor memory accelerator can read."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@dataclass(frozen=True)
class Relayout:
    """A permutation of the axes of a contiguous tensor whose first axis is that of the tokens.

    ``swap`` is (a, b, r) where the result is [.., b, a, r] for an input [.., a, b, r], or, with ``tokens_last``,
    [b, a, r, t] for an input [t, a, b, r]. ``kernel`` says whether a kernel of ours makes the copy.
    """

    shape: tuple[int, ...]
    permutation: Permutation
    swap: tuple[int, int, int] | None
    tokens_last: bool
    kernel: bool

    def run(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy, or add the copy to ``into``."""
        shape, strides = self._permuted
        if self.kernel:
            from ..kernels.relayout import exchange

            assert self.swap is not None
            result = x.new_empty(shape) if into is None else into
            exchange(x, result, *self.swap, add=into is not None)
            return result
        permuted = x.as_strided(shape, strides)
        return permuted.contiguous() if into is None else into.view(shape).add_(permuted)

    @cached_property
    def _permuted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the result, and strides with which the input has them."""
        shape = tuple(self.shape[i] for i in self.permutation)
        return shape, tuple(prod(self.shape[i + 1 :]) for i in self.permutation)


def relayout(shape: tuple[int, ...], permutation: Permutation, exchange: bool) -> Relayout:
    """The copy that reorders the axes of a tensor of ``shape``, by our kernel if ``exchange`` and it can."""
    last = permutation[-1] == 0
    order = (0, *permutation[:-1]) if last else permutation
    moved = [i for i, j in enumerate(order) if i != j]
    swap = None
    if moved:
        first, end = moved[0], moved[-1] + 1
        split = order[first]
        if order[first:end] == (*range(split, end), *range(first, split)):
            swap = prod(shape[first:split]), prod(shape[split:end]), prod(shape[end:])
        if last and first != 1:
            swap = None
    return Relayout(shape, permutation, swap, last, exchange and swap is not None and not last)


def both_ways(
    shape: tuple[int, ...], permutation: Permutation | None, exchange: bool
) -> tuple[Relayout | None, Relayout | None]:
    """The relayout that ends in ``shape``, and its inverse."""
    if permutation is None:
        return None, None
    inverse = tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
    before = tuple(shape[i] for i in inverse)
    return relayout(before, permutation, exchange), relayout(shape, inverse, exchange)


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
        found = found.view(tokens, blocks, len(self.index) // blocks, width).sum(2, dtype=x.dtype)
        return found if into is None else into.view(self.shape).add_(found)


def looked_up(
    tokens: int, features: int, table: Table, before: Relayout | None, inverse: Relayout | None
) -> tuple[Gather, Collect]:
    """What looks blocks up and then reorders them, and its adjoint."""
    shape = tokens, num_blocks(table), features // num_blocks(table)
    return Gather(shape, positions(table), before), Collect(shape, uses(table), inverse)


Move = Relayout | Gather | Collect
"""Any of these."""
