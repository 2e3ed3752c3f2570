"""A grouped GEMM whose store lays the result out for the next step: ``[t, g, k] x [g, (o i), k] -> [t, o, g, i]``.

The first step of Monarch and BTT wants its result ordered by input block, the second by output block. No order
serves both, so one side has to be written (or read) across its grain: here a tile is written as runs of ``i``
elements, by the tensor memory accelerator where it can. On an H200 this beats a batched GEMM and a copy from runs of
16 elements on; shorter runs waste the memory's sectors, and the copy wins.
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
    BY_TMA: tl.constexpr, K_INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = O * I
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(tokens, BLOCK_M) * columns * G
    # the groups of one tile of tokens run next to each other, so that its rows are still in the L2 cache
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m = tile // (columns * G) * BLOCK_M
        g = tile % (columns * G) // columns
        n = tile % columns * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = a_desc.load([m, g, k]).reshape(BLOCK_M, BLOCK_K)
            if K_INNER:
                acc = tl.dot(a, w_desc.load([g, n, k]).reshape(BLOCK_N, BLOCK_K).T, acc)
            else:
                acc = tl.dot(a, w_desc.load([g, k, n]).reshape(BLOCK_K, BLOCK_N), acc)
        c = acc.to(c_ptr.dtype.element_ty)
        if BY_TMA and BLOCK_N >= I:
            c_desc.store([m, n // I, g, 0], c.reshape(BLOCK_M, BLOCK_N // I, 1, I))
        elif BY_TMA:
            c_desc.store([m, n // I, g, n % I], c.reshape(BLOCK_M, 1, 1, BLOCK_N))
        else:
            t = m + tl.arange(0, BLOCK_M)
            j = n + tl.arange(0, BLOCK_N)
            at = t.to(tl.int64)[:, None] * (N * G) + (j // I * (G * I) + g * I + j % I)[None, :]
            tl.store(c_ptr + at, c, (t < tokens)[:, None] & (j < N)[None, :])


def fits(k: int, n: int, i: int) -> bool:
    """Whether the kernel takes this size and pays: rows of 16 bytes for the accelerator, long runs, a short product.

    Beside a long product a copy costs little, and cuBLAS multiplies faster than this kernel.
    """
    return k % 8 == 0 and n % 8 == 0 and i >= 16 and 16 <= k < 32 * i


@cache
def _tile(k: int, n: int) -> tuple[int, int, int, int]:
    """Rows, columns, warps and stages of a tile: what won most often in the measurements behind docs/log.md."""
    if n <= 64:
        return 128, 64, 4, 4
    if n <= 128 or (k < 512 and n % 128 == 0):
        return 256, 128, 8, 4
    return 128, 256, 8, 3


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def across(a: Tensor, w: Tensor, groups: int, k: int, n: int, i: int, k_inner: bool) -> Tensor:
    """``a`` (tokens, g, k) by ``w`` (g, n, k), or (g, k, n) if not ``k_inner``: (tokens, n / i, g, i).

    Both contiguous, of one half precision, on a device of compute capability 9 or more, starting at 16 bytes; sizes
    as `fits` says. Sums in float32.
    """
    tokens = a.shape[0]
    c = a.new_empty(tokens, n // i, groups, i)
    rows, columns, warps, stages = _tile(k, n)
    by_tma = i & (i - 1) == 0
    w_shape, w_block = ([groups, n, k], [1, columns, 64]) if k_inner else ([groups, k, n], [1, 64, columns])
    run = [columns // i, 1, i] if columns >= i else [1, 1, columns]
    c_desc = TensorDescriptor(c, c.shape, c.stride(), [rows, *run]) if by_tma else c
    _across[(_programs(a.device),)](
        TensorDescriptor(a, [tokens, groups, k], [groups * k, k, 1], [rows, 1, 64]),
        TensorDescriptor(w, w_shape, [n * k, w_shape[2], 1], w_block),
        c_desc, c, tokens, _programs(a.device), groups, k, n // i, i, by_tma, k_inner, rows, columns, 64,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return c
