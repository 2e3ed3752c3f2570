"""GPT-2 (Radford et al. 2019), on which Monarch (Dao et al. 2022) and Pixelfly (Chen et al. 2022) are published."""

from __future__ import annotations

import dataclasses

from ..train.recipe import Recipe
from .tiny import tiny


def gpt2_small() -> Recipe:
    """GPT-2 small, 12 blocks of 768 features."""
    return Recipe(name="gpt2_small", architecture="gpt2")


def gpt2_medium() -> Recipe:
    """GPT-2 medium, 24 blocks of 1024 features."""
    return dataclasses.replace(
        gpt2_small(), name="gpt2_medium", width=1024, depth=24, heads=16, mlp_width=4096, lr=6e-4, micro_batch=32
    )


def tiny_gpt2() -> Recipe:
    """GPT-2 for a CPU and seconds."""
    return tiny(gpt2_small(), "tiny_gpt2")
