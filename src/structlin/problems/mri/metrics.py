"""How near an image is to the truth: peak signal-to-noise ratio and structural similarity, batched, on any device.

Both equal scikit-image's for each image, with the range of values given (Wang et al. 2004 for the similarity).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, K1, K2 = 7, 0.01, 0.03


def psnr_db(images: Tensor, truth: Tensor, value_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of ``[n, height, width]`` images, ``[n]``."""
    error = (images - truth).square().mean((-2, -1))
    return 10 * torch.log10(value_range**2 / error)


def ssim(images: Tensor, truth: Tensor, value_range: float = 1.0) -> Tensor:
    """Mean structural similarity of ``[n, height, width]`` images, ``[n]``: uniform windows of 7x7 that lie inside.

    Raises:
        ValueError: for images smaller than a window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are smaller than a window of {WINDOW}x{WINDOW}")

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[:, None], WINDOW, stride=1)[:, 0]

    x, y = images.double(), truth.double()
    mean_x, mean_y = mean(x), mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = sample * (mean(x * x) - mean_x**2), sample * (mean(y * y) - mean_y**2)
    both = sample * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similar.mean((-2, -1)).to(images.dtype)
