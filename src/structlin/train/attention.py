"""Attention of transformers over whole sequences, which no padding and no cache interrupts."""

from __future__ import annotations

WHOLE = "structlin_whole"
"""What ``attn_implementation`` is called. Where a compilation looks like an export, as it does with PyTorch 2.11,
transformers would write out a mask that hides nothing, and PyTorch's fast kernels take none."""


def whole() -> str:
    """`WHOLE`, known to transformers: scaled_dot_product_attention without a mask, causal where a layer says so."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(WHOLE, sdpa_attention_forward)
    AttentionMaskInterface.register(WHOLE, lambda *_, **__: None)
    return WHOLE
