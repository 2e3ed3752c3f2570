"""What makes a recipe tiny: sizes and a budget for a CPU core and seconds; the rest is that of the large one."""

from __future__ import annotations

import dataclasses

from ..train.recipe import Recipe


def tiny(recipe: Recipe, name: str, mlp_width: int = 256) -> Recipe:
    """``recipe`` at a width of 64 and two blocks, in float32 and not compiled."""
    return dataclasses.replace(
        recipe,
        name=name,
        width=64,
        depth=2,
        heads=4,
        mlp_width=mlp_width,
        context=64,
        vocabulary=512,
        valid_share=0.1,
        steps=60,
        batch=16,
        micro_batch=16,
        lr=4e-3,
        dtype="float32",
        compile="none",
        log_every=10,
        valid_every=20,
        valid_windows=64,
        checkpoint_every=20,
    )
