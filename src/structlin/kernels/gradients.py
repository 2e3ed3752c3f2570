"""Both gradients of a step with small groups, in one pass over the gradient of its result.

``dz[g, k, t] = sum over n of w[g, n, k] d[g, n, t]`` and ``dw[g, n, k] = sum over t of d[g, n, t] z[g, k, t]``, tokens
innermost everywhere. Where k and n are small both are bound by memory, and two GEMMs would read ``d`` twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import block

WARPS = 4  # each takes tokens of its own: with so few rows a product has no other part to share out
TOKENS = 1024  # times digits: what a warp takes in a step of the loop
ENOUGH = 1056  # programs, eight for each multiprocessor
MOST = 32  # digits that a group of the result or of the input has at most


@triton.jit
def _gradients(
    d_ptr, z_ptr, w_ptr, dz_ptr, dw_ptr, tokens, groups, runs,
    D_G, D_N, Z_G, Z_K, DZ_G, DZ_K, W_G, W_N, W_K,
    N: tl.constexpr, K: tl.constexpr, ROWS_N: tl.constexpr, ROWS_K: tl.constexpr,
    WARPS_: tl.constexpr, TOKENS_: tl.constexpr,
):  # fmt: skip
    g, part = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    n, k = tl.arange(0, ROWS_N), tl.arange(0, ROWS_K)
    w = tl.load(
        w_ptr + g * W_G + n[None, :] * W_N + k[:, None] * W_K, mask=(n < N)[None, :] & (k < K)[:, None], other=0.0
    )
    w = tl.broadcast_to(w[None], [WARPS_, ROWS_K, ROWS_N])
    d_row = (g * D_G + n.to(tl.int64) * D_N)[None, :, None]
    z_row = (g * Z_G + k.to(tl.int64) * Z_K)[None, :, None]
    dz_row = (g * DZ_G + k.to(tl.int64) * DZ_K)[None, :, None]
    acc = tl.zeros((WARPS_, ROWS_N, ROWS_K), tl.float32)
    span: tl.constexpr = WARPS_ * TOKENS_
    for start in tl.range(part * span, tokens, runs * span):
        t = start + (tl.arange(0, WARPS_) * TOKENS_)[:, None, None] + tl.arange(0, TOKENS_)[None, None, :]
        d = tl.load(d_ptr + d_row + t, mask=(n < N)[None, :, None] & (t < tokens), other=0.0)
        inside = (k < K)[None, :, None] & (t < tokens)
        z = tl.load(z_ptr + z_row + t, mask=inside, other=0.0)
        tl.store(dz_ptr + dz_row + t, tl.dot(w, d).to(dz_ptr.dtype.element_ty), mask=inside)
        acc = tl.dot(d, tl.permute(z, (0, 2, 1)), acc)
    to = ((part * groups + g) * N + n[:, None]) * K + k[None, :]
    tl.store(dw_ptr + to, tl.sum(acc, 0), mask=(n < N)[:, None] & (k < K)[None, :])


def fits(tokens: int, n: int, k: int) -> bool:
    """Whether the kernel takes groups of this size: rows of whole 16 bytes, and small ones."""
    return tokens % 8 == 0 and tokens > 0 and max(n, k) <= MOST


def gradients(
    d: Tensor,
    z: Tensor,
    w: Tensor,
    sizes: tuple[int, int, int, int],
    strides: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int]],
) -> tuple[Tensor, Tensor]:
    """The gradient of ``z``, a new flat tensor, and that of ``w``, as it lies.

    Args:
        d: that of the result, half precision; tokens innermost, as in ``z`` and its gradient.
        z: the input of the step, alike.
        w: the factor, alike.
        sizes: groups, tokens, n and k, as `fits` says.
        strides: of ``d`` by group and n, of ``z`` and of its gradient by group and k, of ``w`` by group, n and k.
    """
    groups, tokens, n, k = sizes
    rows = block(n), block(k)
    step = TOKENS // max(rows)
    runs = max(1, min(triton.cdiv(tokens, WARPS * step), ENOUGH // groups))
    dz, dw = d.new_empty(groups * tokens * k), torch.empty_like(w)
    parts = torch.empty(runs, groups, n, k, device=w.device, dtype=torch.float32)
    _gradients[(groups * runs,)](
        d, z, w, dz, parts, tokens, groups, runs, *(stride for own in strides for stride in own),
        n, k, *rows, WARPS, step, num_warps=WARPS, num_stages=3,
    )  # fmt: skip
    dw.as_strided((groups, n, k), strides[3]).copy_(parts.sum(0) if runs > 1 else parts[0])
    return dz, dw
