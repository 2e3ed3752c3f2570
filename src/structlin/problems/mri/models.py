"""Models that improve a reconstruction: SENSE with a learnable inverse Fourier transform, and a U-Net.

Both are given a complex image and give a magnitude image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import MonarchFourier


class MonarchSense(nn.Module):
    """SENSE whose last step, the inverse Fourier transform, is a learnable Monarch matrix for each axis.

    SENSE fills in all of k-space; the learned matrices take it back to an image. They start as the exact inverse
    transform, so what is learned is how to weigh what SENSE is sure of and what it guessed, by frequency and place.
    As in the MRI experiment of Dao et al. (2022), it takes the place of the exact one in SENSE. Coils are combined
    before it, so that it is one transform and not one for each coil.

    Args:
        height, width: of the images, each a product of two numbers above 1.

    Shape: the image of SENSE, complex ``[n, height, width]``; gives magnitudes, real ``[n, height, width]``.

    Raises:
        ValueError: for a side that is prime, as `MonarchFourier`.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.along_height = MonarchFourier(height, inverse=True)
        self.along_width = MonarchFourier(width, inverse=True)

    def forward(self, image: Tensor) -> Tensor:
        """The magnitude of the image."""
        rows: Tensor = self.along_width(torch.fft.fft2(image))
        columns: Tensor = self.along_height(rows.transpose(-1, -2))
        return columns.transpose(-1, -2).abs()


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015) that adds a correction to a magnitude image.

    Args:
        channels: of the first stage; each of ``stages`` halves the image and doubles them.
        stages: how often the image is halved; sides are padded to a multiple of ``2 ** stages`` inside, and cut again.

    Shape: complex ``[n, height, width]``, of which it sees the magnitude; gives real ``[n, height, width]``.
    """

    def __init__(self, channels: int = 24, stages: int = 4) -> None:
        super().__init__()
        widths = [channels * 2**stage for stage in range(stages + 1)]
        self.down = nn.ModuleList(_twice(a, b) for a, b in zip([1, *widths[:-2]], widths[:-1], strict=True))
        self.middle = _twice(widths[-2], widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(_twice(2 * w, w) for w in reversed(widths[:-1]))
        self.last = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.last.weight)  # it starts as the image that it is given
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, image: Tensor) -> Tensor:
        """The corrected magnitude."""
        seen = image.abs()
        height, width = seen.shape[-2:]
        unit = 2 ** len(self.down)
        x = F.pad(seen[:, None], (0, -width % unit, 0, -height % unit))
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([kept.pop(), grow(x)], 1))
        corrected: Tensor = seen + self.last(x)[:, 0, :height, :width]
        return corrected


def _twice(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions, each normalised over the image and rectified."""
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [
            nn.Conv2d(channels, outside, 3, padding=1, bias=False),
            nn.InstanceNorm2d(outside, affine=True),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers)
