"""What a scanner with several coils would measure of a slice: sensitivities, phase, Fourier transform, noise, a mask.

k-space is stored with frequency 0 first, as `torch.fft.fft2` gives it. Rows are the read-out, which is always sampled
in full; a mask leaves out whole columns, the steps of the phase encoding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

CENTRE = 0.32
"""Share of the columns in the sampled centre, times the acceleration: 8% at 4x, as fastMRI (Zbontar et al. 2018)."""

Pattern = Literal["random", "equispaced"]


def sensitivities(
    count: int, coils: int, height: int, width: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Smooth complex maps, ``[count, coils, height, width]``, whose squares sum to 1 over the coils at every pixel.

    Coils sit around the field of view, each a little off its place; a map falls with the squared distance and its phase
    turns slowly. Places are drawn on the CPU, maps are made on ``device``.
    """

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, coils, 1, 1, generator=generator)).to(device)

    y, x = _grid(height, width, device)
    angle = 2 * math.pi * (torch.arange(coils, device=device).view(1, -1, 1, 1) + draw(-0.2, 0.2)) / coils
    radius, reach = draw(1.0, 1.2), draw(0.4, 0.6)
    distance = (y - radius * angle.sin()).square() + (x - radius * angle.cos()).square()
    turns = draw(-math.pi, math.pi) + draw(-2, 2) * y + draw(-2, 2) * x
    maps = torch.polar((1 + distance / reach.square()) ** -1.5, turns)
    normalised: Tensor = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    return normalised


def smooth_phase(
    count: int, height: int, width: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Random phases of absolute value 1, ``[count, 1, height, width]``: polynomials of second degree over the image."""
    y, x = _grid(height, width, device)
    terms = torch.stack([torch.ones_like(y * x), y + 0 * x, x + 0 * y, y * x, y.square() + 0 * x, x.square() + 0 * y])
    angles = torch.einsum("nt, thw -> nhw", torch.randn(count, 6, generator=generator).to(device), terms)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def measure(images: Tensor, coils: int, noise: float, seed: int) -> Tensor:
    """Fully sampled k-space of ``images`` (float32 ``[n, height, width]``), complex64 ``[n, coils, height, width]``.

    Args:
        noise: standard deviation of real and imaginary part of each coil's image, in units of the images.
        seed: of coils, phase and noise; the noise also depends on the kind of device that ``images`` are on.
    """
    generator = torch.Generator().manual_seed(seed)
    count, height, width = images.shape
    there = images.device
    maps = sensitivities(count, coils, height, width, generator, there)
    seen = images[:, None] * maps * smooth_phase(count, height, width, generator, there)
    noisy = torch.Generator(there).manual_seed(seed + 1)
    # complex normal numbers have a variance of 1 over both parts
    drawn = torch.randn(seen.shape, generator=noisy, dtype=torch.complex64, device=there)
    kspace: Tensor = torch.fft.fft2(seen + math.sqrt(2) * noise * drawn)
    return kspace


def centre_columns(width: int, acceleration: int) -> int:
    """Fully sampled columns in the centre of k-space; at least 4."""
    return max(4, round(CENTRE * width / acceleration))


def mask(width: int, acceleration: int, pattern: Pattern, seed: int) -> Tensor:
    """Which of ``width`` columns are measured, bool, frequency 0 first; ``width // acceleration`` of them.

    "random" draws those outside of the centre with equal chance; "equispaced" spreads them evenly, from a random start.

    Raises:
        ValueError: where the centre alone has more columns than may be measured.
    """
    total, centre = width // acceleration, centre_columns(width, acceleration)
    if acceleration == 1:
        return torch.ones(width, dtype=torch.bool)
    if total < centre:
        raise ValueError(
            f"{total} of {width} columns are measured at {acceleration}x, fewer than the {centre} centre ones"
        )
    generator = torch.Generator().manual_seed(seed)
    measured = torch.zeros(width, dtype=torch.bool)
    start = (width - centre) // 2
    measured[start : start + centre] = True
    outside = (~measured).nonzero()[:, 0]
    if pattern == "random":
        chosen = torch.randperm(len(outside), generator=generator)[: total - centre]
    else:
        spacing = len(outside) / (total - centre) if total > centre else 1.0
        first = spacing * torch.rand((), generator=generator)
        chosen = (first + spacing * torch.arange(total - centre)).long().clamp_max(len(outside) - 1)
    measured[outside[chosen]] = True
    shifted: Tensor = torch.fft.ifftshift(measured)
    return shifted


def _grid(height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Coordinates from -1 to 1, ``[height, 1]`` and ``[1, width]``."""
    y, x = (torch.linspace(-1, 1, side, device=device) for side in (height, width))
    return y[:, None], x[None]
