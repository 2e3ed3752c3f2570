"""The solvers of differential equations against exact solutions, finer steps and finer grids, and what is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from structlin.problems.operators import burgers, darcy, fields, navier_stokes
from structlin.problems.operators.data import cached

F64 = torch.float64


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative L2 error."""
    return float((found - truth).norm() / truth.norm())


def axes(points: int, last: bool = False) -> tuple[Tensor, Tensor]:
    """Coordinates along both axes, ``[points, 1]`` and ``[points]``, the end included where ``last``."""
    x = torch.linspace(0, 1, points, dtype=F64) if last else torch.arange(points, dtype=F64) / points
    return x[:, None], x


def flow(points: int, viscosity: float, step: float, time: float, dtype: torch.dtype = F64, **more: Any) -> Tensor:
    """Two random flows after ``time``."""
    start = navier_stokes.initial(2, points, 0, 343.0).to(dtype)
    (end,) = navier_stokes.evolve(start, viscosity, step, round(time / step), 1, **more)
    return end


# fields


def test_a_field_has_its_covariance() -> None:
    samples = fields.torus_2d(200, 16, 0, 343.0, 49.0, 2.5)
    waves = torch.arange(-7, 8, dtype=F64)
    square = 4 * math.pi**2 * (waves[:, None].square() + waves.square())
    powers = 343.0 * (square + 49) ** -2.5 * (square > 0)
    assert samples.mean((1, 2)).abs().max() < 1e-12
    assert samples.square().mean().item() == pytest.approx(powers.sum().item(), rel=0.1)
    # power of the wave (1, 2), of which a sample has the real part
    spectrum = torch.fft.fft2(samples)[:, 1, 2].abs().square().mean() / 16**4
    assert spectrum.item() == pytest.approx(powers[8, 9].item(), rel=0.15)
    line = fields.torus_1d(1000, 32, 0, 625.0, 25.0, 2.0).square().mean().item()
    assert line == pytest.approx(sum(2 * 625 * (4 * math.pi**2 * k * k + 25) ** -2 for k in range(1, 16)), rel=0.1)


def test_a_field_is_the_same_function_on_every_grid_and_for_every_count() -> None:
    coarse, fine = (navier_stokes.initial(3, points, 5, 343.0) for points in (66, 132))
    torch.testing.assert_close(fine[:, ::2, ::2], coarse)
    torch.testing.assert_close(navier_stokes.initial(1, 66, 5, 343.0), coarse[:1])
    assert distance(navier_stokes.initial(3, 66, 6, 343.0), coarse) > 0.5


def test_materials_have_no_flow_through_the_sides_and_fill_half_of_the_square() -> None:
    field = fields.square_2d(50, 65, 0, 9.0, 2.0)
    slope = (field[:, 1] - field[:, 0]).square().mean() / (field[:, 33] - field[:, 32]).square().mean()
    assert slope < 0.5
    a = darcy.coefficient(50, 65, 0)
    assert set(a.unique().tolist()) == {3.0, 12.0}
    assert a.mean().item() == pytest.approx(7.5, abs=0.7)


# Navier-Stokes


def test_a_taylor_green_vortex_decays_exactly() -> None:
    x, y = axes(16)
    start = (torch.cos(2 * math.pi * x) * torch.cos(2 * math.pi * y))[None]
    ends = navier_stokes.evolve(start, 0.01, 0.01, 50, 2)
    for time, end in zip((0.5, 1.0), ends, strict=True):
        assert distance(end, start * math.exp(-2 * 0.01 * (2 * math.pi) ** 2 * time)) < 1e-6


def test_a_shear_flow_is_driven_as_it_should_be() -> None:
    """The forcing alone is not advected: its vorticity goes to force / rate, where rate = viscosity k^2."""
    force, rate = navier_stokes.forcing(16), 0.02 * 8 * math.pi**2
    (end,) = navier_stokes.evolve(torch.zeros(1, 16, 16, dtype=F64), 0.02, 0.01, 100, 1, force)
    assert distance(end[0], force * (1 - math.exp(-rate)) / rate) < 1e-5


