"""Vorticity of a viscous flow on the torus, by a pseudo-spectral method, many flows at once on any device.

The equation is ``dw/dt + u . grad w = viscosity Laplacian w + f`` on ``[0, 1)^2`` with ``div u = 0``, as in Li et al.
2021, section 5.3. Products are formed on the grid and freed of aliases by the 2/3 rule. A step has the three stages of
Spalart, Moser and Rogers 1991: third-order Runge-Kutta for advection, Crank-Nicolson for viscosity, so that only
advection limits the step. Advection is taken as ``(dxx - dyy)(uv) + dxy(v^2 - u^2)``, which needs two transforms in
each direction and no gradient of ``w``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .fields import torus_2d

GAMMA = (8 / 15, 5 / 12, 3 / 4)
ZETA = (0.0, -17 / 60, -5 / 12)
CHUNK = 2**25
"""Numbers of one field over all flows that are solved together."""


def initial(count: int, points: int, seed: int, variance: float) -> Tensor:
    """Initial vorticity of Li et al. 2021, ``N(0, variance (-Laplacian + 49)^-2.5)``.

    Returns:
        float64 ``[count, points, points]``.
    """
    return torus_2d(count, points, seed, variance, 49.0, 2.5)


def forcing(points: int) -> Tensor:
    """``0.1 (sin 2 pi (x + y) + cos 2 pi (x + y))``, the forcing of Li et al. 2021; float64 ``[points, points]``."""
    x = torch.arange(points, dtype=torch.float64) / points
    phase = 2 * math.pi * (x[:, None] + x)
    return 0.1 * (phase.sin() + phase.cos())


def evolve(
    w: Tensor, viscosity: float, step: float, steps: int, snapshots: int, force: Tensor | None = None
) -> Iterator[Tensor]:
    """Vorticity at times ``steps * step``, ``2 * steps * step`` and so on.

    Args:
        w: vorticity at time 0, float32 or float64 ``[flows, n, n]``, of mean zero.
        viscosity: of the fluid.
        step: of time.
        steps: from one snapshot to the next.
        snapshots: how many.
        force: ``[n, n]``, constant in time.

    Yields:
        ``[flows, n, n]``, of the dtype and on the device of ``w``.

    Raises:
        ValueError: for a step so large that the solution is no longer finite.
    """
    n = w.shape[-1]
    waves = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, dtype=w.dtype, device=w.device)
    kx, ky = waves[:, None], waves[: n // 2 + 1].abs()
    square = kx.square() + ky.square()
    # waves below n / 3 cannot be hit by aliases of products of two such
    keep = (torch.maximum(kx.abs(), ky.expand_as(square)) < 2 * math.pi * n / 3).to(w.dtype)
    inverse = torch.where(square > 0, 1 / square.clamp(min=1.0), 0.0) * keep
    to_velocity = 1j * torch.stack([ky * inverse, -kx * inverse])
    to_rate = keep * torch.stack([kx.square() - ky.square(), kx * ky])
    constant = 0.0 if force is None else torch.fft.rfft2(force.to(w)) * keep

    def rate(spectrum: Tensor) -> Tensor:
        u, v = torch.fft.irfft2(to_velocity * spectrum[:, None], s=(n, n)).unbind(1)
        products = torch.stack([u * v, (v - u) * (v + u)], 1)
        found: Tensor = (to_rate * torch.fft.rfft2(products)).sum(1).add_(constant)
        return found

    decay = [viscosity * step * (g + z) / 2 * square for g, z in zip(GAMMA, ZETA, strict=True)]
    spectrum = torch.fft.rfft2(w) * keep
    for snapshot in range(snapshots):
        for _ in range(steps):
            before = None
            for gamma, zeta, half in zip(GAMMA, ZETA, decay, strict=True):
                now = rate(spectrum)
                spectrum = (spectrum * (1 - half)).add_(now, alpha=gamma * step)
                if before is not None:
                    spectrum.add_(before, alpha=zeta * step)
                spectrum /= 1 + half
                before = now
        field = torch.fft.irfft2(spectrum, s=(n, n))
        if not torch.isfinite(field).all():
            time = (snapshot + 1) * steps * step
            raise ValueError(f"the flow is no longer finite at time {time:g} with steps of {step:g}; allowed: less")
        yield field


def trajectories(
    count: int, resolution: int, grid: int, viscosity: float, times: int, step: float, variance: float, seed: int,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Forced flows from random vorticity, solved on ``grid`` points per axis and kept on ``resolution`` of them.

    Args:
        count: number of flows.
        resolution: points per axis that are kept; divides ``grid``.
        grid: points per axis of the solver.
        viscosity: of the fluid.
        times: snapshots, at times 1, 2, ..., ``times``.
        step: of time; divides 1.
        variance: of `initial`.
        seed: of `initial`.
        device: where to solve.
        dtype: of the solver, float32 or float64.

    Returns:
        float32 ``[count, resolution, resolution, times]`` on the CPU.

    Raises:
        ValueError: for a grid or a step that does not fit, or a flow that is not finite.
    """
    if grid % resolution:
        raise ValueError(f"a grid of {grid} points is given for a resolution of {resolution}; "
                         f"allowed: multiples of {resolution}")  # fmt: skip
    steps = round(1 / step)
    if abs(steps * step - 1) > 1e-6:
        raise ValueError(f"a time step of {step:g} is given; allowed: 1 / a whole number, as {1 / max(1, steps):g}")
    every, out = grid // resolution, torch.empty(count, resolution, resolution, times)
    start = initial(count, grid, seed, variance)
    force = forcing(grid).to(device, dtype)
    size = max(1, CHUNK // grid**2)
    for begin in range(0, count, size):
        flows = start[begin : begin + size].to(device, dtype)
        for time, w in enumerate(evolve(flows, viscosity, 1 / steps, steps, times, force)):
            out[begin : begin + size, :, :, time] = w[:, ::every, ::every].cpu()
    return out
