"""The sizes of every task: small enough for two CPU cores, an evening on them, and what the papers trained on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .tasks import Characters, Classes, Pieces, Pixels, Sizes, Task, Teacher

TASKS: dict[str, Callable[[Sizes, tuple[str, ...], int], Task]] = {
    "teacher": Teacher,
    "pixels": Pixels,
    "characters": Characters,
    "bpe": Pieces,
    "images": Classes,
}
"""Tasks by name."""

PRESETS: dict[str, dict[str, Sizes]] = {
    "smoke": {
        "teacher": Sizes(width=64, unit=8, depth=3, steps=100, batch=128, valid=2048, lr=5e-3, teacher=64),
        "pixels": Sizes(width=32, unit=16, depth=1, steps=20, batch=16, valid=64, lr=6e-3, image=4),
        "characters": Sizes(
            width=32, unit=16, depth=1, steps=30, batch=16, valid=64, lr=6e-3, context=32, vocabulary=96
        ),
        "bpe": Sizes(width=32, unit=16, depth=1, steps=30, batch=16, valid=64, lr=6e-3, context=32, vocabulary=512),
        "images": Sizes(width=64, unit=8, depth=2, steps=60, batch=128, valid=1024, lr=3e-3, image=8),
    },
    "small": {
        "teacher": Sizes(width=128, unit=16, depth=3, steps=2000, batch=512, valid=8192, lr=2e-3, teacher=256),
        "pixels": Sizes(width=64, unit=16, depth=2, steps=400, batch=32, valid=512, lr=4e-3, image=8),
        "characters": Sizes(
            width=128, unit=32, depth=2, steps=500, batch=32, valid=256, lr=4e-3, context=128, vocabulary=96
        ),
        "bpe": Sizes(width=128, unit=32, depth=2, steps=500, batch=32, valid=256, lr=4e-3, context=128,
                     vocabulary=4096),
        "images": Sizes(width=128, unit=16, depth=3, steps=2000, batch=256, valid=5000, lr=2e-3, image=16),
    },
    "large": {
        "teacher": Sizes(width=1024, unit=16, depth=4, steps=1_000_000, batch=4096, valid=65536, lr=1e-3,
                         teacher=1024),
        "pixels": Sizes(width=512, unit=64, depth=3, steps=100_000, batch=64, valid=4096, lr=3e-3, image=8),
        "characters": Sizes(width=512, unit=64, depth=3, steps=100_000, batch=512, valid=4096, lr=3e-3, context=128,
                            vocabulary=96),
        "bpe": Sizes(width=768, unit=64, depth=12, steps=20_000, batch=128, valid=1024, lr=1e-3, context=512,
                     vocabulary=16384),
        "images": Sizes(width=1024, unit=16, depth=3, steps=25_000, batch=1024, valid=5000, lr=1e-3, image=32),
    },
}  # fmt: skip
"""Preset -> task -> sizes. Of the large ones, teacher, pixels and characters follow Potapczynski et al. 2024."""


@lru_cache(maxsize=4)
def load_task(name: str, preset: str, data: tuple[str, ...], seed: int, steps: int | None = None) -> Task:
    """The task ``name`` at a preset on the data at these paths, loaded once in a process; ``steps`` replaces those of
    the preset.

    Raises:
        OptionError: for data that cannot be used.
    """
    from dataclasses import replace

    sizes = PRESETS[preset][name]
    return TASKS[name](sizes if steps is None else replace(sizes, steps=steps), data, seed)
