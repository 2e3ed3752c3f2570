"""Pixelated attention in models of transformers, through its interface for attention functions and their masks.

The setting is a line of text in the config of the model, ``structlin_attention``. The mask is made once for each
forward pass, a `BlockMask` for whole sequences on a GPU and else a tensor, and every attention layer runs under it. A
step with a cache of keys and values computes the same rows of the same mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..nn.attention import attend, block_mask, runs_flex
from ..nn.pixelated import PixelatedAttention
from ..report.records import write_bytes

ATTENTION = "structlin_pixelated"
"""What ``attn_implementation`` is called."""
WHOLE = f"{ATTENTION}_whole"
"""The same for whole sequences without padding or a cache, as in training under torch.compile: there transformers
cannot look up whether sequences are packed, and asks for a mask as if they were."""
SETTING = "structlin_attention"
"""Name of the entry in the config that holds the spec."""
UNSUPPORTED = ("softcap", "position_bias", "s_aux", "sliding_window", "output_attentions")

_parsed: dict[str, PixelatedAttention] = {}


def register() -> None:
    """Make `ATTENTION` and `WHOLE` known to transformers; a second call changes nothing."""
    AttentionInterface.register(ATTENTION, pixelated_attention_forward)
    AttentionMaskInterface.register(ATTENTION, pixelated_mask)
    AttentionInterface.register(WHOLE, pixelated_attention_forward)
    AttentionMaskInterface.register(WHOLE, whole_mask)


def pixelate_attention_(model: PreTrainedModel, spec: PixelatedAttention | str) -> PreTrainedModel:
    """Give every attention layer of ``model`` the mask of ``spec``, in place; the weights stay as they are.

    The setting goes into the config, so ``save_pretrained`` and ``from_pretrained`` keep it.
    ``model.set_attn_implementation("sdpa")`` makes attention dense again.

    Args:
        model: of transformers, of a kind that takes attention functions (``attn_implementation``).
        spec: the mask, or its text; ``causal`` as the model is.

    Returns:
        ``model``.

    Raises:
        ValueError: for a model that takes no attention functions, or whose layers are causal where ``spec`` is not or
            the other way round; the model is unchanged then.
    """
    spec = PixelatedAttention.parse(spec) if isinstance(spec, str) else spec
    kinds = {
        bool(module.is_causal) for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)
    }
    if kinds and kinds != {spec.causal}:
        has = "layers of both kinds" if len(kinds) > 1 else f"layers with causal={str(kinds.pop()).lower()}"
        raise ValueError(f"{spec} is given; allowed: the causality of the model, and {type(model).__name__} has {has}")
    if not kinds or not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} takes no attention functions; allowed: models that do, as GPT-2 or BERT"
        )
    setattr(model.config, SETTING, str(spec))
    _parsed[str(spec)] = spec
    model.set_attn_implementation(ATTENTION)
    return model


def spec_of(config: Any) -> PixelatedAttention:
    """The spec that a config of transformers holds.

    Raises:
        ValueError: where it has none, or one that cannot be read.
    """
    text = getattr(config, SETTING, None)
    if not isinstance(text, str):
        raise ValueError(
            f"the config has {SETTING}={text!r}; allowed: a spec such as {str(PixelatedAttention())!r}, which "
            "structlin.hf.pixelate_attention_(model, spec) sets"
        )
    if text not in _parsed:
        _parsed[text] = PixelatedAttention.parse(text)
    return _parsed[text]


def pixelated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Any:
    """What transformers calls for the mask of a forward pass.

    Args:
        batch_size: sequences.
        q_length: queries, at the positions from ``q_offset`` on.
        kv_length: keys, at the positions from ``kv_offset`` on.
        q_offset: how many tokens the cache holds.
        kv_offset: position of the first key.
        mask_function: transformers' own mask; that of plain causal or bidirectional attention.
        attention_mask: bool or 0 and 1, ``[batch, keys so far]``, False at padding; None: no padding.
        config: of the model; holds the spec.
        device: of the model.
        others: what other attention functions need.

    Returns:
        A BlockMask for whole sequences on a GPU that are not padded on the left, where that can be looked up; else a
        tensor ``[batch or 1, 1, q_length, kv_length]``, uint8 by which it is told from a mask that a user made. In a
        row that is padded on the left, positions count from its first token, so that it is as without padding.

    Raises:
        ValueError: for a model that is causal where the spec is not or the other way round, and for what has no such
            mask: cross-attention, sliding windows, packed sequences.
    """
    spec = spec_of(config)
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        raise ValueError(
            f"{spec} is given, and the model masks in its own way; allowed: plain causal or full attention, and one "
            f"sequence in a row, with position_ids that count up; compiled code has to use {WHOLE} or an attention_mask"
        )
    if causal != spec.causal:
        raise ValueError(f"{spec} is given, and the model attends with causal={str(causal).lower()}; allowed: the same")
    if not causal and q_length != kv_length:
        raise ValueError(f"{q_length} queries for {kv_length} keys, both ways; {ATTENTION} has no cross-attention")
    keys = torch.arange(kv_length, device=device) + kv_offset
    queries = torch.arange(q_length, device=device) + q_offset
    padding = None if attention_mask is None else _padding(attention_mask, kv_offset, kv_length)
    whole = isinstance(q_offset, int) and q_length == kv_length and not kv_offset
    if runs_flex(device) and whole and (padding is None or _on_the_right(padding)):
        return block_mask(spec, kv_length, device, padding)
    if attention_mask is None or padding is None:
        seen = spec.sees(queries[:, None], keys)[None, None]
    else:
        first = (attention_mask.cumsum(1) == 0).sum(1)[:, None]  # where the tokens of a row begin
        seen = spec.sees((queries - first)[:, None, :, None], (keys - first)[:, None, None, :])
        seen = seen & padding[:, None, None, :]
    return seen.view(torch.uint8)


def whole_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **others: Any) -> None:
    """The mask of `WHOLE`: none, as every layer makes it.

    Raises:
        ValueError: where there is padding, or an ``attention_mask`` in compiled code, which cannot look; or a cache.
    """
    if attention_mask is not None and _padding(attention_mask, 0, kv_length) is None:
        attention_mask = None
    if attention_mask is not None or q_length != kv_length:
        what = "a cache" if attention_mask is None else "an attention_mask"
        raise ValueError(
            f"{what} is given; allowed with {WHOLE}: whole sequences without padding; {ATTENTION} takes all"
        )


def _on_the_right(padding: Tensor) -> bool:
    """Whether every row is known to begin with a token; what compiled code cannot look up is not known."""
    return not torch.compiler.is_compiling() and bool(padding[:, 0].all())


def _padding(attention_mask: Tensor, first: int, length: int) -> Tensor | None:
    """Which keys from ``first`` on are tokens, bool ``[batch, length]``; those of a cache not yet filled are none.

    None where there is no padding, which is looked up on the device, but not by compiled code.
    """
    keys = attention_mask[:, first : first + length].to(torch.bool)
    if keys.shape[1] < length:
        keys = torch.cat([keys, keys.new_zeros(keys.shape[0], length - keys.shape[1])], dim=1)
    return None if not torch.compiler.is_compiling() and bool(keys.all()) else keys


def pixelated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention of a layer.

    Args:
        module: the layer; its config holds the spec.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: ``[batch, kv_heads, keys, head_dim]``.
        attention_mask: what `pixelated_mask` returned; None where the model asked for no mask.
        scaling: of the scores.
        dropout: of attention weights; must be 0.
        others: what other attention functions need.

    Returns:
        ``[batch, queries, heads, head_dim]``, and None in place of attention weights.

    Raises:
        ValueError: for dropout, for what this attention does not do, and for a mask that is not its own.
    """
    if dropout:
        raise ValueError(f"attention dropout {dropout} is given; allowed with {ATTENTION}: 0, set it in the config")
    if asked := [name for name in UNSUPPORTED if others.get(name) not in (None, False)]:
        raise ValueError(
            f"{', '.join(asked)} is asked for, which {ATTENTION} does not do; attn_implementation='eager' does"
        )
    if attention_mask is None:
        attention_mask = pixelated_mask(
            query.shape[0], query.shape[2], key.shape[2],
            mask_function=causal_mask_function if module.is_causal else bidirectional_mask_function,
            config=module.config, device=query.device,
        )  # fmt: skip
    if isinstance(attention_mask, Tensor) and attention_mask.dtype != torch.uint8:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}; allowed with {ATTENTION}: [batch, "
            "tokens], from which the mask is made"
        )
    mask = attention_mask.view(torch.bool) if isinstance(attention_mask, Tensor) else attention_mask
    return attend(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


def is_pixelated(config: Any) -> bool:
    """Whether the model of this config runs this attention."""
    return getattr(config, "_attn_implementation", None) in (ATTENTION, WHOLE)


def keep_attention(config: Any, path: Path) -> None:
    """Write into a saved ``config.json`` that its model has this attention, so that loading it restores it.

    transformers does not save which attention a model runs. Without structlin such a file is an error on loading, which
    names `ATTENTION`.
    """
    if is_pixelated(config) and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8")) | {"attn_implementation": ATTENTION}
        write_bytes(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
