"""Two steps of a mixture over tiles of tokens that chose the same experts: each token is read once and written once.

The chain of an expert is ``[t, c, a] x [c, f, a] -> [t, c, f]``, then ``[t, c, f] x [f, o, c] -> [t, f, o]``, as for a
BTT matrix of two cores. A tile has the same experts in all rows, so each step is one product with the columns of
all of them; the second adds them up under their gates before anything is stored. What lies between is stored tile by
tile, with the places of the tokens innermost, so that the order of features is free and a program stays within few
pages of memory. Input and output are read and written by token: no sorted copy of either exists. Sums over tokens are
taken by unit and then in order of the units, so results are the same bits each time.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE, Sets, block, joined

PART = 64  # places that a sum over tokens takes at a time
LOOP = {"num_stages": 3}  # how such a sum is compiled


@triton.jit
def _first(
    x_ptr, w_ptr, z_ptr, token_ptr, tile_ptr, tokens,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr,
):  # fmt: skip
    tile, c = tl.program_id(0) // C, tl.program_id(0) % C
    if tl.load(tile_ptr + tile * TOP_K) >= 0:
        q = tl.arange(0, TILE_)
        token = tl.load(token_ptr + tile * TILE_ + q)
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
        z_ptr += tile.to(tl.int64) * (TOP_K * C * F * TILE_)
        at = ((j * C + c) * F + f)[:, None] * TILE_ + q[None, :]
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _second(
    z_ptr, w_ptr, gate_ptr, y_ptr, token_ptr, choice_ptr, tile_ptr, tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = ROWS // BLOCK_C
    tile, f = tl.program_id(0) // F, tl.program_id(0) % F
    if tl.load(tile_ptr + tile * TOP_K) >= 0:
        q = tl.arange(0, TILE_)
        p = tile * TILE_ + q
        token = tl.load(token_ptr + p)
        slot, row, o = tl.arange(0, SLOTS), tl.arange(0, ROWS), tl.arange(0, BLOCK_O)
        j, c = row // BLOCK_C, row % BLOCK_C
        real = (j < TOP_K) & (c < C)
        z_ptr += tile.to(tl.int64) * (TOP_K * C * F * TILE_)
        z = tl.load(z_ptr + ((j * C + c) * F + f)[:, None] * TILE_ + q[None, :], mask=real[:, None], other=0.0)
        expert = tl.load(tile_ptr + tile * TOP_K + j, mask=real, other=0)
        w = tl.load(
            w_ptr + ((expert * F + f)[None, :] * O + o[:, None]) * C + c[None, :],
            mask=real[None, :] & (o < O)[:, None],
            other=0.0,
        )
        there = (slot < TOP_K)[:, None] & (token < tokens)[None, :]
        choice = tl.load(choice_ptr + slot[:, None] * places + p[None, :], mask=there, other=0)
        gate = tl.load(gate_ptr + choice, mask=there, other=0.0).to(tl.float32)
        apart = tl.reshape(z, [SLOTS, BLOCK_C, TILE_]).to(tl.float32) * gate[:, None, :]
        gated = tl.reshape(apart, [ROWS, TILE_]).to(z.dtype)
        y = tl.dot(tl.trans(gated), tl.trans(w))
        tl.store(
            y_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :], y.to(y_ptr.dtype.element_ty),
            mask=(token < tokens)[:, None] & (o < O)[None, :],
        )  # fmt: skip


@triton.jit
def _second_backward(
    dy_ptr, z_ptr, w_ptr, gate_ptr, dz_ptr, dgate_ptr, dw_ptr, token_ptr, choice_ptr, unit_ptr, first_ptr, tiles_ptr,
    tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = ROWS // BLOCK_C
    f, unit = tl.program_id(0) % F, tl.program_id(0) // F
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit) * TILE_
        slot, row, o = tl.arange(0, SLOTS), tl.arange(0, ROWS), tl.arange(0, BLOCK_O)
        j, c = row // BLOCK_C, row % BLOCK_C
        real = (j < TOP_K) & (c < C)
        inside = real[:, None] & (o < O)[None, :]
        expert = tl.load(unit_ptr + unit * TOP_K + j, mask=real, other=0)
        w = tl.load(w_ptr + ((expert * F + f)[:, None] * O + o[None, :]) * C + c[:, None], mask=inside, other=0.0)
        rows = ((j * C + c) * F + f)[:, None] * TILE_
        acc = tl.zeros((ROWS, BLOCK_O), tl.float32)
        for part in tl.range(0, tiles * (TILE_ // PART_)):
            at = begin + part * PART_
            tile, q = (at // TILE_).to(tl.int64), at % TILE_ + tl.arange(0, PART_)
            p = at + tl.arange(0, PART_)
            token = tl.load(token_ptr + p)
            dy = tl.load(
                dy_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :],
                mask=(token < tokens)[:, None] & (o < O)[None, :], other=0.0,
            )  # fmt: skip
            there_z = tile * (TOP_K * C * F * TILE_) + rows + q[None, :]
            z = tl.load(z_ptr + there_z, mask=real[:, None], other=0.0)
            there = (slot < TOP_K)[:, None] & (token < tokens)[None, :]
            choice = tl.load(choice_ptr + slot[:, None] * places + p[None, :], mask=there, other=0)
            gate = tl.load(gate_ptr + choice, mask=there, other=0.0).to(tl.float32)
            du = tl.reshape(tl.dot(w, tl.trans(dy)), [SLOTS, BLOCK_C, PART_])
            apart = tl.reshape(z, [SLOTS, BLOCK_C, PART_]).to(tl.float32)
            where = tile * (F * TOP_K * TILE_) + (f * TOP_K + slot)[:, None] * TILE_ + q[None, :]
            tl.store(dgate_ptr + where, tl.sum(du * apart, 1), mask=(slot < TOP_K)[:, None])
            dz = tl.reshape(du * gate[:, None, :], [ROWS, PART_]).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + there_z, dz, mask=real[:, None])
            gated = tl.reshape(apart * gate[:, None, :], [ROWS, PART_]).to(z.dtype)
            acc = tl.dot(gated, dy, acc)
        out = ((unit * TOP_K + j) * F + f).to(tl.int64)[:, None] * (O * C)
        tl.store(dw_ptr + out + o[None, :] * C + c[:, None], acc, mask=inside)


@triton.jit
def _first_backward(
    dz_ptr, x_ptr, w_ptr, dlogits_ptr, router_ptr, dx_ptr, dw_ptr, drouter_ptr,
    token_ptr, unit_ptr, first_ptr, tiles_ptr, tokens,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    c, unit = tl.program_id(0) % C, tl.program_id(0) // C
    tiles = tl.load(tiles_ptr + unit)
    a, row, e = tl.arange(0, BLOCK_A), tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    of_router = (e < EXPERTS)[:, None] & (a < A)[None, :]
    router_acc = tl.zeros((BLOCK_E, BLOCK_A), tl.float32)
    if tiles > 0:
        begin = tl.load(first_ptr + unit) * TILE_
        j, f = row // BLOCK_F, row % BLOCK_F
        real = (j < TOP_K) & (f < F)
        inside = real[:, None] & (a < A)[None, :]
        expert = tl.load(unit_ptr + unit * TOP_K + j, mask=real, other=0)
        w = tl.load(w_ptr + ((expert * C + c) * F + f)[:, None] * A + a[None, :], mask=inside, other=0.0)
        if EXPERTS:
            router = tl.load(router_ptr + e[:, None] * (C * A) + (c * A + a)[None, :], mask=of_router, other=0.0)
        rows = ((j * C + c) * F + f)[:, None] * TILE_
        acc = tl.zeros((ROWS, BLOCK_A), tl.float32)
        for part in tl.range(0, tiles * (TILE_ // PART_)):
            at = begin + part * PART_
            tile, q = (at // TILE_).to(tl.int64), at % TILE_ + tl.arange(0, PART_)
            token = tl.load(token_ptr + at + tl.arange(0, PART_))
            mask = (token < tokens)[:, None] & (a < A)[None, :]
            there = token.to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :]
            there_z = tile * (TOP_K * C * F * TILE_) + rows + q[None, :]
            dz = tl.load(dz_ptr + there_z, mask=real[:, None], other=0.0)
            x = tl.load(x_ptr + there, mask=mask, other=0.0)
            dx = tl.dot(tl.trans(dz), w)
            if EXPERTS:
                logit = (token < tokens)[:, None] & (e < EXPERTS)[None, :]
                dlogits = tl.load(
                    dlogits_ptr + token.to(tl.int64)[:, None] * EXPERTS + e[None, :], mask=logit, other=0.0
                ).to(x.dtype)
                dx = tl.dot(dlogits, router, dx)
                router_acc = tl.dot(tl.trans(dlogits), x, router_acc)
            tl.store(dx_ptr + there, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            acc = tl.dot(dz, x, acc)
        out = (((unit * TOP_K + j) * C + c) * F + f).to(tl.int64)[:, None] * A + a[None, :]
        tl.store(dw_ptr + out, acc, mask=inside)
    if EXPERTS:
        to = (unit * EXPERTS + e).to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :]
        tl.store(drouter_ptr + to, router_acc, mask=of_router)


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
    return 8 if prod(tile) > 4096 else 4  # with 4 for 8192 the sums over tokens leave no registers


def forward(x: Tensor, first: Tensor, second: Tensor, gate: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """The mixture, and what lies between both steps without its gate.

    Args:
        x: (tokens, c * a).
        first: (experts, c, f, a).
        second: (experts, f, o, c); all three contiguous, of one half precision.
        gate: (tokens, top_k), contiguous, any float dtype.
        sets: of the experts chosen.

    Returns:
        (tokens, f * o), and (tiles, top_k, c, f, TILE), unset in tiles without tokens. Sums in float32.
    """
    (_, c, f, a), o = first.shape, second.shape[2]
    tokens, (top_k, places) = x.shape[0], sets.choice.shape
    tiles, wide = sets.tile.shape[0], joined(top_k, f)
    z, y = x.new_empty(tiles, top_k, c, f, TILE), x.new_empty(tokens, f * o)
    _first[(tiles * c,)](
        x, first, z, sets.token, sets.tile, tokens, c, a, f, top_k, block(a), block(f), wide, TILE,
        num_warps=_warps(wide, TILE),
    )  # fmt: skip
    wide = joined(top_k, c)
    _second[(tiles * f,)](
        z, second, gate, y, sets.token, sets.choice, sets.tile, tokens, places, c, f, o, top_k, block(c), block(o),
        wide, TILE, num_warps=_warps(TILE, block(o)),
    )  # fmt: skip
    return y, z


def backward_second(dy: Tensor, second: Tensor, gate: Tensor, z: Tensor, sets: Sets) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what lies between, of the second factor, and of the gates, for that of the result.

    Returns:
        As ``z``, as ``second``, and (tiles, f, top_k, TILE) float32: what each digit contributes to that of a gate;
        unset in tiles without tokens.
    """
    _, f, o, c = second.shape
    tokens, (top_k, places), units = dy.shape[0], sets.choice.shape, sets.unit.shape[0]
    dz, wide = torch.empty_like(z), joined(top_k, c)
    dgate = torch.empty(z.shape[0], f, top_k, TILE, device=dy.device, dtype=torch.float32)
    parts = torch.empty(units * top_k, f * o * c, device=dy.device, dtype=torch.float32)
    _second_backward[(units * f,)](
        dy, z, second, gate, dz, dgate, parts, sets.token, sets.choice, sets.unit, sets.first, sets.tiles, tokens,
        places, c, f, o, top_k, block(c), block(o), wide, TILE, PART, num_warps=_warps(wide, block(o)), **LOOP,
    )  # fmt: skip
    return dz, _added(parts, sets.unit, second), dgate


