"""A contraction whose operands and result lie in memory as they please: ``c[g, m, n] = sum over k of a b``.

A batched GEMM reads and writes in place only where each role of the equation has one stride. Here a role is two digits
with a stride each, which is what the dense weight of a tensor train or a BTT matrix needs: its factors are small, and
copying the weight into another order would take several times as long as the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import block, power


class Role(NamedTuple):
    """A role of an equation: two digits, the slower first, and what a step of each moves each tensor by.

    A role that a tensor does not have moves it by 0.
    """

    size: int
    inner: int
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]


TILE = 4096  # elements of the result, or of a factor of it, that a program holds
SPAN = 64  # entries of a row of the result that lie together, where the sizes allow
ENOUGH = 264  # programs, two for each multiprocessor


@triton.jit
def _product(
    a_ptr, b_ptr, c_ptr, size,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    G1: tl.constexpr, M1: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr,
    AG0: tl.constexpr, AG1: tl.constexpr, AM0: tl.constexpr, AM1: tl.constexpr, AK0: tl.constexpr, AK1: tl.constexpr,
    BG0: tl.constexpr, BG1: tl.constexpr, BK0: tl.constexpr, BK1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr,
    CG0: tl.constexpr, CG1: tl.constexpr, CM0: tl.constexpr, CM1: tl.constexpr, CN0: tl.constexpr, CN1: tl.constexpr,
    TG: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, PARTS: tl.constexpr, SPAN_: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (N + TN - 1) // TN
    rows: tl.constexpr = (M + TM - 1) // TM
    program = tl.program_id(0)
    n = program % columns * TN + tl.arange(0, TN)
    m = program // columns % rows * TM + tl.arange(0, TM)
    g = program // (columns * rows) * TG + tl.arange(0, TG)
    g, m_, n_ = g[:, None, None], m[None, :, None], n[None, None, :]
    a_row = g // G1 * AG0 + g % G1 * AG1 + m_ // M1 * AM0 + m_ % M1 * AM1
    b_row = g // G1 * BG0 + g % G1 * BG1 + n_ // N1 * BN0 + n_ % N1 * BN1
    acc = tl.zeros((TG, TM, TN), tl.float32)
    begin, end = 0, K
    if PARTS > 1:
        begin = tl.program_id(1) * SPAN_
        end = tl.minimum(begin + SPAN_, K)
    for start in tl.range(begin, end, TK):
        k = start + tl.arange(0, TK)
        by_column, by_row = k[None, None, :], k[None, :, None]
        a = tl.load(
            a_ptr + a_row + (by_column // K1 * AK0 + by_column % K1 * AK1),
            mask=(g < G) & (m_ < M) & (by_column < K), other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + b_row + (by_row // K1 * BK0 + by_row % K1 * BK1),
            mask=(g < G) & (n_ < N) & (by_row < K), other=0.0,
        )  # fmt: skip
        if TG == 1:
            flat = tl.dot(tl.reshape(a, [TM, TK]), tl.reshape(b, [TK, TN]), tl.reshape(acc, [TM, TN]))
            acc = tl.reshape(flat, [TG, TM, TN])
        else:
            acc = tl.dot(a, b, acc)
    to = g // G1 * CG0 + g % G1 * CG1 + m_ // M1 * CM0 + m_ % M1 * CM1 + n_ // N1 * CN0 + n_ % N1 * CN1
    c_ptr += tl.program_id(1).to(tl.int64) * size
    tl.store(c_ptr + to, acc.to(c_ptr.dtype.element_ty), mask=(g < G) & (m_ < M) & (n_ < N))


def _tile(g: Role, m: Role, n: Role, k: Role) -> tuple[int, int, int, int]:
    """Edges of a tile along each role: whole inner digits where they are small, and enough programs where k is long."""
    tm, tn, tk = (min(SPAN, block(role.inner)) for role in (m, n, k))
    while tm * tn > 256 and k.size > 4 * tk and g.size * triton.cdiv(m.size, tm) * triton.cdiv(n.size, tn) < ENOUGH:
        tm, tn = (tm // 2, tn) if tm >= tn else (tm, tn // 2)
    tg = max(1, min(power(g.inner), TILE // (max(tm, tn, tk) * sorted((tm, tn, tk))[1])))
    if tg == 1:
        while tk < k.size and 2 * tk * max(tm, tn) <= TILE:
            tk *= 2
    return tg, tm, tn, tk


def product(a: Tensor, b: Tensor, c: Tensor, g: Role, m: Role, n: Role, k: Role) -> None:
    """Fill ``c`` with the products of ``a`` and ``b`` summed over ``k``, in float32 before they are rounded.

    All of one half precision, of fewer than 2**31 elements; ``c`` contiguous. Where few programs have a long sum each
    takes a part of it, and the parts are added up in order, so results are the same bits each time.
    """
    tg, tm, tn, tk = _tile(g, m, n, k)
    programs = triton.cdiv(g.size, tg) * triton.cdiv(m.size, tm) * triton.cdiv(n.size, tn)
    steps = triton.cdiv(k.size, tk)
    span = triton.cdiv(steps, max(1, min(steps // 4, ENOUGH // programs)))  # steps of a program, four at least
    parts = triton.cdiv(steps, span)
    out = c if parts == 1 else torch.empty(parts, *c.shape, device=c.device, dtype=torch.float32)
    _product[(programs, parts)](
        a, b, out, c.numel(), g.size, m.size, n.size, k.size, g.inner, m.inner, n.inner, k.inner,
        *g.a, *m.a, *k.a, *g.b, *k.b, *n.b, *g.c, *m.c, *n.c, tg, tm, tn, tk, parts, span * tk,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        c.copy_(out.sum(0))
