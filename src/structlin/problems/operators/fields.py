"""Gaussian random fields on the unit torus and the unit square, from which equations start.

A field is a sum of eigenfunctions of the Laplacian with independent normal coefficients, drawn for a fixed number of
waves on the CPU in float64. So a seed gives the same function on every grid, device and dtype, and the first samples do
not depend on how many follow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WAVES = 32
"""Waves per axis that are drawn; of the vorticity below, the rest would have 4e-5 of the variance."""


def torus_1d(count: int, points: int, seed: int, variance: float, shift: float, power: float) -> Tensor:
    """Samples of ``N(0, variance (-Laplacian + shift)^-power)`` with mean zero on ``[0, 1)``, periodic.

    Returns:
        float64 ``[count, points]``, at ``x = i / points``.
    """
    waves = torch.arange(-WAVES, WAVES + 1, dtype=torch.float64)
    scale = _deviation((2 * math.pi * waves).square(), variance, shift, power, points, waves)
    basis = _waves(points)
    real, imaginary = (scale * _noise((count, len(waves), 2), seed).movedim(-1, 0)).unbind()
    return real @ basis.real - imaginary @ basis.imag


def torus_2d(count: int, points: int, seed: int, variance: float, shift: float, power: float) -> Tensor:
    """Samples of ``N(0, variance (-Laplacian + shift)^-power)`` with mean zero on ``[0, 1)^2``, periodic.

    Returns:
        float64 ``[count, points, points]``, at ``(i / points, j / points)``.
    """
    waves = torch.arange(-WAVES, WAVES + 1, dtype=torch.float64)
    square = (2 * math.pi * waves).square()
    most = torch.maximum(waves.abs()[:, None], waves.abs())
    scale = _deviation(square[:, None] + square, variance, shift, power, points, most)
    basis = _waves(points)
    noise = torch.view_as_complex(_noise((count, len(waves), len(waves), 2), seed))
    field: Tensor = (basis.T @ (scale * noise) @ basis).real
    return field


def square_2d(count: int, points: int, seed: int, shift: float, power: float) -> Tensor:
    """Samples of ``N(0, (-Laplacian + shift)^-power)`` with mean zero and no flow through the sides of ``[0, 1]^2``.

    Returns:
        float64 ``[count, points, points]``, at ``(i, j) / (points - 1)``, sides included.
    """
    waves = torch.arange(2 * WAVES, dtype=torch.float64)
    square = (math.pi * waves).square()
    most = torch.maximum(waves[:, None], waves) / 2
    scale = _deviation(square[:, None] + square, 1.0, shift, power, points, most)
    scale = scale * math.sqrt(2) ** ((waves > 0)[:, None].double() + (waves > 0).double())
    basis = torch.cos(math.pi * waves[:, None] * torch.linspace(0, 1, points, dtype=torch.float64))
    return basis.T @ (scale * _noise((count, len(waves), len(waves)), seed)) @ basis


def _deviation(square: Tensor, variance: float, shift: float, power: float, points: int, waves: Tensor) -> Tensor:
    """Standard deviation of each coefficient; none for the mean and for waves that ``points`` cannot tell apart."""
    scale = math.sqrt(variance) * (square + shift) ** (-power / 2)
    return scale * ((square > 0) & (2 * waves.abs() < points))


def _waves(points: int) -> Tensor:
    """Complex exponentials, complex128 ``[waves, points]``."""
    waves, x = torch.arange(-WAVES, WAVES + 1), torch.arange(points)
    angle = 2 * math.pi * (waves[:, None] * x % points).double() / points
    return torch.polar(torch.ones_like(angle), angle)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randn(shape[1:], generator=generator, dtype=torch.float64) for _ in range(shape[0])]
    return torch.stack(samples)
