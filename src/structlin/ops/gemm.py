"""One contraction as one batched GEMM on strided views: no copy where every role of the step is one stride.

cuBLAS and the CPU libraries take a batch stride and a leading dimension for each operand, so an operand is read (or
the result written) in place when the axes of each of its roles coalesce into one stride and one of the two matrix
dimensions is contiguous. An operand that does not fit is copied first, and `Gemm.copies` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import Axes
from .equation import parse

Strides = tuple[int, int, int]

SMALL = 64  # up to here a product with one such side is bound by memory, and a copy costs more than the product


@dataclass(frozen=True)
class Gemm:
    """``c[g, m, n] = sum over k of a[g, m, k] b[g, k, n]``, with the strides to read and write in place.

    A stride of None stands for an operand that is copied to (or from) a contiguous matrix in the order of `axes`.
    """

    sizes: tuple[int, int, int, int]  # group, m, n, k
    axes: tuple[Axes, Axes, Axes, Axes]
    a: Strides | None
    b: Strides | None
    c: Strides | None

    @property
    def copies(self) -> tuple[str, ...]:
        """Which of the operands a, b and c do not fit and are copied."""
        return tuple(name for name, strides in (("a", self.a), ("b", self.b), ("c", self.c)) if strides is None)


@lru_cache(maxsize=4096)
def plan_gemm(
    equation: str,
    a_shape: tuple[int, ...],
    a_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
) -> Gemm:
    """The GEMM of an equation over operands of these shapes and strides; the result is contiguous."""
    axes_a, axes_b, axes_c = parse(equation)
    size = dict(zip(axes_a, a_shape, strict=True)) | dict(zip(axes_b, b_shape, strict=True))
    group = tuple(x for x in axes_c if x in axes_a and x in axes_b)
    m = tuple(x for x in axes_c if x in axes_a and x not in axes_b)
    n = tuple(x for x in axes_c if x in axes_b and x not in axes_a)
    k = tuple(x for x in axes_b if x in axes_a and x not in axes_c)

    def view(axes: Axes, stride: Sequence[int], *roles: Axes) -> Strides | None:
        by_axis = dict(zip(axes, stride, strict=True))
        merged = [coalesce([size[x] for x in role], [by_axis[x] for x in role]) for role in roles]
        g, rows, columns = merged
        if g is None or rows is None or columns is None or 1 not in (rows, columns):
            return None
        return g, rows, columns

    c_shape = [size[x] for x in axes_c]
    c_stride = [prod(c_shape[i + 1 :]) for i in range(len(c_shape))]
    g_size, m_size, n_size, k_size = (prod(size[x] for x in role) for role in (group, m, n, k))
    return Gemm(
        (g_size, m_size, n_size, k_size),
        (group, m, n, k),
        view(axes_a, a_stride, group, m, k),
        view(axes_b, b_stride, group, k, n),
        view(axes_c, c_stride, group, m, n),
    )


def plan_contiguous(a: Axes, b: Axes, c: Axes, sizes: dict[str, int]) -> Gemm:
    """The GEMM of ``a, b -> c`` over contiguous operands."""
    shapes = [tuple(sizes[axis] for axis in axes) for axes in (a, b)]
    strides = [tuple(prod(shape[i + 1 :]) for i in range(len(shape))) for shape in shapes]
    return plan_gemm(f"{' '.join(a)}, {' '.join(b)} -> {' '.join(c)}", shapes[0], strides[0], shapes[1], strides[1])


def contract_anywhere(a: Tensor, b: Tensor, equation: str) -> Tensor | None:
    """``a`` and ``b`` contracted by a kernel of ours that reads and writes any order.

    None where a GEMM could do so too, or has enough to multiply to be faster in spite of its copies; and where the
    kernel cannot: with axes of a role in more than two runs of memory, or tensors that reach over 2**31 elements.
    """
    found = _anywhere(equation, tuple(a.shape), a.stride(), tuple(b.shape), b.stride())
    if found is None:
        return None
    from ..kernels.product import Role, product

    shape, roles = found
    c = a.new_empty(shape)
    product(a, b, c, *(Role(*role) for role in roles))
    return c


class _Operand(NamedTuple):
    axes: Axes
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@lru_cache(maxsize=4096)
def _anywhere(
    equation: str, a_shape: tuple[int, ...], a_strides: tuple[int, ...], b_shape: tuple[int, ...],
    b_strides: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:  # fmt: skip
    """The shape of the result, and the roles of the kernel."""
    gemm = plan_gemm(equation, a_shape, a_strides, b_shape, b_strides)
    if not gemm.copies or not prod(a_shape) or not prod(b_shape) or min(gemm.sizes[1:]) > SMALL:
        return None
    axes_a, axes_b, axes_c = parse(equation)
    size = dict(zip(axes_a, a_shape, strict=True)) | dict(zip(axes_b, b_shape, strict=True))
    shape = tuple(size[x] for x in axes_c)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    given = (axes_a, a_shape, a_strides), (axes_b, b_shape, b_strides), (axes_c, shape, strides)
    operands = [_Operand(*tensor) for tensor in given]
    digits = [_digits(role, size, operands) for role in gemm.axes]
    reach = [sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) for x in operands]
    if max(reach) >= 2**31 or any(len(role) > 2 for role in digits):
        return None
    roles = []
    for role in digits:
        (outer, *first), (inner, *second) = [(1, 0, 0, 0)] * (2 - len(role)) + role
        roles.append((outer * inner, inner, *zip(first, second, strict=True)))
    return shape, tuple(roles)


def _digits(role: Axes, size: Mapping[str, int], operands: Sequence[_Operand]) -> list[tuple[int, ...]]:
    """The size and the strides in each operand, 0 where it has none, of every run of axes; in the order of the largest
    operand, which is to be read or written in long rows, as far as it has them."""
    strides = [dict(zip(x.axes, x.strides, strict=True)) for x in operands]
    leading = strides[max(range(len(operands)), key=lambda i: prod(operands[i].shape))]
    if not all(axis in leading for axis in role):
        leading = next(own for own in strides if all(axis in own for axis in role))
    found: list[tuple[int, ...]] = []
    for axis in sorted((x for x in role if size[x] > 1), key=leading.__getitem__, reverse=True):
        n, own = size[axis], [stride.get(axis, 0) for stride in strides]
        if found and all(outer == n * inner for outer, inner in zip(found[-1][1:], own, strict=True)):
            found[-1] = (found[-1][0] * n, *own)
        else:
            found.append((n, *own))
    return found


def coalesce(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride of several digits, slowest first, or None if they have none; 1 for no digits.

    Digits of size 1 may have any stride. Where there are no others, that of the last counts: cuBLAS wants the distance
    of two rows to be a row even where there is only one.
    """
    digits = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
    for (_, outer), (n, inner) in pairwise(digits):
        if outer != n * inner:
            return None
    if digits:
        return digits[-1][1]
    return strides[-1] if strides else 1


