"""A small U-Net (Ronneberger et al. 2015) on the torus, what a neural operator is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rollout import Stepper

LEVELS = 3
"""Halvings of the resolution, which is a multiple of ``2**LEVELS``."""


class Block(nn.Sequential):
    """Two periodic convolutions of 3x3, each with a norm over the whole sample and GELU; (batch, channels, h, w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        parts: list[nn.Module] = []
        for channels in (inputs, outputs):
            convolution = nn.Conv2d(channels, outputs, 3, padding=1, padding_mode="circular", bias=False)
            parts += [convolution, nn.GroupNorm(1, outputs), nn.GELU()]
        super().__init__(*parts)


class UNet(Stepper):
    """U-Net of ``width`` channels at full resolution and twice as many at each of three coarser ones.

    Args:
        times: length of the window that it is given.
        width: channels at full resolution.

    Shape: see `Stepper`; two axes, multiples of 8 points.
    """

    def __init__(self, times: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS + 1)]
        self.down = nn.ModuleList(Block(a, b) for a, b in zip([times, *widths], widths, strict=False))
        finer = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in finer)
        self.up = nn.ModuleList(Block(2 * b, b) for _, b in finer)
        self.head = nn.Conv2d(width, 1, 1)

    def step(self, window: Tensor, *prepared: Tensor) -> Tensor:
        """See `Stepper`."""
        x, kept = window.movedim(-1, 1), []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.avg_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), kept.pop()], 1))
        found: Tensor = self.head(x).movedim(1, -1)
        return found
