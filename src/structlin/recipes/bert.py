"""BERT (Devlin et al. 2019), on which Monarch (Dao et al. 2022) is published: masked tokens are predicted, and nothing
else.

As in MosaicBERT (Portes et al. 2023) there is no next-sentence objective, all windows have 128 tokens, and the
optimizer is AdamW; Monarch's own runs used LAMB and very large batches.
"""

from __future__ import annotations

import dataclasses

from ..train.recipe import Recipe
from .tiny import tiny


def bert_base() -> Recipe:
    """BERT-base, 12 blocks of 768 features, masked tokens only."""
    return Recipe(
        name="bert_base", architecture="bert", context=128, batch=512, micro_batch=512, valid_windows=2048, lr=5e-4,
        warmup=0.1, schedule="linear", weight_decay=0.01, beta2=0.98, eps=1e-6,
    )  # fmt: skip


def bert_large() -> Recipe:
    """BERT-large, 24 blocks of 1024 features, the one of Monarch."""
    return dataclasses.replace(
        bert_base(), name="bert_large", width=1024, depth=24, heads=16, mlp_width=4096, lr=3e-4, micro_batch=256
    )


def tiny_bert() -> Recipe:
    """BERT for a CPU and seconds."""
    return tiny(bert_base(), "tiny_bert")
