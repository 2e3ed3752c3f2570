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
    dy_desc, x_desc, z_desc, dw, du, table, share,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = K // BLOCK_K
    tiles: tl.constexpr = N // BLOCK_N
    sparse: tl.constexpr = SLOTS * columns
    every: tl.constexpr = sparse + (RANK + BLOCK_K - 1) // BLOCK_K
    groups: tl.constexpr = (every + GROUP - 1) // GROUP
    part = tl.program_id(0) // (ROWS * tiles * groups)
    row = tl.program_id(0) // (tiles * groups) % ROWS
    n = row * N + tl.program_id(0) // groups % tiles * BLOCK_N
    first = tl.program_id(0) % groups * GROUP
    # descriptors and places that are read, of up to four products with the same gradient; what is beyond the last one
    # is worked out once more and not stored
    a_desc, a_at, a_to = _side(x_desc, z_desc, table, row, first, SLOTS, K, RANK, BLOCK_K)
    b_desc, b_at, b_to = _side(x_desc, z_desc, table, row, min(first + 1, every - 1), SLOTS, K, RANK, BLOCK_K)
    c_desc, c_at, c_to = _side(x_desc, z_desc, table, row, min(first + 2, every - 1), SLOTS, K, RANK, BLOCK_K)
    d_desc, d_at, d_to = _side(x_desc, z_desc, table, row, min(first + 3, every - 1), SLOTS, K, RANK, BLOCK_K)
    a_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b_acc, c_acc, d_acc = a_acc, a_acc, a_acc
    for t in tl.range(part * share, (part + 1) * share, BLOCK_T):
        dy = dy_desc.load([t, n]).T
        a_acc = tl.dot(dy, a_desc.load([t, a_at]), a_acc)
        if GROUP > 1:
            b_acc = tl.dot(dy, b_desc.load([t, b_at]), b_acc)
        if GROUP > 2:
            c_acc = tl.dot(dy, c_desc.load([t, c_at]), c_acc)
            d_acc = tl.dot(dy, d_desc.load([t, d_at]), d_acc)
    to = part * ROWS * N + n + tl.arange(0, BLOCK_N)
    _store(dw, du, to, first, a_to, a_acc, SLOTS * K, RANK, sparse, every)
    if GROUP > 1:
        _store(dw, du, to, first + 1, b_to, b_acc, SLOTS * K, RANK, sparse, every)
    if GROUP > 2:
        _store(dw, du, to, first + 2, c_to, c_acc, SLOTS * K, RANK, sparse, every)
        _store(dw, du, to, first + 3, d_to, d_acc, SLOTS * K, RANK, sparse, every)


@triton.jit
def _side(
    x_desc, z_desc, table, row, index,
    SLOTS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a product: the descriptor of its operand, the place there, and where its result goes."""
    columns: tl.constexpr = K // BLOCK_K
    slot = tl.minimum(index // columns, SLOTS - 1)
    block = (tl.load(table + 2 * row + slot // 4) >> (slot % 4 * 16)).to(tl.int32) % 4096
    desc, at, to = x_desc, block * K + index % columns * BLOCK_K, slot * K + index % columns * BLOCK_K
    if RANK:
        if index >= SLOTS * columns:
            desc = z_desc
        beyond = (index - SLOTS * columns) * BLOCK_K
        at, to = tl.where(index < SLOTS * columns, at, beyond), tl.where(index < SLOTS * columns, to, beyond)
    return desc, at, to


@triton.jit
def _store(
    dw, du, rows, index, column, acc,
    WIDTH: tl.constexpr, RANK: tl.constexpr, SPARSE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    # not by descriptors: each of these stores would keep shared memory of its own
    columns = column + tl.arange(0, acc.shape[1])
    if index < SPARSE:
        tl.store(dw + rows.to(tl.int64)[:, None] * WIDTH + columns, acc.to(dw.dtype.element_ty))
    elif index < EVERY:
        at = du + rows.to(tl.int64)[:, None] * RANK + columns
        tl.store(at, acc.to(du.dtype.element_ty), mask=(columns < RANK)[None, :])


@triton.jit
def _total(parts, total, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        found += tl.load(parts + part * count + at, mask=at < count)
    tl.store(total + at, found, mask=at < count)


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


def gradient_of_blocks(
    x: Tensor, dy: Tensor, table: tuple[tuple[int, ...], ...], pair: Tensor | None = None, parts: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """``dw[r, :, s, :] = dy[:, r, :]^T x[:, table[r][s], :]``: a new tensor (rows, n, slots, k).

    ``x`` is (tokens, blocks, k), ``dy`` (tokens, rows, n); as `sum_of_blocks` wants them. With ``pair``, z (tokens,
    rank) with a rank that is a multiple of 8, also ``dy^T z`` in the same pass, (rows * n, rank). Tokens are split into
    ``parts``, by default as many as fill the device, whose sums in float32 are added up.
    """
    tokens, _, k = x.shape
    rows, n, slots = len(table), dy.shape[2], len(table[0])
    rank = 0 if pair is None else pair.shape[1]
    tall, wide = min(128, n & -n), min(256, k & -k)
    every = slots * (k // wide) + -(-rank // wide)
    group = min(256 // wide, 1 << (every - 1).bit_length())
    programs = rows * (n // tall) * -(-every // group)
    # tokens are split where there would be too few programs, into parts that fill one wave of them
    parts = parts or max(1, min(_programs(x.device) // programs, tokens // 512))
    share = -(-tokens // (64 * parts)) * 64
    kept = x.dtype if parts == 1 else torch.float32
    dw = x.new_empty(parts, rows * n, slots * k, dtype=kept)
    du = None if pair is None else x.new_empty(parts, rows * n, rank, dtype=kept)
    read = _tiles(x, 1, [64, wide])
    _gradient_of_blocks[(programs * parts,)](
        _tiles(dy, 1, [64, tall]), read, read if pair is None else _tiles(pair, 1, [64, wide]),
        dw, dw if du is None else du, _packed(table, x.device), share,
        rows, slots, n, k, rank, group, tall, wide, 64, num_warps=8 if group * wide == 256 else 4, num_stages=3,
    )  # fmt: skip
    return _summed(dw, x.dtype).view(rows, n, slots, k), None if du is None else _summed(du, x.dtype)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in ``dtype``."""
    if parts.shape[0] == 1:
        return parts[0]
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    count = total.numel()
    _total[(-(-count // 1024),)](parts, total, count, parts.shape[0], 1024)
    return total