def test_energy_and_enstrophy_fall_without_forcing_and_stay_without_viscosity() -> None:
    start = navier_stokes.initial(2, 32, 0, 343.0)
    start = torch.cat([start, *navier_stokes.evolve(start, 1e-3, 0.05, 20, 3)]).unflatten(0, (4, 2))
    waves = 2 * math.pi * torch.fft.fftfreq(32, 1 / 32, dtype=F64)
    square = (waves[:, None].square() + waves.square()).clamp(min=1.0)
    enstrophy = start.square().mean((2, 3))
    energy = (torch.fft.fft2(start).abs().square() / square).mean((2, 3))
    assert (enstrophy.diff(dim=0) < 0).all()
    assert (energy.diff(dim=0) < 0).all()
    assert (energy.diff(dim=0) / energy[1:] > enstrophy.diff(dim=0) / enstrophy[1:]).all()
    still = [flow(32, 1e-12, 0.05, time).square().mean().item() for time in (0.05, 2.0)]
    assert still[1] == pytest.approx(still[0], rel=1e-5)


def test_a_finer_step_is_of_second_order_and_the_step_of_the_recipes_is_fine_enough() -> None:
    force = navier_stokes.forcing(32)
    exact = flow(32, 0.02, 0.01, 1.0, force=force)
    errors = [distance(flow(32, 0.02, step, 1.0, force=force), exact) for step in (0.2, 0.1)]
    assert 3 < errors[0] / errors[1] < 9
    assert distance(flow(32, 1e-3, 0.02, 2.0, force=force), flow(32, 1e-3, 0.01, 2.0, force=force)) < 1e-6


