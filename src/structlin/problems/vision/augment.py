"""Which images a step sees, and how they are shifted and mirrored: functions of seed and step alone.

Random numbers are drawn on the CPU and the pixels are moved on their device, so a run sees the same batches on any.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> Array:
    """The places 0 to ``count - 1`` as an epoch goes through them, int64 ``[count]``."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def places(seed: int, step: int, batch: int, count: int) -> Array:
    """The images of update ``step``, int64 ``[batch]``: epoch after epoch, each without repetition."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    epochs = wanted // count
    parts = [order(seed, epoch, count)[wanted[epochs == epoch] % count] for epoch in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(parts)


def moves(seed: int, step: int, batch: int, reach: int, mirror: bool) -> Array:
    """Rows and columns that each image moves by, from ``-reach`` to ``reach``, and whether it is mirrored (0 or 1):
    int64 ``[batch, 3]``."""
    random = np.random.Generator(np.random.PCG64([seed, step, 1]))
    mirrored = random.integers(2, size=(batch, 1)) * int(mirror)
    return np.concatenate([random.integers(-reach, reach + 1, size=(batch, 2)), mirrored], axis=1)


def moved(pixels: Tensor, by: Tensor) -> Tensor:
    """``pixels`` ``[batch, height, width, channels]`` cut out at the offsets of `moves`, reflected at their edges."""
    batch, height, width, _ = pixels.shape
    rows = _reflected(torch.arange(height, device=pixels.device) + by[:, :1], height)
    columns = _reflected(torch.arange(width, device=pixels.device) + by[:, 1:2], width)
    columns = torch.where(by[:, 2:] > 0, columns.flip(1), columns)
    image = torch.arange(batch, device=pixels.device)[:, None, None]
    return pixels[image, rows[:, :, None], columns[:, None, :]]


def _reflected(index: Tensor, size: int) -> Tensor:
    """``index``, from ``1 - size`` to ``2 size - 2``, as from 0 to ``size - 1``."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
