"""Reconstruction without learning: coil maps from the centre of k-space, zero-filled images, and SENSE.

SENSE (Pruessmann et al. 1999, 2001) solves ``min_x |P F S x - y|^2 + weight |x|^2`` by conjugate gradients, P the mask,
F the Fourier transform, S the maps. As whole columns are left out, each row of the image is a problem of its own once
the columns are transformed back, and all of them are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .acquisition import centre_columns

EPSILON = 1e-12


def coil_maps(kspace: Tensor, acceleration: int) -> Tensor:
    """Maps from the fully sampled centre of ``kspace``, complex ``[n, coils, height, width]``, squares summing to 1.

    Each coil's image of low resolution, over their root sum of squares. A Hann window in both directions keeps the edge
    of the centre from ringing. The maps hold the phase of the image too, so that what they reconstruct is nearly real.
    """
    height, width = kspace.shape[-2:]
    window = _window(height, centre_columns(height, acceleration))[:, None] * _window(
        width, centre_columns(width, acceleration)
    )
    low = torch.fft.ifft2(kspace * window.to(kspace.device))
    maps: Tensor = low / low.abs().square().sum(1, keepdim=True).sqrt().clamp_min(EPSILON)
    return maps


def combine(coils: Tensor, maps: Tensor) -> Tensor:
    """Coil images and their maps, both ``[n, coils, height, width]``, as one complex image ``[n, height, width]``."""
    return (maps.conj() * coils).sum(1)


def zero_filled(kspace: Tensor, maps: Tensor) -> Tensor:
    """The image of masked k-space with zeros where nothing was measured, complex ``[n, height, width]``."""
    return combine(torch.fft.ifft2(kspace), maps)


def sense(kspace: Tensor, maps: Tensor, mask: Tensor, weight: float, iterations: int) -> Tensor:
    """The SENSE image, complex ``[n, height, width]``, from zeros by ``iterations`` steps of conjugate gradients.

    Args:
        kspace: masked, complex ``[n, coils, height, width]``.
        maps: ``[n, coils, height, width]``.
        mask: bool ``[width]``.
        weight: of Tikhonov's term, relative to maps whose squares sum to 1.
    """
    kept = mask.to(kspace.device)

    def normal(x: Tensor) -> Tensor:
        seen = torch.fft.ifft(torch.fft.fft(maps * x[:, None]) * kept)
        return combine(seen, maps) + weight * x

    residual = zero_filled(kspace, maps)
    image, direction = torch.zeros_like(residual), residual
    power = _power(residual)
    for _ in range(iterations):
        pushed = normal(direction)
        step = power / (direction.conj() * pushed).real.sum(-1, keepdim=True).clamp_min(EPSILON)
        image, residual = image + step * direction, residual - step * pushed
        last, power = power, _power(residual)
        direction = residual + power / last.clamp_min(EPSILON) * direction
    return image


def _power(rows: Tensor) -> Tensor:
    return rows.abs().square().sum(-1, keepdim=True)


def _window(length: int, centre: int) -> Tensor:
    """A Hann window over the ``centre`` lowest frequencies of ``length``, frequency 0 first."""
    window = torch.zeros(length)
    start = (length - centre) // 2
    window[start : start + centre] = torch.hann_window(centre + 2, periodic=False)[1:-1]
    shifted: Tensor = torch.fft.ifftshift(window)
    return shifted
