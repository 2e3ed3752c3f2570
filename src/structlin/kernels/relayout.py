"""Copy a tensor with two axes exchanged, ``[t, a, b, r] -> [t, b, a, r]``, at the speed of the memory.

Each program reads a tile as it lies, exchanges its axes in registers, and writes it as it shall lie: both sides are
whole cache lines, also where ``r`` is a single element, at which a strided copy is slow. Short runs travel as wider
integers. The result may be added to what is already there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements in the registers of one program
RUN = 128  # elements that lie together in memory on either side of a tile, where the sizes allow
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _exchange(
    x_ptr, y_ptr, tokens,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    TA: tl.constexpr, TB: tl.constexpr, TR: tl.constexpr, T: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    a = tl.program_id(1) * TA + tl.arange(0, TA)
    b = tl.program_id(2) * TB + tl.arange(0, TB)
    r = tl.arange(0, TR)
    row = t[:, None, None, None] * (A * B * R)
    inside = (t < tokens)[:, None, None, None]
    ra, rb = a[:, None, None], b[:, None]
    x = tl.load(x_ptr + row + ((ra * B + rb) * R + r)[None], inside & ((ra < A) & (rb < B) & (r < R))[None])
    ra, rb = a[:, None], b[:, None, None]
    y = tl.permute(x, (0, 2, 1, 3))
    to = y_ptr + row + ((rb * A + ra) * R + r)[None]
    mask = inside & ((ra < A) & (rb < B) & (r < R))[None]
    if ADD:
        there = tl.load(to, mask)
        if y.dtype.primitive_bitwidth == 16:
            y = (y.to(tl.float32) + there.to(tl.float32)).to(there.dtype)
        else:
            y += there
    tl.store(to, y, mask)


@cache
def tile(a: int, b: int, r: int) -> tuple[int, int, int, int]:
    """Powers of two: all of ``r``, enough of ``a`` and ``b`` for long runs on both sides, tokens for the rest."""
    tr = triton.next_power_of_2(r)
    enough = max(1, RUN // tr)
    ta, tb = min(triton.next_power_of_2(a), enough), min(triton.next_power_of_2(b), enough)
    while ta < a and ta * tb * tr < TILE // 2:
        ta *= 2
    while tb < b and ta * tb * tr < TILE // 2:
        tb *= 2
    return ta, tb, tr, max(1, min(16, TILE // (ta * tb * tr)))


def exchange(x: Tensor, y: Tensor, a: int, b: int, r: int, add: bool = False) -> None:
    """Write ``[t, a, b, r]`` of the contiguous ``x`` as ``[t, b, a, r]`` into the contiguous ``y``, or add it there.

    Any number of tokens; elements of 1, 2, 4 or 8 bytes.
    """
    if not add:
        size = x.element_size()
        while size < 8 and r % 2 == 0 and r < 16:
            size, r = size * 2, r // 2
        if size > x.element_size():
            x, y = x.view(-1).view(_WIDE[size]), y.view(-1).view(_WIDE[size])
    ta, tb, tr, rows = tile(a, b, r)
    tokens = x.numel() // (a * b * r)
    if tokens:
        grid = (triton.cdiv(tokens, rows), triton.cdiv(a, ta), triton.cdiv(b, tb))
        _exchange[grid](x, y, tokens, a, b, r, ta, tb, tr, rows, add, num_warps=8)