def backward_first(
    dz: Tensor, x: Tensor, first: Tensor, sets: Sets, dlogits: Tensor | None = None, router: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, first factor and router, for that of what lies between, and of the router's logits.

    Args:
        dz: as `forward` has ``z``.
        x: (tokens, c * a).
        first: (experts, c, f, a).
        sets: of the experts chosen.
        dlogits: (tokens, experts), float32, or None for tokens that no router of this layer sent.
        router: its weight, (experts, c * a), of the dtype of ``x``.

    Returns:
        As ``x``, with what comes through the router; as ``first``; as ``router``, or None.
    """
    experts, c, f, a = first.shape
    tokens, (units, top_k) = x.shape[0], sets.unit.shape
    dx, wide = torch.empty_like(x), joined(top_k, f)
    logits = 0 if dlogits is None else experts
    parts = torch.empty(units * top_k, c * f * a, device=x.device, dtype=torch.float32)
    of_router = torch.empty(units, logits, c * a, device=x.device, dtype=torch.float32)
    _first_backward[(units * c,)](
        dz, x, first, dz if dlogits is None else dlogits, x if router is None else router, dx, parts, of_router,
        sets.token, sets.unit, sets.first, sets.tiles, tokens, c, a, f, top_k, logits,
        block(a), block(f), block(experts), wide, TILE, PART, num_warps=_warps(wide, block(a)), **LOOP,
    )  # fmt: skip
    return dx, _added(parts, sets.unit, first), None if router is None else of_router.sum(0).to(router.dtype)


def _added(parts: Tensor, unit: Tensor, like: Tensor) -> Tensor:
    """What the units of each expert add up to: (units * top_k, n) -> a new tensor as ``like``, (experts, n) in all."""
    found, n = torch.empty_like(like), parts.shape[1]
    _add_units[(triton.cdiv(n, 1024), like.shape[0])](parts, found, unit, parts.shape[0], n, 1024)
    return found
