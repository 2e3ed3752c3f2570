"""Two steps of a mixture over tiles of tokens that chose the same experts: each token is read once and written once.

The chain of an expert is ``[t, c, a] x [c, f, a] -> [t, c, f]``, then ``[t, c, f] x [f, o, c] -> [t, f, o]``, as for a
BTT matrix of two cores. A tile has the same experts in all rows, so each step is one product with the columns of
all of them; the second adds them up under their gates before anything is stored. What lies between is stored tile by
tile, with the places of the tokens innermost, so that the order of features is free and a program stays within few
pages of memory. Input and output are read and written by token: no sorted copy of either exists. Sums over tokens are
taken by unit and then in order of the units, so results are the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import TILE, Sets, block, joined, power

# how each kernel runs: places at a time, warps, stages of its loop
FIRST, SECOND = (128, 4, 3), (64, 4, 3)
BACKWARD_SECOND, BACKWARD_FIRST = (64, 4, 3), (64, 4, 3)
WIDEST = 64  # digits of experts side by side in a program of `_second_backward`
ADDED = 8  # sums of units that are read at a time


@triton.jit
def _placed(gate_ptr, token_ptr, choice_ptr, out_ptr, tokens, places, TILE_: tl.constexpr):
    p = tl.program_id(0) * TILE_ + tl.arange(0, TILE_)
    there = tl.load(token_ptr + p) < tokens
    at = tl.program_id(1) * places + p
    choice = tl.load(choice_ptr + at, mask=there, other=0)
    tl.store(out_ptr + at, tl.load(gate_ptr + choice, mask=there, other=0.0).to(tl.float32))


@triton.jit
def _slots(unit_ptr, unit, base, DIGIT: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of all experts' columns, ``base`` slots on: its slot, its digit, whether it is one, its expert."""
    row = tl.arange(0, ROWS)
    j, digit = base + row // BLOCK, row % BLOCK
    real = (j < TOP_K) & (digit < DIGIT)
    return j, digit, real, tl.load(unit_ptr + unit * TOP_K + j, mask=real, other=0)


@triton.jit
def _first(
    x_ptr, w_ptr, z_desc, token_ptr, unit_ptr, first_ptr, tiles_ptr, tokens, places,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = ROWS // BLOCK_F
    PARTS: tl.constexpr = TILE_ // PART_
    unit, c = tl.program_id(0) // C, tl.program_id(0) % C
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit)
        t, a = tl.arange(0, PART_), tl.arange(0, BLOCK_A)
        _, f, real, expert = _slots(unit_ptr, unit, 0, F, TOP_K, BLOCK_F, ROWS)
        w = tl.load(
            w_ptr + ((expert * C + c) * F + f)[:, None] * A + a[None, :],
            mask=real[:, None] & (a < A)[None, :],
            other=0.0,
        )
        token = tl.load(token_ptr + begin * TILE_ + t)
        for part in tl.range(0, tiles * PARTS):
            tile, q = begin + part // PARTS, part % PARTS * PART_
            x = tl.load(
                x_ptr + token.to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :],
                mask=(token < tokens)[:, None] & (a < A)[None, :], other=0.0,
            )  # fmt: skip
            z = tl.dot(w, x.T).to(z_desc.dtype)
            z_desc.store([tile, 0, c, 0, q], z.reshape(1, SLOTS, 1, BLOCK_F, PART_))
            # one step ahead, as a load by what was loaded in the same step would stop the pipeline
            p = tile * TILE_ + q + PART_ + t
            token = tl.load(token_ptr + p, mask=p < places, other=0)


@triton.jit
def _second(
    z_desc, w_ptr, gate_ptr, y_ptr, token_ptr, unit_ptr, first_ptr, tiles_ptr, tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = ROWS // BLOCK_C
    PARTS: tl.constexpr = TILE_ // PART_
    unit, f = tl.program_id(0) // F, tl.program_id(0) % F
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit)
        t, slot, o = tl.arange(0, PART_), tl.arange(0, SLOTS), tl.arange(0, BLOCK_O)
        _, c, real, expert = _slots(unit_ptr, unit, 0, C, TOP_K, BLOCK_C, ROWS)
        w = tl.load(
            w_ptr + ((expert * F + f)[None, :] * O + o[:, None]) * C + c[None, :],
            mask=real[None, :] & (o < O)[:, None],
            other=0.0,
        )
        for part in tl.range(0, tiles * PARTS):
            tile, q = begin + part // PARTS, part % PARTS * PART_
            p = tile * TILE_ + q + t
            token = tl.load(token_ptr + p)
            gate = tl.load(gate_ptr + slot[None, :] * places + p[:, None], mask=(slot < TOP_K)[None, :], other=0.0)
            z = z_desc.load([tile, 0, 0, f, q]).reshape(ROWS, PART_).T
            apart = tl.reshape(z, [PART_, SLOTS, BLOCK_C]).to(tl.float32) * gate[:, :, None]
            y = tl.dot(tl.reshape(apart, [PART_, ROWS]).to(z.dtype), w.T)
            tl.store(
                y_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :], y.to(y_ptr.dtype.element_ty),
                mask=(token < tokens)[:, None] & (o < O)[None, :],
            )  # fmt: skip


