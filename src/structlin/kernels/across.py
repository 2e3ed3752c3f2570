"""A grouped GEMM whose store lays the result out for the next step: ``[t, g, k] x [g, (o i), k] -> [o, g, i, t]``.

The first step of Monarch and BTT wants its result ordered by input block, the second by output block. No order of the
features serves both as long as they are innermost. Stored with the tokens innermost every feature is a row of its own,
so exchanging blocks costs nothing: each tile leaves as long rows, and the next GEMM reads its operand transposed,
which it does at full speed. On an H200 this takes what the batched GEMM alone takes, to within a few percent.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _across(
    a_desc, w_desc, c_desc, c_ptr, tokens, programs,
    G: tl.constexpr, K: tl.constexpr, O: tl.constexpr, I: tl.constexpr,  # noqa: E741
    BY_TMA: tl.constexpr, A_LAST: tl.constexpr, K_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = O * I
    rows: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(tokens, BLOCK_T) * rows * G
    # the groups of one tile of tokens run next to each other, so that its rows are still in the L2 cache
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        t = tile // (rows * G) * BLOCK_T
        g = tile % (rows * G) // rows
        n = tile % rows * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            if A_LAST:
                a = a_desc.load([g, k, t]).reshape(BLOCK_K, BLOCK_T)
            else:
                a = a_desc.load([t, g, k]).reshape(BLOCK_T, BLOCK_K).T
            if K_INNER:
                w = w_desc.load([g, n, k]).reshape(BLOCK_N, BLOCK_K)
            else:
                w = w_desc.load([g, k, n]).reshape(BLOCK_K, BLOCK_N).T
            acc = tl.dot(w, a, acc)
        c = acc.to(c_ptr.dtype.element_ty)
        if BY_TMA and BLOCK_N >= I:
            c_desc.store([n // I, g, 0, t], c.reshape(BLOCK_N // I, 1, I, BLOCK_T))
        elif BY_TMA:
            c_desc.store([n // I, g, n % I, t], c.reshape(1, 1, BLOCK_N, BLOCK_T))
        else:
            j = n + tl.arange(0, BLOCK_N)
            at = t + tl.arange(0, BLOCK_T)
            row = ((j // I * G + g) * I + j % I).to(tl.int64) * tokens
            tl.store(c_ptr + row[:, None] + at[None, :], c, (j < N)[:, None] & (at < tokens)[None, :])


def fits(tokens: int, k: int, n: int) -> bool:
    """Whether the kernel takes this size: rows of whole 16 bytes, as the tensor memory accelerator asks."""
    return tokens % 8 == 0 and k % 8 == 0 and n % 8 == 0 and k >= 16


@cache
def _tile(tokens: int, n: int) -> tuple[int, int, int, int]:
    """Rows, tokens, warps and stages of a tile: what won most often in the measurements behind docs/log.md."""
    if tokens <= 2048:
        return (64 if n <= 64 else 128), 128, 4, 4
    if n <= 64:
        return 64, 128, 4, 4
    if n % 128:
        return 64, 256, 8, 4
    return 128, 256, 8, 3


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def across(
    a: Tensor, w: Tensor, tokens: int, groups: int, k: int, n: int, i: int, a_last: bool, k_inner: bool
) -> Tensor:
    """``a`` by ``w``: a new tensor (n / i, groups, i, tokens).

    ``a`` is (tokens, groups, k), or (groups, k, tokens) if ``a_last``; ``w`` is (groups, n, k) if ``k_inner``, else
    (groups, k, n). Both contiguous, of one half precision, on a device of compute capability 9 or more, starting at 16
    bytes; sizes as `fits` says. Sums in float32.
    """
    c = a.new_empty(n // i, groups, i, tokens)
    rows, columns, warps, stages = _tile(tokens, n)
    by_tma = i >= 16 and i & (i - 1) == 0  # short runs of rows leave faster by ordinary stores
    if a_last:
        a_desc = TensorDescriptor(a, [groups, k, tokens], [k * tokens, tokens, 1], [1, 64, columns])
    else:
        a_desc = TensorDescriptor(a, [tokens, groups, k], [groups * k, k, 1], [columns, 1, 64])
    w_shape, w_block = ([groups, n, k], [1, rows, 64]) if k_inner else ([groups, k, n], [1, 64, rows])
    run = [rows // i, 1, i] if rows >= i else [1, 1, rows]
    _across[(_programs(a.device),)](
        a_desc, TensorDescriptor(w, w_shape, [n * k, w_shape[2], 1], w_block),
        TensorDescriptor(c, c.shape, c.stride(), [*run, columns]) if by_tma else c,
        c, tokens, _programs(a.device), groups, k, n // i, i, by_tma, a_last, k_inner, rows, columns, 64,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return c
