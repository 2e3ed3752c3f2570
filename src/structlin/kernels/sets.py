"""Tokens sorted by the set of experts that they chose, by a counting sort on the device: fills the tables of `Sets`.

The host never asks for a count, and sorting is stable, so the same choices give the same tables.
"""

from __future__ import annotations

from math import comb

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BLOCK, TILE, UNIT, Sets, limits, power

COUNTED = 8192  # counts of blocks and sets that are read at a time


@triton.jit
def _rank(chosen_ptr, t, tokens, TOP_K: tl.constexpr):
    """The number of each token's set, counting sets in colexicographic order."""
    rank = tl.zeros_like(t)
    for j in tl.static_range(TOP_K):
        mine = tl.load(chosen_ptr + t * TOP_K + j, mask=t < tokens, other=0).to(tl.int32)
        below = _slot(chosen_ptr, t, mine, tokens, TOP_K)
        term = mine
        for i in tl.static_range(1, TOP_K):
            term = tl.where(i <= below, term * (mine - i) // (i + 1), term)
        rank += term
    return rank


@triton.jit
def _slot(chosen_ptr, t, mine, tokens, TOP_K: tl.constexpr):
    """How many experts of the token come before this one."""
    below = tl.zeros_like(t)
    for j in tl.static_range(TOP_K):
        other = tl.load(chosen_ptr + t * TOP_K + j, mask=t < tokens, other=0).to(tl.int32)
        below += (other < mine).to(tl.int32)
    return below


@triton.jit
def _count(chosen_ptr, counts_ptr, tokens, TOP_K: tl.constexpr, SETS: tl.constexpr, BLOCK_: tl.constexpr):
    t = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    every = tl.arange(0, SETS)
    rank = _rank(chosen_ptr, t, tokens, TOP_K)
    ours = (rank[:, None] == every[None, :]) & (t < tokens)[:, None]
    tl.store(counts_ptr + tl.program_id(0) * SETS + every, tl.sum(ours.to(tl.int32), 0))


@triton.jit
def _start(
    counts_ptr, table_ptr, first_ptr, tiles_ptr, blocks, units,
    SETS: tl.constexpr, ROWS: tl.constexpr, TILE_: tl.constexpr, UNIT_: tl.constexpr,
):  # fmt: skip
    """Counts become the first place of each block and set; the table gets first place and first unit of each set."""
    every, row = tl.arange(0, SETS), tl.arange(0, ROWS)
    total = tl.zeros((SETS,), tl.int32)
    for begin in tl.range(0, blocks, ROWS):
        block = begin + row
        total += tl.sum(tl.load(counts_ptr + block[:, None] * SETS + every, mask=(block < blocks)[:, None], other=0), 0)
    tiles = (total + TILE_ - 1) // TILE_
    start = tl.cumsum(tiles, 0) - tiles
    parts = (tiles + UNIT_ - 1) // UNIT_
    part = tl.cumsum(parts, 0) - parts
    tl.store(table_ptr + every, start * TILE_)
    tl.store(table_ptr + SETS + every, part)
    place = start * TILE_
    for begin in tl.range(0, blocks, ROWS):
        block = begin + row
        at, there = counts_ptr + block[:, None] * SETS + every, (block < blocks)[:, None]
        counts = tl.load(at, mask=there, other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + place[None, :], mask=there)
        place += tl.sum(counts, 0)
    for begin in tl.range(0, units, ROWS):
        unit = begin + row
        ours = (unit[:, None] >= part[None, :]) & (unit[:, None] < (part + parts)[None, :])
        skipped = (unit[:, None] - part[None, :]) * UNIT_
        first = tl.sum(tl.where(ours, start[None, :] + skipped, 0), 1)
        left = tl.sum(tl.where(ours, tiles[None, :] - skipped, 0), 1)
        tl.store(first_ptr + unit, first, mask=unit < units)
        tl.store(tiles_ptr + unit, tl.minimum(left, UNIT_), mask=unit < units)


@triton.jit
def _place(
    chosen_ptr, counts_ptr, table_ptr, token_ptr, choice_ptr, place_ptr, tile_ptr, unit_ptr, tokens, places,
    TOP_K: tl.constexpr, SETS: tl.constexpr, BLOCK_: tl.constexpr, TILE_: tl.constexpr, UNIT_: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    every = tl.arange(0, SETS)
    rank = _rank(chosen_ptr, t, tokens, TOP_K)
    there = t < tokens
    ours = ((rank[:, None] == every[None, :]) & there[:, None]).to(tl.int32)
    base = tl.load(counts_ptr + tl.program_id(0) * SETS + every)
    place = tl.sum(ours * (tl.cumsum(ours, 0) - 1 + base[None, :]), 1)
    within = place - tl.load(table_ptr + rank, mask=there, other=0)
    unit = tl.load(table_ptr + SETS + rank, mask=there, other=0) + within // (TILE_ * UNIT_)
    tl.store(token_ptr + place, t, mask=there)
    for j in tl.static_range(TOP_K):
        mine = tl.load(chosen_ptr + t * TOP_K + j, mask=there, other=0).to(tl.int32)
        slot = _slot(chosen_ptr, t, mine, tokens, TOP_K)
        tl.store(choice_ptr + slot * places + place, t * TOP_K + j, mask=there)
        tl.store(place_ptr + t * TOP_K + j, slot * places + place, mask=there)
        tl.store(tile_ptr + place // TILE_ * TOP_K + slot, mine, mask=there & (within % TILE_ == 0))
        tl.store(unit_ptr + unit * TOP_K + slot, mine, mask=there & (within % (TILE_ * UNIT_) == 0))


def group(chosen: Tensor, experts: int) -> Sets:
    """The places of ``chosen`` (tokens, top_k), the experts of each token, int64, all different in a row, below
    ``experts``; sizes as `few_sets` says."""
    tokens, top_k = chosen.shape
    chosen, sets = chosen.contiguous(), power(comb(experts, top_k))
    tiles, units = limits(tokens, experts, top_k)
    blocks, places = triton.cdiv(tokens, BLOCK), tiles * TILE

    def table(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=chosen.device)

    counts, starts = table(blocks, sets), table(2, sets)
    token, tile, unit = table(places).fill_(tokens), table(tiles, top_k).fill_(-1), table(units, top_k).fill_(-1)
    found = Sets(token, table(top_k, places), table(tokens, top_k), tile, table(units), table(units), unit)
    warps = 4 if sets <= 32 else 8
    _count[(blocks,)](chosen, counts, tokens, top_k, sets, BLOCK, num_warps=warps)
    _start[(1,)](
        counts, starts, found.first, found.tiles, blocks, units, sets, max(1, COUNTED // sets), TILE, UNIT,
        num_warps=16,
    )  # fmt: skip
    _place[(blocks,)](
        chosen, counts, starts, found.token, found.choice, found.place, found.tile, found.unit, tokens, places,
        top_k, sets, BLOCK, TILE, UNIT, num_warps=warps,
    )  # fmt: skip
    return found
