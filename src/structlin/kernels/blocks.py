"""Products with a block-sparse matrix whose blocks stand in a static table, without copying a block of the input.

The matrix has `rows` rows of blocks with `slots` blocks each, ``w`` is (rows, n, slots, k), and a table says which
block of the input each slot reads. One GEMM sums over all slots of a row: the loop over its inner dimension takes the
address of the next block from the table. The table travels as 16 bits for each entry, four in a word, because a load
inside the loop would stop the pipeline; so a row may have 8 entries of numbers below 4096.

A second product of plain matrices may follow: its inner dimension continues that of the blocks, so both sum in the same
registers and the result is written once. The loop selects which pair of operands it reads by address; a second loop or
a branch around the loads would stop the pipeline too.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .across import _programs

MOST_ENTRIES, MOST_BLOCKS, MOST_SLOTS = 8, 4096, 8


@triton.jit
def _sum_of_blocks(
    x_desc, w_desc, z_desc, u_desc, y_desc, y_ptr, table, tokens, programs,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    chunks: tl.constexpr = K // BLOCK_K
    sparse: tl.constexpr = ENTRIES * chunks
    paired: tl.constexpr = (RANK + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(tokens, BLOCK_T) * ROWS * columns
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        t = tile // (ROWS * columns) * BLOCK_T
        row = tile % (ROWS * columns) // columns
        n = tile % columns * BLOCK_N
        first, second = tl.load(table + 2 * row), tl.load(table + 2 * row + 1)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for j in tl.range(0, sparse + paired):
            entry = j // chunks
            found = (tl.where(entry < 4, first, second) >> (entry % 4 * 16)).to(tl.int32) & 65535
            a_desc, b_desc = x_desc, w_desc
            at = found % 4096 * K + j % chunks * BLOCK_K
            across = found // 4096 * N + n if TRANSPOSED else j * BLOCK_K
            if paired:
                if j >= sparse:
                    a_desc, b_desc = z_desc, u_desc
                beyond = (j - sparse) * BLOCK_K
                at = tl.where(j < sparse, at, beyond)
                across = tl.where(j < sparse, across, row * N + n if TRANSPOSED else beyond)
            a = a_desc.load([t, at])
            if TRANSPOSED:
                acc = tl.dot(a, b_desc.load([at, across]), acc)
            else:
                acc = tl.dot(a, b_desc.load([row * N + n, across]).T, acc)
        if ADD:
            token = (t + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
            there = y_ptr + token * (ROWS * N) + (row * N + n + tl.arange(0, BLOCK_N))[None, :]
            acc += tl.load(there, mask=token < tokens).to(tl.float32)
        y_desc.store([t, row * N + n], acc.to(y_desc.dtype))


@triton.jit
def _gradient_of_blocks(
    dy_desc, x_desc, dw_desc, table, tokens,
    SLOTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # the blocks of one row run next to each other, so that its gradient is still in the L2 cache
    row = tl.program_id(0) // (tiles * SLOTS * columns)
    n = tl.program_id(0) // (SLOTS * columns) % tiles * BLOCK_N
    slot = tl.program_id(0) // columns % SLOTS
    k = tl.program_id(0) % columns * BLOCK_K
    block = (tl.load(table + 2 * row + slot // 4) >> (slot % 4 * 16)).to(tl.int32) % 4096
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for t in tl.range(0, tokens, BLOCK_T):
        acc = tl.dot(dy_desc.load([t, row * N + n]).T, x_desc.load([t, block * K + k]), acc)
    dw_desc.store([row * N + n, slot * K + k], acc.to(dw_desc.dtype))


def fits(rows: int, blocks: int, slots: int, uses: int, n: int, k: int) -> bool:
    """Whether the kernels take a table of these sizes, and blocks of n x k large enough to fill a tile."""
    return max(rows, blocks) <= MOST_BLOCKS and max(slots, uses) <= MOST_ENTRIES and not (n % 64 or k % 64)


@cache
def _packed(table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """(rows, 2) words of four entries of 16 bits: block numbers, with the slot of the weight above 12 bits if given."""
    words = [[sum(entry << 16 * i for i, entry in enumerate(row[at : at + 4])) for at in (0, 4)] for row in table]
    signed = [[word - (word >> 63 << 64) for word in row] for row in words]
    with torch.inference_mode(False):
        return torch.tensor(signed, dtype=torch.int64, device=device)


def _tile(outer: int, adds: bool) -> tuple[int, int, int, int]:
    """Tokens, features, warps and stages of a tile."""
    # what is added passes through shared memory, and there is room for it beside smaller tiles only
    rows, columns, warps, stages = (128, 256, 8, 3) if outer % 256 == 0 and not adds else (128, 128, 4, 4)
    return rows, min(columns, outer & -outer), warps, stages


def sum_of_blocks(
    x: Tensor,
    w: Tensor,
    table: tuple[tuple[int, ...], ...],
    transposed: bool,
    into: Tensor | None = None,
    pair: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``y[t, r, :] = sum over s of x[t, table[r][s], :] w[r, :, s, :]^T``, (tokens, rows, n), new or added to one.

    With ``transposed`` the adjoint: ``table`` then lists the uses of each block of the result, row + 4096 * slot, and
    ``y[t, b, :] = sum over uses of x[t, row, :] w[row, :, slot, :]``.

    The product of the pair ``pair`` is added in the same pass: of z (tokens, rank) with the transpose of
    (rows * n, rank), or, with ``transposed``, with (rank, blocks * k). The rank is a multiple of 8.

    ``x`` is (tokens, blocks, width), ``w`` (rows, n, slots, k); all contiguous, of one half precision, on a device of
    compute capability 9 or more, starting at 16 bytes; sizes as `fits` says. Sums in float32.
    """
    tokens, _, inner = x.shape
    outer = w.shape[3] if transposed else w.shape[1]
    y = x.new_empty(tokens, len(table), outer) if into is None else into.view(tokens, len(table), outer)
    rows, columns, warps, stages = _tile(outer, into is not None)
    a_block, b_block = [rows, 64], [64, columns] if transposed else [columns, 64]
    operands = _tiles(x, 1, a_block), _tiles(w, 2, b_block)
    beside = operands if pair is None else (_tiles(pair[0], 1, a_block), _tiles(pair[1], 1, b_block))
    _sum_of_blocks[(_programs(x.device),)](
        *operands, *beside, _tiles(y, 1, [rows, columns]), y,
        _packed(table, x.device), tokens, _programs(x.device),
        len(table), len(table[0]), outer, inner, 0 if pair is None else pair[0].shape[1],
        transposed, into is not None, rows, columns, 64,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _tiles(x: Tensor, rows: int, block: list[int]) -> TensorDescriptor:
    """Tiles of a contiguous tensor read as a matrix, the first ``rows`` axes as its rows."""
    shape = [prod(x.shape[:rows]), prod(x.shape[rows:])]
    return TensorDescriptor(x, shape, [shape[1], 1], block)


def gradient_of_blocks(x: Tensor, dy: Tensor, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """``dw[r, :, s, :] = dy[:, r, :]^T x[:, table[r][s], :]``: a new tensor (rows, n, slots, k).

    ``x`` is (tokens, blocks, k), ``dy`` (tokens, rows, n); as `sum_of_blocks` wants them.
    """
    tokens, _, k = x.shape
    n, slots = dy.shape[2], len(table[0])
    dw = x.new_empty(len(table), n, slots, k)
    rows, columns = min(128, n & -n), min(256, k & -k)
    grid = (len(table) * (n // rows) * slots * (k // columns),)
    _gradient_of_blocks[grid](
        _tiles(dy, 1, [64, rows]), _tiles(x, 1, [64, columns]), _tiles(dw, 2, [rows, columns]),
        _packed(table, x.device), tokens, slots, n, k, rows, columns, 64,
        num_warps=8 if columns == 256 else 4, num_stages=3,
    )  # fmt: skip
    return dw
