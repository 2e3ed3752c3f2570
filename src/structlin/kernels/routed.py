"""Two steps of a mixture over tiles of tokens that chose the same experts: each token is read once and written once.

The chain of an expert is ``[t, c, a] x [c, f, a] -> [t, c, f]``, then ``[t, c, f] x [f, o, c] -> [t, f, o]``, as for a
BTT matrix of two cores. A tile has the same experts in all rows, so the first step is one product with the columns of
all of them, and the second adds them up under their gates before anything is stored. What lies between is stored with
the places of the tokens innermost, so that every feature is a row of whole tiles and the order of features is free.
Input and output are read and written by token: no sorted copy of either exists. Sums over tokens are taken by unit and
then in order of the units, so results are the same bits each time.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE, Sets, block, joined

PART = 64  # places that a sum over tokens takes at a time


@triton.jit
def _first(
    x_ptr, w_ptr, z_ptr, token_ptr, tile_ptr, tokens, places,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr,
):  # fmt: skip
    tile, c = tl.program_id(0) // C, tl.program_id(0) % C
    if tl.load(tile_ptr + tile * TOP_K) >= 0:
        p = tile * TILE_ + tl.arange(0, TILE_)
        token = tl.load(token_ptr + p)
        a, row = tl.arange(0, BLOCK_A), tl.arange(0, ROWS)
        j, f = row // BLOCK_F, row % BLOCK_F
        real = (j < TOP_K) & (f < F)
        x = tl.load(
            x_ptr + token.to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :],
            mask=(token < tokens)[:, None] & (a < A)[None, :], other=0.0,
        )  # fmt: skip
        expert = tl.load(tile_ptr + tile * TOP_K + j, mask=real, other=0)
        w = tl.load(
            w_ptr + ((expert * C + c) * F + f)[:, None] * A + a[None, :],
            mask=real[:, None] & (a < A)[None, :],
            other=0.0,
        )
        z = tl.dot(w, tl.trans(x))
        at = ((j * C + c) * F + f).to(tl.int64)[:, None] * places + p[None, :]
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _second(
    z_ptr, w_ptr, gate_ptr, y_ptr, token_ptr, choice_ptr, tile_ptr, tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, TILE_: tl.constexpr,
):  # fmt: skip
    tile, f = tl.program_id(0) // F, tl.program_id(0) % F
    if tl.load(tile_ptr + tile * TOP_K) >= 0:
        p = tile * TILE_ + tl.arange(0, TILE_)
        token = tl.load(token_ptr + p)
        c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
        acc = tl.zeros((TILE_, BLOCK_O), tl.float32)
        for j in tl.static_range(TOP_K):
            expert = tl.load(tile_ptr + tile * TOP_K + j)
            at = ((j * C + c) * F + f).to(tl.int64)[:, None] * places + p[None, :]
            z = tl.load(z_ptr + at, mask=(c < C)[:, None], other=0.0)
            w = tl.load(
                w_ptr + ((expert * F + f) * O + o)[:, None] * C + c[None, :],
                mask=(o < O)[:, None] & (c < C)[None, :], other=0.0,
            )  # fmt: skip
            choice = tl.load(choice_ptr + j * places + p, mask=token < tokens, other=0)
            gate = tl.load(gate_ptr + choice, mask=token < tokens, other=0.0).to(tl.float32)
            acc += gate[:, None] * tl.dot(tl.trans(z), tl.trans(w))
        tl.store(
            y_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :], acc.to(y_ptr.dtype.element_ty),
            mask=(token < tokens)[:, None] & (o < O)[None, :],
        )  # fmt: skip


@triton.jit
def _second_backward(
    dy_ptr, z_ptr, w_ptr, gate_ptr, dz_ptr, dgate_ptr, dw_ptr, token_ptr, choice_ptr, unit_ptr, first_ptr, tiles_ptr,
    tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    # the experts of one unit and group run next to each other, so that its gradient is still in the L2 cache
    j, f, unit = tl.program_id(0) % TOP_K, tl.program_id(0) // TOP_K % F, tl.program_id(0) // (TOP_K * F)
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit) * TILE_
        expert = tl.load(unit_ptr + unit * TOP_K + j)
        c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
        inside = (o < O)[:, None] & (c < C)[None, :]
        w = tl.load(w_ptr + ((expert * F + f) * O + o)[:, None] * C + c[None, :], mask=inside, other=0.0)
        rows = ((j * C + c) * F + f).to(tl.int64)[:, None] * places
        acc = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        for at in tl.range(begin, begin + tiles * TILE_, PART_):
            p = at + tl.arange(0, PART_)
            token = tl.load(token_ptr + p)
            there = token < tokens
            dy = tl.load(
                dy_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :],
                mask=there[:, None] & (o < O)[None, :], other=0.0,
            )  # fmt: skip
            z = tl.load(z_ptr + rows + p[None, :], mask=(c < C)[:, None], other=0.0)
            choice = tl.load(choice_ptr + j * places + p, mask=there, other=0)
            gate = tl.load(gate_ptr + choice, mask=there, other=0.0).to(tl.float32)
            du = tl.trans(tl.dot(dy, w))
            tl.store(dgate_ptr + (f * TOP_K + j).to(tl.int64) * places + p, tl.sum(du * z.to(tl.float32), 0))
            dz = (du * gate[None, :]).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + rows + p[None, :], dz, mask=(c < C)[:, None])
            gated = (z.to(tl.float32) * gate[None, :]).to(z.dtype)
            acc = tl.dot(tl.trans(dy), tl.trans(gated), acc)
        out = ((unit * TOP_K + j) * F + f).to(tl.int64) * (O * C)
        tl.store(dw_ptr + out + o[:, None] * C + c[None, :], acc, mask=inside)


@triton.jit
def _first_backward(
    dz_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, token_ptr, unit_ptr, first_ptr, tiles_ptr, tokens, places,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    c, unit = tl.program_id(0) % C, tl.program_id(0) // C
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit) * TILE_
        a, row = tl.arange(0, BLOCK_A), tl.arange(0, ROWS)
        j, f = row // BLOCK_F, row % BLOCK_F
        real = (j < TOP_K) & (f < F)
        inside = real[:, None] & (a < A)[None, :]
        expert = tl.load(unit_ptr + unit * TOP_K + j, mask=real, other=0)
        w = tl.load(w_ptr + ((expert * C + c) * F + f)[:, None] * A + a[None, :], mask=inside, other=0.0)
        rows = ((j * C + c) * F + f).to(tl.int64)[:, None] * places
        acc = tl.zeros((ROWS, BLOCK_A), tl.float32)
        for at in tl.range(begin, begin + tiles * TILE_, PART_):
            p = at + tl.arange(0, PART_)
            token = tl.load(token_ptr + p)
            mask = (token < tokens)[:, None] & (a < A)[None, :]
            there = token.to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :]
            dz = tl.load(dz_ptr + rows + p[None, :], mask=real[:, None], other=0.0)
            x = tl.load(x_ptr + there, mask=mask, other=0.0)
            tl.store(dx_ptr + there, tl.dot(tl.trans(dz), w).to(dx_ptr.dtype.element_ty), mask=mask)
            acc = tl.dot(dz, x, acc)
        out = (((unit * TOP_K + j) * C + c) * F + f).to(tl.int64)[:, None] * A + a[None, :]
        tl.store(dw_ptr + out, acc, mask=inside)


@triton.jit
def _add_units(parts_ptr, out_ptr, unit_ptr, parts, n, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i.to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, parts, num_stages=4):
        end = tl.where(tl.load(unit_ptr + part) == expert, n, 0)
        acc += tl.load(parts_ptr + at, mask=i < end, other=0.0)
        at += n
    tl.store(out_ptr + expert.to(tl.int64) * n + i, acc.to(out_ptr.dtype.element_ty), mask=i < n)


def _warps(*tile: int) -> int:
    return 8 if prod(tile) > 8192 else 4


def forward(x: Tensor, first: Tensor, second: Tensor, gate: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """The mixture, and what lies between both steps without its gate.

    Args:
        x: (tokens, c * a).
        first: (experts, c, f, a).
        second: (experts, f, o, c); all three contiguous, of one half precision.
        gate: (tokens, top_k), contiguous, any float dtype.
        sets: of the experts chosen.

    Returns:
        (tokens, f * o), and (top_k, c, f, places), unset in tiles without tokens. Sums in float32.
    """
    (_, c, f, a), o = first.shape, second.shape[2]
    tokens, (top_k, places) = x.shape[0], sets.choice.shape
    z, y = x.new_empty(top_k, c, f, places), x.new_empty(tokens, f * o)
    tiles, wide = sets.tile.shape[0], joined(top_k, f)
    _first[(tiles * c,)](
        x, first, z, sets.token, sets.tile, tokens, places, c, a, f, top_k, block(a), block(f), wide, TILE,
        num_warps=_warps(wide, TILE),
    )  # fmt: skip
    _second[(tiles * f,)](
        z, second, gate, y, sets.token, sets.choice, sets.tile, tokens, places, c, f, o, top_k, block(c), block(o),
        TILE, num_warps=_warps(TILE, block(o)),
    )  # fmt: skip
    return y, z


def backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, gate: Tensor, z: Tensor, sets: Sets
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, both factors and gate, for that of the result; all as `forward` has them, and contiguous."""
    (_, c, f, a), o = first.shape, second.shape[2]
    tokens, (top_k, places), units = x.shape[0], sets.choice.shape, sets.unit.shape[0]
    dz, dx = torch.empty_like(z), torch.empty_like(x)
    dgate = torch.empty(f, top_k, places, device=x.device, dtype=torch.float32)
    parts = torch.empty(units * top_k, f * o * c, device=x.device, dtype=torch.float32)
    _second_backward[(units * f * top_k,)](
        dy, z, second, gate, dz, dgate, parts, sets.token, sets.choice, sets.unit, sets.first, sets.tiles, tokens,
        places, c, f, o, top_k, block(c), block(o), TILE, PART, num_warps=_warps(block(o), block(c)), num_stages=3,
    )  # fmt: skip
    dsecond = _added(parts, sets.unit, second)
    parts, wide = torch.empty(units * top_k, c * f * a, device=x.device, dtype=torch.float32), joined(top_k, f)
    _first_backward[(units * c,)](
        dz, x, first, dx, parts, sets.token, sets.unit, sets.first, sets.tiles, tokens, places, c, a, f, top_k,
        block(a), block(f), wide, TILE, PART, num_warps=_warps(wide, block(a)), num_stages=3,
    )  # fmt: skip
    dfirst = _added(parts, sets.unit, first)
    by_place = dgate.sum(0).flatten()
    return dx, dfirst, dsecond, by_place[sets.place].to(gate.dtype)


def _added(parts: Tensor, unit: Tensor, like: Tensor) -> Tensor:
    """What the units of each expert add up to: (units * top_k, n) -> a new tensor as ``like``, (experts, n) in all."""
    found, n = torch.empty_like(like), parts.shape[1]
    _add_units[(triton.cdiv(n, 1024), like.shape[0])](parts, found, unit, parts.shape[0], n, 1024)
    return found
