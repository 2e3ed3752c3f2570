"""The router of a mixture in one pass over the tokens, and the gradient of its logits in one pass over the gates.

A logit is an inner product of a token and a row of the router's weight. The experts of the ``top_k`` largest, with a
bias if there is one, are chosen, and the softmax over their logits is the gate. A logit that is not a number counts as
the largest, so that the gate of its token is not a number either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE, Sets, block, power

TOKENS = 64  # of a program
WIDTH = 128  # features of a step


@triton.jit
def _route(
    x_ptr, w_ptr, bias_ptr, logits_ptr, gate_ptr, chosen_ptr, tokens, width,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_E: tl.constexpr, SLOTS: tl.constexpr, TOKENS_: tl.constexpr, WIDTH_: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS_ + tl.arange(0, TOKENS_)
    e, slot = tl.arange(0, BLOCK_E), tl.arange(0, SLOTS)
    logits = tl.zeros((TOKENS_, BLOCK_E), tl.float32)
    for start in tl.range(0, width, WIDTH_):
        k = start + tl.arange(0, WIDTH_)
        x = tl.load(
            x_ptr + t.to(tl.int64)[:, None] * width + k[None, :],
            mask=(t < tokens)[:, None] & (k < width)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + e[:, None] * width + k[None, :], mask=(e < EXPERTS)[:, None] & (k < width)[None, :], other=0.0
        )
        logits = tl.dot(x, tl.trans(w), logits)
    there = (t < tokens)[:, None]
    tl.store(logits_ptr + t[:, None] * EXPERTS + e[None, :], logits, mask=there & (e < EXPERTS)[None, :])
    score = logits
    if BIASED:
        score += tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0)[None, :]
    # one that is no number is the largest, the smallest is above what is taken or beyond the experts
    score = tl.where(score == score, tl.minimum(tl.maximum(score, -3e38), 3e38), 3e38)
    score = tl.where((e < EXPERTS)[None, :], score, float("-inf"))
    picked = tl.zeros((TOKENS_, SLOTS), tl.float32) + float("-inf")
    experts = tl.zeros((TOKENS_, SLOTS), tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.argmax(score, 1)
        ours = e[None, :] == best[:, None]
        value = tl.sum(tl.where(ours, logits, 0.0), 1)
        score = tl.where(ours, float("-inf"), score)
        picked = tl.where((slot == j)[None, :], value[:, None], picked)
        experts = tl.where((slot == j)[None, :], best[:, None], experts)
    gate = tl.exp(picked - tl.max(picked, 1)[:, None])
    gate = tl.where((slot < TOP_K)[None, :], gate, 0.0)
    gate /= tl.sum(gate, 1)[:, None]
    at, mask = t[:, None] * TOP_K + slot[None, :], there & (slot < TOP_K)[None, :]
    tl.store(gate_ptr + at, gate, mask=mask)
    tl.store(chosen_ptr + at, experts.to(tl.int64), mask=mask)


@triton.jit
def _unroute(
    parts_ptr, dgate_ptr, dlogits_ptr, gate_ptr, out_ptr, token_ptr, choice_ptr, tile_ptr, tokens, places, digits,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, LOST: tl.constexpr,
    BLOCK_E: tl.constexpr, SLOTS: tl.constexpr, TILE_: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tl.load(tile_ptr + tile * TOP_K) >= 0:
        q = tl.arange(0, TILE_)
        p = tile * TILE_ + q
        token = tl.load(token_ptr + p)
        e, slot = tl.arange(0, BLOCK_E), tl.arange(0, SLOTS)
        there = (token < tokens)[:, None] & (slot < TOP_K)[None, :]
        dgate = tl.zeros((TILE_, SLOTS), tl.float32)
        parts_ptr += tile.to(tl.int64) * (digits * TOP_K * TILE_)
        for f in tl.range(0, digits):
            dgate += tl.load(parts_ptr + (f * TOP_K + slot)[None, :] * TILE_ + q[:, None], mask=there, other=0.0)
        choice = tl.load(choice_ptr + slot[None, :] * places + p[:, None], mask=there, other=0)
        gate = tl.load(gate_ptr + choice, mask=there, other=0.0)
        if GATED:
            dgate += tl.load(dgate_ptr + choice, mask=there, other=0.0)
        through = gate * (dgate - tl.sum(gate * dgate, 1)[:, None])
        logit = (token < tokens)[:, None] & (e < EXPERTS)[None, :]
        at = token.to(tl.int64)[:, None] * EXPERTS + e[None, :]
        found = tl.zeros((TILE_, BLOCK_E), tl.float32)
        if LOST:
            found += tl.load(dlogits_ptr + at, mask=logit, other=0.0)
        for j in tl.static_range(TOP_K):
            expert = tl.load(tile_ptr + tile * TOP_K + j)
            mine = tl.sum(tl.where((slot == j)[None, :], through, 0.0), 1)
            found += tl.where((e == expert)[None, :], mine[:, None], 0.0)
        tl.store(out_ptr + at, found, mask=logit)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gates and experts of tokens.

    Args:
        x: (tokens, width), half precision, contiguous.
        weight: (experts, width), alike.
        bias: (experts,), float32, added to what is chosen by, or None.
        top_k: experts of a token.

    Returns:
        (tokens, experts) and (tokens, top_k) float32, (tokens, top_k) int64.
    """
    (tokens, width), experts = x.shape, weight.shape[0]
    logits = torch.empty(tokens, experts, device=x.device, dtype=torch.float32)
    gate = torch.empty(tokens, top_k, device=x.device, dtype=torch.float32)
    chosen = torch.empty(tokens, top_k, device=x.device, dtype=torch.int64)
    _route[(triton.cdiv(tokens, TOKENS),)](
        x, weight, weight if bias is None else bias, logits, gate, chosen, tokens, width, experts, top_k,
        bias is not None, block(experts), power(top_k), TOKENS, WIDTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    return logits, gate, chosen


def unroute(
    parts: Tensor, dgate: Tensor | None, dlogits: Tensor | None, gate: Tensor, experts: int, sets: Sets
) -> Tensor:
    """Gradient of the logits: that of losses on them, and what comes through the gates.

    Args:
        parts: (tiles, digits, top_k, TILE), float32, which add up to the gradient of the gates.
        dgate: (tokens, top_k), float32, what other layers add to it, or None.
        dlogits: (tokens, experts), float32, that of losses, or None.
        gate: (tokens, top_k), float32.
        experts: their number.
        sets: of the experts chosen.

    Returns:
        (tokens, experts), float32.
    """
    (tokens, top_k), (tiles, _) = gate.shape, sets.tile.shape
    found = torch.empty(tokens, experts, device=gate.device, dtype=torch.float32)
    _unroute[(tiles,)](
        parts, gate if dgate is None else dgate, gate if dlogits is None else dlogits, gate, found, sets.token,
        sets.choice, sets.tile, tokens, tiles * TILE, parts.shape[1], experts, top_k, dgate is not None,
        dlogits is not None, block(experts), power(top_k), TILE, num_warps=4,
    )  # fmt: skip
    return found