def test_a_finer_grid_changes_nothing_once_all_is_resolved() -> None:
    coarse, middle, fine = (
        flow(points, 1e-3, 0.05, 2.0, force=navier_stokes.forcing(points))[:, :: points // 24, :: points // 24]
        for points in (24, 48, 96)
    )
    assert distance(coarse, fine) > 1e-4
    assert distance(middle, fine) < 1e-6


def test_float32_stays_near_float64() -> None:
    exact = flow(32, 1e-3, 0.05, 2.0)
    assert distance(flow(32, 1e-3, 0.05, 2.0, torch.float32).double(), exact) < 1e-5


def test_trajectories_are_kept_at_whole_times_and_follow_from_the_seed() -> None:
    kept = navier_stokes.trajectories(2, 16, 32, 1e-3, 3, 0.1, 343.0, 0)
    assert kept.shape == (2, 16, 16, 3)
    assert kept.dtype == torch.float32
    force = navier_stokes.forcing(32)
    assert distance(kept[..., 2].double(), flow(32, 1e-3, 0.1, 3.0, force=force)[:, ::2, ::2]) < 1e-5
    torch.testing.assert_close(navier_stokes.trajectories(1, 16, 32, 1e-3, 1, 0.1, 343.0, 0)[..., 0], kept[:1, ..., 0])


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 24"):
        navier_stokes.trajectories(1, 24, 32, 1e-3, 1, 0.1, 343.0, 0)
    with pytest.raises(ValueError, match=r"allowed: 1 / a whole number, as 0\.333"):
        navier_stokes.trajectories(1, 16, 16, 1e-3, 1, 0.3, 343.0, 0)
    with pytest.raises(ValueError, match=r"no longer finite at time 200 with steps of 2"):
        list(navier_stokes.evolve(100 * navier_stokes.initial(1, 32, 0, 343.0), 1e-4, 2.0, 100, 1))


# Burgers


def cole_hopf(x: Tensor, viscosity: float, time: float) -> tuple[Tensor, Tensor]:
    """Start and end of the solution whose start is ``sin 2 pi x + cos(4 pi x) / 2``, from the heat equation."""
    start = torch.sin(2 * math.pi * x) + torch.cos(4 * math.pi * x) / 2
    integral = -torch.cos(2 * math.pi * x) / (2 * math.pi) + torch.sin(4 * math.pi * x) / (8 * math.pi)
    waves = 2 * math.pi * torch.fft.fftfreq(len(x), 1 / len(x), dtype=F64)
    heat = torch.fft.fft(torch.exp(-integral / (2 * viscosity))) * torch.exp(-viscosity * waves.square() * time)
    return start, -2 * viscosity * (torch.fft.ifft(1j * waves * heat) / torch.fft.ifft(heat)).real


def test_burgers_is_the_solution_of_cole_and_hopf_to_fourth_order() -> None:
    start, exact = cole_hopf(axes(128)[1], 0.05, 1.0)
    errors = [distance(burgers.solve(start[None], 0.05, 1 / steps, steps)[0], exact) for steps in (50, 100)]
    assert errors[1] < 5e-7
    assert 12 < errors[0] / errors[1] < 20


def test_pairs_of_burgers_agree_with_finer_ones() -> None:
    start, end = burgers.pairs(4, 32, 128, 0.1, 0.01, 3)
    finer_start, finer = burgers.pairs(4, 32, 256, 0.1, 0.0025, 3)
    assert start.shape == end.shape == (4, 32)
    assert distance(start, finer_start) < 1e-6
    assert distance(end, finer) < 1e-5
    with pytest.raises(ValueError, match="multiples of 32"):
        burgers.pairs(1, 32, 48, 0.1, 0.01, 0)


# Darcy


def manufactured(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth coefficient, the source that makes ``sin(pi x) sin(2 pi y)`` the solution, and that solution."""
    x, y = axes(points, last=True)
    pi, sin, cos = math.pi, torch.sin, torch.cos
    u = sin(pi * x) * sin(2 * pi * y)
    a, by_x, by_y = 1 + sin(2 * pi * x) * y / 2, pi * cos(2 * pi * x) * y, sin(2 * pi * x) / 2
    across, down = pi * cos(pi * x) * sin(2 * pi * y), 2 * pi * sin(pi * x) * cos(2 * pi * y)
    return a[None], -(by_x * across + by_y * down - 5 * pi**2 * a * u), u


def test_darcy_is_the_manufactured_solution_to_second_order() -> None:
    errors = []
    for points in (17, 33):
        a, source, exact = manufactured(points)
        errors.append(distance(darcy.solve(a, source)[0], exact))
    assert errors[1] < 4e-3
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_the_flow_through_layers_of_two_materials_is_exact() -> None:
    """Between layers, where the flow is straight, the harmonic mean makes the discrete solution exact."""
    points = 33
    a = torch.where(torch.arange(points) < 11, 12.0, 3.0).to(F64)[:, None].expand(1, points, points)
    found = darcy.solve(a, torch.ones((), dtype=F64))[0]
    flow_down = 2 / (1 / a[0, 1:] + 1 / a[0, :-1]) * found.diff(dim=0)
    flow_right = a[0, :, 1:] * found.diff(dim=1)
    balance = -(flow_down[:, 1:-1].diff(dim=0) + flow_right[1:-1].diff(dim=1)) * (points - 1) ** 2
    torch.testing.assert_close(balance, torch.ones_like(balance), rtol=1e-6, atol=1e-6)


def test_pairs_of_darcy_have_two_materials_and_dry_sides() -> None:
    a, u = darcy.pairs(3, 9, 33, 0)
    assert a.shape == u.shape == (3, 9, 9)
    assert u[:, 0].abs().max() == u[:, :, -1].abs().max() == 0
    assert (u[:, 1:-1, 1:-1] > 0).all()
    with pytest.raises(ValueError, match="1 \\+ multiples of 8, as 33"):
        darcy.pairs(1, 9, 32, 0)
    with pytest.raises(ValueError, match="allowed: finite ones above 0"):
        darcy.solve(torch.full((1, 9, 9), math.nan, dtype=F64), torch.ones((), dtype=F64))


# on disk


def test_solutions_are_computed_once_and_found_again(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"u": np.arange(6, dtype=np.float32).reshape(2, 3)}

    first, about = cached(tmp_path / "new", {"equation": "toy", "seed": 0}, make)
    second, again = cached(tmp_path / "new", {"equation": "toy", "seed": 0}, make)
    assert len(calls) == 1
    assert about == again
    assert (second["u"] == first["u"]).all()
    assert second["u"].dtype == np.float32
    cached(tmp_path / "new", {"equation": "toy", "seed": 1}, make)
    assert len(calls) == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_broken_file_is_named_and_a_broken_run_leaves_none(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, {"equation": "toy"}, broken)
    assert not list(tmp_path.iterdir())
    cached(tmp_path, {"equation": "toy"}, lambda: {"u": np.ones(3)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be used .* delete it"):
        cached(tmp_path, {"equation": "toy"}, broken)
    np.savez(path, u=np.array([{"a": "pickle"}], dtype=object))
    with pytest.raises(ValueError, match="cannot be used"):
        cached(tmp_path, {"equation": "toy"}, broken)
