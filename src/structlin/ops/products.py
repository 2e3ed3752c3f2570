"""The products of a schedule, and the sum of several: each a GEMM on strided views, or a block-sparse kernel, and what
reorders its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks
from .moves import Move, Relayout, aligned


@dataclass(frozen=True)
class Plain:
    """What the kernel that stores across takes: a GEMM per group, ``a`` being [t, g, k], or [g, k, t] if ``a_last``."""

    groups: int
    k: int
    n: int
    a_last: bool
    k_inner: bool


Strided = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides."""


@dataclass(frozen=True)
class Gemm:
    """Sizes and strides of the two operands and of the result as matrices, and the shape of the result."""

    a: Strided
    b: Strided
    c: Strided
    shape: tuple[int, ...]
    plain: Plain | None

    def run(self, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
        """Multiply, or add the product to ``into``. A new tensor is contiguous, of any shape."""
        if into is None and self._new is not None:
            multiply, first, second, exchanged = self._new
            if exchanged:
                a, b = b, a
            a, b = a.as_strided(*first), b.as_strided(*second)
            if not torch._C._is_any_autocast_enabled():
                return multiply(a, b)
            with torch._C._DisableAutocast():  # it would cast the operands of a backward pass that runs under it
                return multiply(a, b)
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

    @cached_property
    def _new(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Strided, Strided, bool] | None:
        """What multiplies into a new tensor, its operands, and whether they are exchanged: a and b where the result
        lies row by row, both transposed and exchanged where it lies column by column; None where it lies otherwise."""
        (*groups, m, n), strides = self.c
        multiply = torch.bmm if groups else torch.mm
        if strides in ((n, 1), (m * n, n, 1)):
            return multiply, self.a, self.b, False
        if strides in ((1, m), (m * n, 1, m)):
            return multiply, _transposed(self.b), _transposed(self.a), True
        return None


def _transposed(matrices: Strided) -> Strided:
    (*groups, m, n), (*by_group, by_m, by_n) = matrices
    return (*groups, n, m), (*by_group, by_n, by_m)


Multiply = Gemm | Blocks
"""What multiplies two tensors."""


class Product(NamedTuple):
    """A GEMM, its operands, and the relayout of its result: what is left to do for one term of a sum."""

    gemm: Multiply
    move: Move | None
    a: Tensor
    b: Tensor


def pairs(products: Sequence[tuple[Multiply, Move | None]]) -> dict[int, int]:
    """Which terms of a sum share a kernel: for the place of a block-sparse product that of a product of two plain
    matrices, such as the last one of a low-rank term, whose inner dimension continues that of the blocks."""
    plain = [i for i, (gemm, move) in enumerate(products) if move is None and isinstance(gemm, Gemm)]
    found: dict[int, int] = {}
    for i, (gemm, _) in enumerate(products):
        if isinstance(gemm, Blocks):
            fitting = [j for j in plain if _continues(products[j][0], gemm) and j not in found.values()]
            found |= {i: fitting[0]} if fitting else {}
    return found


def _continues(gemm: Multiply, blocks: Blocks) -> bool:
    """Whether the block-sparse kernel can read the operands of ``gemm`` and writes its result as it lies."""
    assert isinstance(gemm, Gemm)
    *_, rank = gemm.a[0]
    (*group, tokens, n), _ = gemm.c
    b = (1, rank) if blocks.which == "forward" else (n, 1)
    strides = gemm.a[1], gemm.b[1], gemm.c[1]
    return not group and tokens > 0 and rank % 8 == 0 and strides == ((rank, 1), b, (n, 1))


def gradient_pairs(products: Mapping[int, Multiply]) -> dict[int, int]:
    """Which gradients of factors share a kernel, all being products with one gradient of a result: for the place of a
    block-sparse one that of one of a plain matrix (tokens, rank)."""
    found: dict[int, int] = {}
    for i, blocks in products.items():
        if isinstance(blocks, Blocks):
            fitting = [j for j, gemm in products.items() if _beside(gemm, blocks) and j not in found.values()]
            found |= {i: fitting[0]} if fitting else {}
    return found


def _beside(gemm: Multiply, blocks: Blocks) -> bool:
    if not isinstance(gemm, Gemm) or len(gemm.c[0]) != 2:
        return False
    (rank, tokens), (_, n) = gemm.a[0], gemm.b[0]
    strides = gemm.a[1], gemm.b[1], gemm.c[1]
    return tokens == blocks.a[0] and rank % 8 == 0 and strides == ((1, rank), (n, 1), (1, rank))


def factor_gradients(products: Mapping[int, tuple[Multiply, Tensor]], d: Tensor) -> dict[int, Tensor]:
    """The products of tensors with ``d``, the gradient of a result, by place; two in one kernel where they pair up."""
    found: dict[int, Tensor] = {}
    paired = gradient_pairs({place: gemm for place, (gemm, _) in products.items()})
    for place, (gemm, z) in products.items():
        if place in paired:
            assert isinstance(gemm, Blocks)
            found[place], beside = gemm.gradients(z, d, products[paired[place]][1])
            assert beside is not None
            found[paired[place]] = beside
        elif place not in paired.values():
            found[place] = gemm.run(z, d)
    return found


def add(products: Sequence[Product]) -> Tensor:
    """The sum of products of one shape: two in one kernel where they pair up, else each added to what is there."""
    if len(products) == 1:
        return multiply_then(*products[0])
    paired = pairs([(product.gemm, product.move) for product in products])
    total: Tensor | None = None
    # a block-sparse product adds to what is there while it multiplies, a GEMM by a pass over memory
    for i in sorted(range(len(products)), key=lambda i: isinstance(products[i].gemm, Blocks)):
        gemm, move, a, b = products[i]
        if i in paired:
            assert isinstance(gemm, Blocks)
            beside = products[paired[i]]
            assert isinstance(beside.gemm, Gemm)
            matrices = beside.a.as_strided(*beside.gemm.a), beside.b.as_strided(*beside.gemm.b)
            total = gemm.run(a, b, total, matrices)
        elif i not in paired.values():
            total = multiply_then(gemm, move, a, b, total)
    assert total is not None
    return total


def multiply_then(gemm: Multiply, move: Move | None, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """One GEMM and the relayout of its result, in one kernel where there is one; added to ``into`` if given."""
    if move is None:
        return gemm.run(a, b, into)
    if isinstance(move, Relayout) and move.tokens_last and a.numel():
        from ..kernels.across import across

        assert isinstance(gemm, Gemm)
        assert gemm.plain is not None
        assert move.swap is not None
        plain = gemm.plain
        a, b = aligned(a), aligned(b)
        return across(a, b, move.shape[0], plain.groups, plain.k, plain.n, move.swap[2], plain.a_last, plain.k_inner)
    return move.run(gemm.run(a, b), into)
