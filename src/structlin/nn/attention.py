"""Pixelated attention: softmax attention in which each query sees the keys that a `PixelatedAttention` lets it see.

On a GPU it runs PyTorch's FlexAttention, compiled, over a `BlockMask` that is written down from the table of blocks, so
that no mask of all pairs is ever evaluated; masked tiles cost nothing. On a CPU, and on a GPU for the few last queries
of a longer sequence (decoding), it is scaled dot-product attention with the mask as a tensor. Both are the same
function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .pixelated import PixelatedAttention, _sees

TILE = 128
"""Tokens of a tile of FlexAttention's kernels, which all of their default sizes divide."""
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_FLEX_DIM = 16


def pixelated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: PixelatedAttention,
    *,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention under the mask of ``spec``; without dropout, which FlexAttention does not have.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``: of all positions, or of the last ones, as in decoding.
        k: keys, ``[batch, kv_heads, keys, head_dim]``; ``kv_heads`` divides ``heads`` (grouped queries).
        v: values, ``[batch, kv_heads, keys, value_dim]``, of the dtype and on the device of the others.
        spec: which keys a query sees.
        scale: multiplies the scores; None: ``head_dim ** -0.5``.
        padding: bool ``[batch, keys]``, False where a key is padding, which no query sees. A query that sees no key has
            an output of zeros.

    Returns:
        ``[batch, heads, queries, value_dim]`` in the dtype of ``q``.

    Raises:
        ValueError: for shapes that do not fit each other, and on a GPU for a dtype or head_dim that FlexAttention does
            not take.
    """
    _check(q, k, v, padding)
    queries, keys = q.shape[2], k.shape[2]
    if runs_flex(q.device) and queries == keys:
        return attend(q, k, v, block_mask(spec, keys, q.device, padding), scale)
    mask = spec.mask(queries, keys, q.device)
    return attend(q, k, v, mask if padding is None else mask & padding[:, None, None, :], scale)


def runs_flex(device: torch.device | str) -> bool:
    """Whether whole sequences run FlexAttention there: on CUDA devices, as elsewhere it has no backward pass."""
    return torch.device(device).type == "cuda"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
    """Attention under a mask that is there: a `BlockMask` runs FlexAttention, a bool tensor the masked products.

    Args:
        q, k, v, scale: as in `pixelated_attention`.
        mask: BlockMask, or bool ``[queries, keys]`` or ``[batch or 1, 1, queries, keys]``.

    Raises:
        ValueError: for a BlockMask and a dtype or head_dim that FlexAttention does not take.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if q.dtype not in FLEX_DTYPES or min(q.shape[-1], v.shape[-1]) < MIN_FLEX_DIM:
        raise ValueError(
            f"{q.dtype} with head_dim={q.shape[-1]} and value_dim={v.shape[-1]} is given; allowed on a GPU: float32, "
            f"bfloat16, float16, and dims of {MIN_FLEX_DIM} or more"
        )
    out: Tensor = _flex(mask.mask_mod)(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out


def block_mask(spec: PixelatedAttention, length: int, device: torch.device | str, padding: Tensor | None = None) -> Any:
    """The mask of FlexAttention for whole sequences of ``length`` tokens, in tiles of `TILE`.

    Tiles in which every pair is allowed are computed without a mask; the others, the diagonal if causal and the last
    ones of a length that is no multiple, apply it. With ``padding``, bool ``[batch, length]``, all tiles do. Without
    it the mask is kept for the next call; compiled code builds it anew from the table of blocks, in a few launches.
    """
    if padding is not None:
        return _build(spec, length, device, padding)
    if torch.compiler.is_compiling():
        return _build(spec, length, device, None)
    return _kept(spec, length, str(torch.device(device)))


@lru_cache(maxsize=64)
def _kept(spec: PixelatedAttention, length: int, device: str) -> Any:
    with torch.inference_mode(False):  # what is kept may be used in training later
        return _build(spec, length, device, None)


def _build(spec: PixelatedAttention, length: int, device: torch.device | str, padding: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    some, every = tiles(spec, length, device)
    sizes: dict[str, Any] = {"BLOCK_SIZE": TILE, "seq_lengths": (length, length)}
    if padding is not None:
        return BlockMask.from_kv_blocks(*_ordered(some), mask_mod=_padded_mask_mod(spec, padding), **sizes)
    return BlockMask.from_kv_blocks(*_ordered(some & ~every), *_ordered(every), mask_mod=_mask_mod(spec), **sizes)


def tiles(spec: PixelatedAttention, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Tiles of `TILE` x `TILE` tokens with any allowed pair, and those with all pairs allowed: two bool tables.

    Found from the table of blocks, not from pairs of tokens. A tile past the end of the sequence is not whole.
    """
    count, unit = -(-length // TILE), min(TILE, spec.block_size)
    index = torch.arange(count * (TILE // unit), device=device) // (spec.block_size // unit)
    linked = spec.linked(index[:, None], index).unflatten(0, (count, -1)).unflatten(2, (count, -1))
    some, every = linked.any(3).any(1), linked.all(3).all(1)
    if spec.causal:
        some, every = some.tril(), every.tril(-1)
    inside = torch.arange(1, count + 1, device=device) * TILE <= length
    return some, every & inside[:, None] & inside


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of a row are set, and the columns of the row with these first: int32, as BlockMask wants it."""
    columns = torch.argsort(table.to(torch.int32), dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


# Numbers come in as defaults of arguments, which torch.compile takes as constants; a number in a closure that changes
# would become a symbol.
def _mask_mod(spec: PixelatedAttention) -> Callable[..., Tensor]:
    shift, reach = spec.block_size.bit_length() - 1, 2**spec.nfactors

    def allowed(
        batch: Tensor, head: Tensor, query: Tensor, key: Tensor,
        shift: int = shift, reach: int = reach, nglobal: int = spec.nglobal, causal: bool = spec.causal,
    ) -> Tensor:  # fmt: skip
        return _sees(query, key, shift, reach, nglobal, causal)

    return _told_apart(allowed, spec)


def _padded_mask_mod(spec: PixelatedAttention, padding: Tensor) -> Callable[..., Tensor]:
    seen = _mask_mod(spec)

    def padded(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen(batch, head, query, key) & padding[batch, key]

    return _told_apart(padded, spec)


def _told_apart(function: Callable[..., Tensor], spec: PixelatedAttention) -> Callable[..., Tensor]:
    """``function`` with a code of its own for each spec: torch.compile takes functions of one code for one function,
    whatever their defaults are, and would run every spec of a process under the mask of the first."""
    if not torch.compiler.is_compiling():  # there the spec itself is guarded
        function.__code__ = _code(function.__code__, spec)
    return function


@cache
def _code(code: CodeType, spec: PixelatedAttention) -> CodeType:
    return code.replace(co_name=f"{code.co_name}_{spec.block_size}_{spec.nfactors}_{spec.nglobal}_{spec.causal}")


def _flex(mask_mod: Callable[..., Tensor]) -> Callable[..., Any]:
    """FlexAttention, compiled unless it is being compiled already: outside of that it would write out all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    flex: Callable[..., Any] = flex_attention
    return flex if torch.compiler.is_compiling() else _compiled(mask_mod.__code__)


@cache
def _compiled(code: CodeType) -> Callable[..., Any]:
    """FlexAttention for masks of one code, so that each has all the variants that torch.compile allows a function."""
    from torch.nn.attention.flex_attention import flex_attention

    def flex(*args: Any, **options: Any) -> Any:
        return flex_attention(*args, **options)

    flex.__code__ = flex.__code__.replace(co_name=code.co_name)
    # fullgraph: too many recompilations are an error then, and not a way back to writing out all scores
    return torch.compile(flex, fullgraph=True)


def _check(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"{shapes} are given; allowed: [batch, heads, tokens, dim], k and v alike up to dim")
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"{shapes} are given; allowed: q and k of one dim, heads of q a multiple of those of k, and as many "
            "queries as keys, or the last of them"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; allowed: one")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (q.shape[0], k.shape[2])):
        wanted = [q.shape[0], k.shape[2]]
        raise ValueError(
            f"padding is {padding.dtype} {list(padding.shape)}; allowed: torch.bool {wanted}, True: a token"
        )
