"""Burgers' equation on the circle, by a spectral method with an integrating factor, many solutions at once.

``du/dt + d(u^2 / 2)/dx = viscosity d2u/dx2`` on ``[0, 1)``, periodic, as in Li et al. 2021, section 5.1: the operator
to learn takes ``u`` at time 0 to ``u`` at time 1. The viscous term is solved exactly by the integrating factor, the
rest by the fourth-order Runge-Kutta method; products are freed of aliases by the 2/3 rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fields import torus_1d


def initial(count: int, points: int, seed: int) -> Tensor:
    """Initial values of Li et al. 2021, ``N(0, 625 (-Laplacian + 25)^-2)`` with mean zero.

    Returns:
        float64 ``[count, points]``.
    """
    return torus_1d(count, points, seed, 625.0, 25.0, 2.0)


def solve(u: Tensor, viscosity: float, step: float, steps: int) -> Tensor:
    """``u`` after ``steps`` steps of time.

    Args:
        u: values at time 0, float32 or float64 ``[count, n]``.
        viscosity: factor of the second derivative.
        step: of time.
        steps: how many.

    Returns:
        ``[count, n]``, of the dtype and on the device of ``u``.

    Raises:
        ValueError: for a step so large that the solution is no longer finite.
    """
    n = u.shape[-1]
    waves = 2 * math.pi * torch.fft.rfftfreq(n, 1 / n, dtype=u.dtype, device=u.device)
    keep = waves < 2 * math.pi * n / 3
    half = torch.exp(-viscosity * waves.square() * step / 2)
    flux = -0.5j * waves * keep

    def rate(spectrum: Tensor) -> Tensor:
        product: Tensor = flux * torch.fft.rfft(torch.fft.irfft(spectrum, n).square())
        return product

    spectrum = torch.fft.rfft(u) * keep
    for _ in range(steps):
        first = rate(spectrum)
        second = rate(half * (spectrum + step / 2 * first))
        third = rate(half * spectrum + step / 2 * second)
        fourth = rate(half * (half * spectrum + step * third))
        rates = half.square() * first + 2 * half * (second + third) + fourth
        spectrum = half.square() * spectrum + step / 6 * rates
    out: Tensor = torch.fft.irfft(spectrum, n)
    if not torch.isfinite(out).all():
        raise ValueError(f"the solution is no longer finite with steps of {step:g}; allowed: less")
    return out


def pairs(
    count: int, resolution: int, grid: int, viscosity: float, step: float, seed: int,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values at time 0 and at time 1, solved on ``grid`` points and kept on ``resolution`` of them.

    Returns:
        Two of float32 ``[count, resolution]``, on the CPU.

    Raises:
        ValueError: for a grid or a step that does not fit, or a solution that is not finite.
    """
    if grid % resolution:
        raise ValueError(f"a grid of {grid} points is given for a resolution of {resolution}; "
                         f"allowed: multiples of {resolution}")  # fmt: skip
    every, steps = grid // resolution, max(1, round(1 / step))
    start = initial(count, grid, seed)
    end = solve(start.to(device, dtype), viscosity, 1 / steps, steps)
    return start[:, ::every].float(), end[:, ::every].float().cpu()
