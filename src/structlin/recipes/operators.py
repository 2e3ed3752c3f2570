"""Operators of differential equations: the Fourier neural operator (Li et al. 2021), and Monarch-NO (Dao et al. 2022).

The published operator has width 20, 12 modes and 4 layers, and trains for 500 epochs of 50 updates with a rate that
halves every 100. Here the rate is higher and falls along a cosine, and half of the updates predict few times.
"""

from __future__ import annotations

import dataclasses

from ..problems.operators.recipe import OperatorRecipe


def fno_navier_stokes() -> OperatorRecipe:
    """Fourier neural operator, vorticity of a viscous flow; 10 times given, 40 predicted."""
    return OperatorRecipe(
        name="fno_navier_stokes", steps=8000, batch=50, lr=2.5e-3, weight_decay=1e-4, dtype="float32",
        log_every=200, valid_every=1000, checkpoint_every=1000,
    )  # fmt: skip


def monarch_no_navier_stokes() -> OperatorRecipe:
    """The same with learnable Monarch factors for its transforms."""
    return dataclasses.replace(fno_navier_stokes(), name="monarch_no_navier_stokes", model="monarch_no")


def unet_navier_stokes() -> OperatorRecipe:
    """A U-Net with as many parameters on the same flows."""
    return dataclasses.replace(fno_navier_stokes(), name="unet_navier_stokes", model="unet", width=22, lr=1e-3)


def burgers() -> OperatorRecipe:
    """Burgers' equation, from time 0 to time 1; --model monarch_no learns the transforms."""
    return dataclasses.replace(
        fno_navier_stokes(), name="burgers", equation="burgers", viscosity=0.1, resolution=1024, grid=1024,
        time_step=2e-3, times=2, history=1, short=1, width=64, modes=16, samples=1000, steps=10000, batch=20, lr=1e-3,
    )  # fmt: skip


def darcy() -> OperatorRecipe:
    """Darcy flow through two materials, from the map of them to the pressure."""
    return dataclasses.replace(
        fno_navier_stokes(), name="darcy", equation="darcy", resolution=85, grid=253, times=2, history=1, short=1,
        width=32, modes=12, pad=11, samples=1000, steps=10000, batch=20, lr=1e-3,
    )  # fmt: skip


def tiny_fno_navier_stokes() -> OperatorRecipe:
    """The operator on 16x16 points, for a CPU and seconds."""
    return _tiny(fno_navier_stokes(), resolution=16, grid=32, time_step=0.1, times=12, history=4, width=12, short=2)


def tiny_monarch_no_navier_stokes() -> OperatorRecipe:
    """Monarch-NO on 16x16 points, for a CPU and seconds."""
    return dataclasses.replace(
        tiny_fno_navier_stokes(), name="tiny_monarch_no_navier_stokes", model="monarch_no"
    )  # fmt: skip


def tiny_unet_navier_stokes() -> OperatorRecipe:
    """The U-Net on 16x16 points, for a CPU and seconds."""
    return dataclasses.replace(tiny_fno_navier_stokes(), name="tiny_unet_navier_stokes", model="unet", width=4)


def tiny_burgers() -> OperatorRecipe:
    """Burgers' equation on 64 points, for a CPU and seconds."""
    return _tiny(burgers(), resolution=64, grid=128, time_step=0.02, width=16)


def tiny_darcy() -> OperatorRecipe:
    """Darcy flow on 17x17 nodes, for a CPU and seconds."""
    return _tiny(darcy(), resolution=17, grid=33, width=12, pad=3)


def _tiny(recipe: OperatorRecipe, **fields: object) -> OperatorRecipe:
    small: dict[str, object] = {
        "name": f"tiny_{recipe.name}", "samples": 48, "valid_samples": 8, "test_samples": 8, "modes": 4, "depth": 3,
        "steps": 60, "batch": 8, "lr": 4e-3, "compile": "none", "log_every": 10, "valid_every": 20,
        "checkpoint_every": 20,
    }  # fmt: skip
    return dataclasses.replace(recipe, **{**small, **fields})  # type: ignore[arg-type]