@triton.jit
def _second_backward(
    dy_ptr, z_desc, w_ptr, gate_ptr, dz_desc, dgate_ptr, dw_ptr, token_ptr, unit_ptr, first_ptr, tiles_ptr,
    tokens, places,
    C: tl.constexpr, F: tl.constexpr, O: tl.constexpr, TOP_K: tl.constexpr, SPLIT: tl.constexpr,  # noqa: E741
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = ROWS // BLOCK_C
    PARTS: tl.constexpr = TILE_ // PART_
    # programs of the same rows of dy run next to each other
    base = tl.program_id(0) % SPLIT * SLOTS
    f, unit = tl.program_id(0) // SPLIT % F, tl.program_id(0) // (SPLIT * F)
    tiles = tl.load(tiles_ptr + unit)
    if tiles > 0:
        begin = tl.load(first_ptr + unit)
        t, slot, o = tl.arange(0, PART_), base + tl.arange(0, SLOTS), tl.arange(0, BLOCK_O)
        j, c, real, expert = _slots(unit_ptr, unit, base, C, TOP_K, BLOCK_C, ROWS)
        inside = real[None, :] & (o < O)[:, None]
        w = tl.load(w_ptr + ((expert * F + f)[None, :] * O + o[:, None]) * C + c[None, :], mask=inside, other=0.0)
        acc = tl.zeros((BLOCK_O, ROWS), tl.float32)
        token = tl.load(token_ptr + begin * TILE_ + t)
        for part in tl.range(0, tiles * PARTS):
            tile, q = begin + part // PARTS, part % PARTS * PART_
            p = tile * TILE_ + q + t
            dy = tl.load(
                dy_ptr + token.to(tl.int64)[:, None] * (F * O) + (f * O + o)[None, :],
                mask=(token < tokens)[:, None] & (o < O)[None, :], other=0.0,
            )  # fmt: skip
            gate = tl.load(gate_ptr + slot[None, :] * places + p[:, None], mask=(slot < TOP_K)[None, :], other=0.0)
            z = z_desc.load([tile, base, 0, f, q]).reshape(ROWS, PART_).T
            # joined, so that the compiler lays both out in registers as the product is; sums over c stay in a row
            du, apart = tl.split(tl.join(tl.dot(dy, w), z.to(tl.float32)))
            du, apart = tl.reshape(du, [PART_, SLOTS, BLOCK_C]), tl.reshape(apart, [PART_, SLOTS, BLOCK_C])
            where = (tile.to(tl.int64) * F + f) * (TOP_K * TILE_) + q + slot[None, :] * TILE_ + t[:, None]
            tl.store(dgate_ptr + where, tl.sum(du * apart, 2), mask=(slot < TOP_K)[None, :])
            dz = tl.reshape(du * gate[:, :, None], [PART_, ROWS]).to(dz_desc.dtype)
            dz_desc.store([tile, base, 0, f, q], dz.T.reshape(1, SLOTS, BLOCK_C, 1, PART_))
            gated = tl.reshape(apart * gate[:, :, None], [PART_, ROWS]).to(z.dtype)
            acc = tl.dot(dy.T, gated, acc)
            # one step ahead, as a load by what was loaded in the same step would stop the pipeline
            token = tl.load(token_ptr + p + PART_, mask=p + PART_ < places, other=0)
        out = ((unit * TOP_K + j) * F + f).to(tl.int64)[None, :] * (O * C) + c[None, :]
        tl.store(dw_ptr + out + o[:, None] * C, acc, mask=inside)


@triton.jit
def _first_backward(
    dz_desc, x_ptr, w_ptr, dlogits_ptr, router_ptr, dx_ptr, dw_ptr, drouter_ptr,
    token_ptr, unit_ptr, first_ptr, tiles_ptr, tokens, places,
    C: tl.constexpr, A: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    TILE_: tl.constexpr, PART_: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = TILE_ // PART_
    c, unit = tl.program_id(0) % C, tl.program_id(0) // C
    tiles = tl.load(tiles_ptr + unit)
    a, e = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_E)
    of_router = (e < EXPERTS)[:, None] & (a < A)[None, :]
    router_acc = tl.zeros((BLOCK_E, BLOCK_A), tl.float32)
    if tiles > 0:
        begin, t = tl.load(first_ptr + unit), tl.arange(0, PART_)
        j, f, real, expert = _slots(unit_ptr, unit, 0, F, TOP_K, BLOCK_F, ROWS)
        inside = real[:, None] & (a < A)[None, :]
        w = tl.load(w_ptr + ((expert * C + c) * F + f)[:, None] * A + a[None, :], mask=inside, other=0.0)
        if EXPERTS:
            router = tl.load(router_ptr + e[:, None] * (C * A) + (c * A + a)[None, :], mask=of_router, other=0.0)
        acc = tl.zeros((ROWS, BLOCK_A), tl.float32)
        token = tl.load(token_ptr + begin * TILE_ + t)
        for part in tl.range(0, tiles * PARTS):
            tile, q = begin + part // PARTS, part % PARTS * PART_
            mask = (token < tokens)[:, None] & (a < A)[None, :]
            there = token.to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :]
            dz = dz_desc.load([tile, 0, c, 0, q]).reshape(ROWS, PART_)
            x = tl.load(x_ptr + there, mask=mask, other=0.0)
            acc = tl.dot(dz, x, acc)  # first, as the compiler lets no other product run beside it later
            dx = tl.dot(dz.T, w)
            if EXPERTS:
                # read in both orders, as no load that two products want in different layouts is pipelined
                logit = (token < tokens)[:, None] & (e < EXPERTS)[None, :]
                at = dlogits_ptr + token.to(tl.int64)[:, None] * EXPERTS + e[None, :]
                dx = tl.dot(tl.load(at, mask=logit, other=0.0).to(x.dtype), router, dx)
                logit = (e < EXPERTS)[:, None] & (token < tokens)[None, :]
                at = dlogits_ptr + token.to(tl.int64)[None, :] * EXPERTS + e[:, None]
                router_acc = tl.dot(tl.load(at, mask=logit, other=0.0).to(x.dtype), x, router_acc)
            tl.store(dx_ptr + there, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            # one step ahead, as a load by what was loaded in the same step would stop the pipeline
            p = tile * TILE_ + q + PART_ + t
            token = tl.load(token_ptr + p, mask=p < places, other=0)
        out = (((unit * TOP_K + j) * C + c) * F + f).to(tl.int64)[:, None] * A + a[None, :]
        tl.store(dw_ptr + out, acc, mask=inside)
    if EXPERTS:
        to = (unit * EXPERTS + e).to(tl.int64)[:, None] * (C * A) + (c * A + a)[None, :]
        tl.store(drouter_ptr + to, router_acc, mask=of_router)


@triton.jit
def _owned(unit_ptr, owned_ptr, count_ptr, parts, PARTS: tl.constexpr):
    expert, part = tl.program_id(0), tl.arange(0, PARTS)
    ours = (tl.load(unit_ptr + part, mask=part < parts, other=-1) == expert).to(tl.int32)
    tl.store(owned_ptr + expert * PARTS + tl.cumsum(ours, 0) - 1, part, mask=ours > 0)
    tl.store(count_ptr + expert, tl.sum(ours))


@triton.jit
def _add_units(
    parts_ptr, out_ptr, owned_ptr, count_ptr, n, PARTS: tl.constexpr, BLOCK: tl.constexpr, ADDED_: tl.constexpr
):
    expert = tl.program_id(1)
    i, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ADDED_)
    count = tl.load(count_ptr + expert)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, ADDED_):
        part = tl.load(owned_ptr + expert * PARTS + first + k, mask=first + k < count, other=0).to(tl.int64)
        there = (first + k < count)[:, None] & (i < n)[None, :]
        acc += tl.sum(tl.load(parts_ptr + part[:, None] * n + i[None, :], mask=there, other=0.0), 0)
    tl.store(out_ptr + expert.to(tl.int64) * n + i, acc.to(out_ptr.dtype.element_ty), mask=i < n)