def contract(a: Tensor, b: Tensor, equation: str, in_place: bool = True) -> Tensor:
    """``a`` and ``b`` contracted by one ``torch.bmm`` (or ``mm``); with ``in_place=False`` after copying everything."""
    gemm = plan_gemm(equation, tuple(a.shape), a.stride(), tuple(b.shape), b.stride())
    axes_a, axes_b, axes_c = parse(equation)
    group, m, n, k = gemm.axes
    g_size, m_size, n_size, k_size = gemm.sizes
    left = _matrix(a, axes_a, (group, m, k), (g_size, m_size, k_size), gemm.a if in_place else None)
    right = _matrix(b, axes_b, (group, k, n), (g_size, k_size, n_size), gemm.b if in_place else None)
    size = dict(zip(axes_a, a.shape, strict=True)) | dict(zip(axes_b, b.shape, strict=True))
    if gemm.c is not None and in_place:
        c = a.new_empty([size[x] for x in axes_c])
        _multiply(left, right, c.as_strided((g_size, m_size, n_size), gemm.c))
        return c
    c = a.new_empty((g_size, m_size, n_size))
    _multiply(left, right, c)
    order = group + m + n
    return c.view([size[x] for x in order]).permute([order.index(x) for x in axes_c]).contiguous()


def _matrix(
    x: Tensor, axes: Axes, roles: tuple[Axes, Axes, Axes], sizes: tuple[int, int, int], strides: Strides | None
) -> Tensor:
    if strides is not None:
        return x.as_strided(sizes, strides)
    return x.permute([axes.index(axis) for role in roles for axis in role]).reshape(sizes).contiguous()


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
