"""What makes a recipe tiny: sizes and a budget for one CPU core and a few seconds; the rest is that of the large one."""

from __future__ import annotations

import dataclasses

from ..train.recipe import Recipe


def tiny(recipe: Recipe, name: str, **sizes: int) -> Recipe:
    """``recipe`` at a width of 64 and two blocks, in float32 and not compiled."""
    small = {"width": 64, "depth": 2, "heads": 4, "mlp_width": 256, **sizes}
    return dataclasses.replace(
        recipe,
        name=name,
        **small,
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
