"""Write a tensor beside a copy of itself with two axes exchanged, and add two such halves up again.

``x`` of shape [t, a, b, r] becomes ``[t, rows, 2, width]``: one half has the features of ``x`` in rows of ``width``,
the other those of ``[t, b, a, r]``. So two products that share all but the order of their inputs become one. Each
program reads its tile once, as in `structlin.kernels.relayout`, and exchanges axes in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .relayout import tile


@triton.jit
def _joined(feature, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Where a feature of one half lies among those of both."""
    return (feature // WIDTH) * (2 * WIDTH) + HALF * WIDTH + feature % WIDTH


@triton.jit
def _join(
    x_ptr, z_ptr, tokens,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, EXCHANGED: tl.constexpr,
    TA: tl.constexpr, TB: tl.constexpr, TR: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    a = tl.program_id(1) * TA + tl.arange(0, TA)
    b = tl.program_id(2) * TB + tl.arange(0, TB)
    r = tl.arange(0, TR)
    row = t[:, None, None, None] * (A * B * R)
    inside = (t < tokens)[:, None, None, None]
    ra, rb = a[:, None, None], b[:, None]
    feature, mask = (ra * B + rb) * R + r, inside & ((ra < A) & (rb < B) & (r < R))[None]
    x = tl.load(x_ptr + row + feature[None], mask)
    tl.store(z_ptr + 2 * row + _joined(feature, WIDTH, 1 - EXCHANGED)[None], x, mask)
    ra, rb = a[:, None], b[:, None, None]
    feature, mask = (rb * A + ra) * R + r, inside & ((ra < A) & (rb < B) & (r < R))[None]
    tl.store(z_ptr + 2 * row + _joined(feature, WIDTH, EXCHANGED)[None], tl.permute(x, (0, 2, 1, 3)), mask)


@triton.jit
def _unjoin(
    z_ptr, x_ptr, tokens,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, EXCHANGED: tl.constexpr,
    TA: tl.constexpr, TB: tl.constexpr, TR: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    a = tl.program_id(1) * TA + tl.arange(0, TA)
    b = tl.program_id(2) * TB + tl.arange(0, TB)
    r = tl.arange(0, TR)
    row = t[:, None, None, None] * (A * B * R)
    inside = (t < tokens)[:, None, None, None]
    ra, rb = a[:, None], b[:, None, None]
    feature, mask = (rb * A + ra) * R + r, inside & ((ra < A) & (rb < B) & (r < R))[None]
    exchanged = tl.permute(tl.load(z_ptr + 2 * row + _joined(feature, WIDTH, EXCHANGED)[None], mask), (0, 2, 1, 3))
    ra, rb = a[:, None, None], b[:, None]
    feature, mask = (ra * B + rb) * R + r, inside & ((ra < A) & (rb < B) & (r < R))[None]
    plain = tl.load(z_ptr + 2 * row + _joined(feature, WIDTH, 1 - EXCHANGED)[None], mask)
    if plain.dtype.primitive_bitwidth == 16:
        total = (plain.to(tl.float32) + exchanged.to(tl.float32)).to(plain.dtype)
    else:
        total = plain + exchanged
    tl.store(x_ptr + row + feature[None], total, mask)


def join(x: Tensor, swap: tuple[int, int, int], width: int, exchanged: int) -> Tensor:
    """The contiguous ``x``, [tokens, a * b * r], beside its exchange by ``swap`` = (a, b, r), in rows of ``width``.

    Returns [tokens, 2 * a * b * r]; in each row the exchanged half is the first (``exchanged`` = 0) or the second (1).
    """
    z = x.new_empty(x.shape[0], 2 * x.shape[1])
    _launch(_join, x, z, x.shape[0], swap, width, exchanged)
    return z


def unjoin(z: Tensor, swap: tuple[int, int, int], width: int, exchanged: int) -> Tensor:
    """The adjoint of `join`: both halves of ``z`` brought to the order of ``x`` and added, [tokens, a * b * r]."""
    x = z.new_empty(z.shape[0], z.shape[1] // 2)
    _launch(_unjoin, z, x, z.shape[0], swap, width, exchanged)
    return x


def _launch(
    kernel: triton.JITFunction, source: Tensor, to: Tensor, tokens: int, swap: tuple[int, int, int], width: int,
    exchanged: int,
) -> None:  # fmt: skip
    if not tokens:
        return
    a, b, _ = swap
    ta, tb, tr, rows = tile(*swap)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(a, ta), triton.cdiv(b, tb))
    kernel[grid](source, to, tokens, *swap, width, exchanged, ta, tb, tr, rows, num_warps=8)