def _slice(z: Tensor, slots: int, c: int, f: int, part: int) -> TensorDescriptor:
    return TensorDescriptor(z, z.shape, z.stride(), [1, slots, c, f, part])


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
    z = forward_first(x, first, sets)
    return forward_second(z, second, by_place(gate, sets), sets), z


def by_place(gate: Tensor, sets: Sets) -> Tensor:
    """``gate`` (tokens, top_k) in the order of `Sets.choice`: (top_k, places), float32, zero where no token is."""
    top_k, places = sets.choice.shape
    found = torch.empty(top_k, places, device=gate.device, dtype=torch.float32)
    _placed[(places // TILE, top_k)](gate, sets.token, sets.choice, found, gate.shape[0], places, TILE, num_warps=4)
    return found


def forward_first(x: Tensor, first: Tensor, sets: Sets) -> Tensor:
    """What lies between both steps, as `forward` has it."""
    _, c, f, a = first.shape
    tiles, top_k = sets.tile.shape
    z, wide, (part, warps, stages) = x.new_empty(tiles, top_k, c, f, TILE), joined(top_k, f), FIRST
    _first[(sets.unit.shape[0] * c,)](
        x, first, _slice(z, wide // block(f), 1, block(f), part), sets.token, sets.unit, sets.first, sets.tiles,
        x.shape[0], tiles * TILE, c, a, f, top_k, block(a), block(f), wide, TILE, part,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z


def forward_second(z: Tensor, second: Tensor, gate: Tensor, sets: Sets) -> Tensor:
    """The mixture, (tokens, f * o), of what lies between and gates `by_place`."""
    _, f, o, c = second.shape
    (tiles, top_k), tokens = sets.tile.shape, sets.place.shape[0]
    y, wide, (part, warps, stages) = z.new_empty(tokens, f * o), joined(top_k, c), SECOND
    _second[(sets.unit.shape[0] * f,)](
        _slice(z, wide // block(c), block(c), 1, part), second, gate, y, sets.token, sets.unit, sets.first, sets.tiles,
        tokens, tiles * TILE, c, f, o, top_k, block(c), block(o), wide, TILE, part,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def backward_second(dy: Tensor, second: Tensor, gate: Tensor, z: Tensor, sets: Sets) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what lies between, of the second factor, and of the gates, for that of the result.

    Returns:
        As ``z``, as ``second``, and (tiles, f, top_k, TILE) float32: what each digit contributes to that of a gate;
        unset in tiles without tokens.
    """
    _, f, o, c = second.shape
    tokens, (top_k, places), units = dy.shape[0], sets.choice.shape, sets.unit.shape[0]
    dz, (part, warps, stages) = torch.empty_like(z), BACKWARD_SECOND
    dgate = torch.empty(z.shape[0], f, top_k, TILE, device=dy.device, dtype=torch.float32)
    parts = torch.empty(units * top_k, f * o * c, device=dy.device, dtype=torch.float32)
    every = joined(top_k, c)
    wide = max(min(every, WIDEST), block(c))
    there, made = (_slice(tensor, wide // block(c), block(c), 1, part) for tensor in (z, dz))
    _second_backward[(units * f * (every // wide),)](
        dy, there, second, by_place(gate, sets), made, dgate, parts, sets.token, sets.unit, sets.first, sets.tiles,
        tokens, places, c, f, o, top_k, every // wide, block(c), block(o), wide, TILE, part,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dz, added(parts, sets.unit, second), dgate


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
    tokens, (units, top_k), places = x.shape[0], sets.unit.shape, sets.choice.shape[1]
    dx, wide, (part, warps, stages) = torch.empty_like(x), joined(top_k, f), BACKWARD_FIRST
    logits = 0 if dlogits is None else experts
    parts = torch.empty(units * top_k, c * f * a, device=x.device, dtype=torch.float32)
    of_router = torch.empty(units, logits, c * a, device=x.device, dtype=torch.float32)
    _first_backward[(units * c,)](
        _slice(dz, wide // block(f), 1, block(f), part), x, first, x if dlogits is None else dlogits,
        x if router is None else router, dx, parts, of_router, sets.token, sets.unit, sets.first, sets.tiles, tokens,
        places, c, a, f, top_k, logits, block(a), block(f), block(experts), wide, TILE, part,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx, added(parts, sets.unit, first), None if router is None else of_router.sum(0).to(router.dtype)


def added(parts: Tensor, unit: Tensor, like: Tensor) -> Tensor:
    """What the units of each expert add up to: (units * top_k, n) -> a new tensor as ``like``, (experts, n) in all."""
    found, n, experts, size = torch.empty_like(like), parts.shape[1], like.shape[0], power(unit.numel())
    owned = torch.empty(experts, size, device=unit.device, dtype=torch.int32)
    count = torch.empty(experts, device=unit.device, dtype=torch.int32)
    _owned[(experts,)](unit, owned, count, unit.numel(), size, num_warps=1)
    _add_units[(triton.cdiv(n, 512), experts)](parts, found, owned, count, n, size, 512, ADDED, num_warps=4)
    return found
