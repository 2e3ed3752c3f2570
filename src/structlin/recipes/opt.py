"""OPT (Zhang et al. 2022), on which DYAD (Chandy et al. 2023) is published: ReLU MLPs of four times the width."""

from __future__ import annotations

import dataclasses

from ..train.recipe import Recipe
from .tiny import tiny


def opt125m() -> Recipe:
    """OPT-125m, with a context of 1024; DYAD replaces its MLPs."""
    return Recipe(name="opt125m", architecture="opt")


def opt350m() -> Recipe:
    """OPT-350m: embeddings of 512 features, and norms behind the residual sum, so a low rate."""
    return dataclasses.replace(
        opt125m(), name="opt350m", width=1024, depth=24, heads=16, mlp_width=4096, embedding_width=512, post_norm=True,
        lr=1e-4, warmup=0.2, micro_batch=32,
    )  # fmt: skip


def tiny_opt() -> Recipe:
    """OPT for a CPU and seconds."""
    return tiny(opt125m(), "tiny_opt")
