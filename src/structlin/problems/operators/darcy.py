"""Darcy flow through a square of two materials, by finite volumes and conjugate gradients, many squares at once.

``-div(a grad u) = 1`` on ``[0, 1]^2`` with ``u = 0`` on the sides, where ``a`` is 12 or 3, as in Li et al. 2021,
section 5.2: the operator to learn takes ``a`` to ``u``. Between two nodes ``a`` is their harmonic mean, so the flow
through a jump is right. The gradients are preconditioned by the exact inverse of the Laplacian, a product with sine
matrices, after which the condition number is at most ``max a / min a``: some tens of iterations, whatever the grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fields import square_2d

HIGH, LOW = 12.0, 3.0
ITERATIONS = 500


def coefficient(count: int, points: int, seed: int) -> Tensor:
    """12 where a field of ``N(0, (-Laplacian + 9)^-2)`` is at least 0, else 3.

    Returns:
        float64 ``[count, points, points]``, at ``(i, j) / (points - 1)``.
    """
    return torch.where(square_2d(count, points, seed, 9.0, 2.0) >= 0, HIGH, LOW)


def solve(a: Tensor, source: Tensor, tolerance: float = 1e-10) -> Tensor:
    """The ``u`` with ``-div(a grad u) = source`` that is 0 on the sides.

    Args:
        a: positive, float64 ``[count, n, n]``, at nodes that include the sides.
        source: ``[n, n]`` or ``[count, n, n]``.
        tolerance: norm of the residual over that of the source, at most.

    Returns:
        float64 ``[count, n, n]``, on the device of ``a``.

    Raises:
        ValueError: where that is not reached.
    """
    n = a.shape[-1]
    spacing = 1 / (n - 1)
    down = 2 / (1 / a[:, 1:, 1:-1] + 1 / a[:, :-1, 1:-1])
    right = 2 / (1 / a[:, 1:-1, 1:] + 1 / a[:, 1:-1, :-1])

    def apply(u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (1, 1, 1, 1))
        flow = down * padded[:, :, 1:-1].diff(dim=1)
        across = right * padded[:, 1:-1].diff(dim=2)
        return -(flow.diff(dim=1) + across.diff(dim=2)) / spacing**2

    inner = torch.arange(1, n - 1, dtype=a.dtype, device=a.device)
    sine = math.sqrt(2 * spacing) * torch.sin(math.pi * spacing * inner[:, None] * inner)
    values = (2 - 2 * torch.cos(math.pi * spacing * inner)) / spacing**2
    values = values[:, None] + values

    def precondition(r: Tensor) -> Tensor:
        return sine @ ((sine @ r @ sine) / values) @ sine

    residual = source.expand_as(a)[:, 1:-1, 1:-1].clone()
    enough = tolerance * _dot(residual, residual).sqrt()
    u = torch.zeros_like(residual)
    direction = z = precondition(residual)
    product = _dot(residual, z)
    for _ in range(ITERATIONS):
        image = apply(direction)
        length = product / _dot(direction, image).clamp(min=1e-300)
        u = u + length * direction
        residual = residual - length * image
        if bool((_dot(residual, residual).sqrt() <= enough).all()):
            return torch.nn.functional.pad(u, (1, 1, 1, 1))
        z = precondition(residual)
        before, product = product, _dot(residual, z)
        direction = z + product / before.clamp(min=1e-300) * direction
    raise ValueError(f"a coefficient from {a.min():g} to {a.max():g} is not solved to {tolerance:g} in {ITERATIONS} "
                     "iterations; allowed: finite ones above 0 with a smaller ratio")  # fmt: skip


def pairs(
    count: int, resolution: int, grid: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Coefficients and solutions, solved on ``grid`` nodes per axis and kept on ``resolution`` of them.

    Returns:
        Two of float32 ``[count, resolution, resolution]``, on the CPU.

    Raises:
        ValueError: for a grid that does not fit.
    """
    if (grid - 1) % (resolution - 1):
        near = 1 + (resolution - 1) * max(1, round((grid - 1) / (resolution - 1)))
        raise ValueError(f"a grid of {grid} nodes is given for a resolution of {resolution}; "
                         f"allowed: 1 + multiples of {resolution - 1}, as {near}")  # fmt: skip
    every, a = (grid - 1) // (resolution - 1), coefficient(count, grid, seed)
    one = torch.ones((), dtype=a.dtype, device=device)
    u = torch.cat([solve(part.to(device), one).cpu() for part in a.split(256)])
    return a[:, ::every, ::every].float(), u[:, ::every, ::every].float()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
