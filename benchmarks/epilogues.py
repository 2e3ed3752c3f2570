"""The grouped GEMM of spike S9: the last step of a two-factor layer, with what follows the layer in its epilogue.

``y[t, g, n] = sum over k of a[g, k, t] w[g, n, k]`` plus a bias, the input tokens last as the first step stores it.
Then GELU (Hendrycks and Gimpel 2016, the exact form), the product of two such steps as SwiGLU wants it (Shazeer 2020),
or the gradient of GELU with its input computed again instead of read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from structlin.kernels.across import _programs

EPILOGUES = ("none", "gelu", "gelu_and_input", "gelu_gradient", "swiglu")
TILES = [(128, 256, 8, 3), (128, 128, 4, 4), (128, 128, 8, 3), (128, 64, 4, 4)]  # tokens, features, warps, stages


@triton.jit
def _step(
    a_desc, w_desc, v_desc, y_desc, h_desc, bias, dh, tokens, programs,
    G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = N // BLOCK_N
    tiles = tl.cdiv(tokens, BLOCK_T) * G * columns
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        t = tile // (G * columns) * BLOCK_T
        row = tile % (G * columns) * BLOCK_N
        g = row // N
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = a_desc.load([g * K + k, t]).T
            acc = tl.dot(a, w_desc.load([row, k]).T, acc)
            if EPILOGUE == "swiglu":
                gate = tl.dot(a, v_desc.load([row, k]).T, gate)
        if EPILOGUE == "swiglu":
            acc *= gate * tl.sigmoid(gate)
        elif EPILOGUE != "none":
            acc += tl.load(bias + row + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
            below = 0.5 + 0.5 * tl.erf(acc * 0.7071067811865476)
            if EPILOGUE == "gelu_gradient":
                token = (t + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
                there = dh + token * (G * N) + (row + tl.arange(0, BLOCK_N))[None, :]
                slope = below + acc * tl.exp(-0.5 * acc * acc) * 0.3989422804014327
                acc = slope * tl.load(there, mask=token < tokens).to(tl.float32)
            else:
                if EPILOGUE == "gelu_and_input":
                    h_desc.store([t, row], acc.to(h_desc.dtype))
                acc *= below
        y_desc.store([t, row], acc.to(y_desc.dtype))


def step(
    a: Tensor,
    w: Tensor,
    epilogue: str,
    tile: tuple[int, int, int, int],
    bias: Tensor | None = None,
    v: Tensor | None = None,
    dh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and, for "gelu_and_input", what GELU was applied to: both (tokens, groups * n).

    ``a`` is (groups, k, tokens), ``w`` and ``v`` (groups, n, k), ``bias`` (groups * n), ``dh`` (tokens, groups * n); of
    one half precision. The tokens are a multiple of 8, ``k`` of 64, ``n`` of the width of a tile.
    """
    assert epilogue in EPILOGUES
    (groups, k, tokens), n = a.shape, w.shape[1]
    rows, columns, warps, stages = tile
    y = a.new_empty(tokens, groups * n)
    h = a.new_empty(tokens, groups * n) if epilogue == "gelu_and_input" else y

    def tiles(x: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
        return TensorDescriptor(x, shape, [shape[1], 1], block)

    weights = [tiles(f, [groups * n, k], [columns, 64]) for f in (w, w if v is None else v)]
    results = [tiles(f, [tokens, groups * n], [rows, columns]) for f in (y, h)]
    _step[(_programs(a.device),)](
        tiles(a, [groups * k, tokens], [64, rows]), *weights, *results,
        y if bias is None else bias, y if dh is None else dh, tokens, _programs(a.device),
        groups, n, k, epilogue, rows, columns, 64, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y, h
