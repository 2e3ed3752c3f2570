"""Operators as a problem for the loop: solutions as series of functions, a model of the next, and relative errors.

A solution is a series of times; of Burgers and Darcy problems the given function is the first time and the wanted one
the second. The first updates predict few times from anywhere in a solution, which costs an update its share of the
whole; the others predict all times from the first ones, as the error is measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...spec import Spec
from ...train.config import device_of
from ..problem import Batch, Problem, chosen
from . import burgers, darcy, navier_stokes
from .data import cached
from .fno import FNO
from .recipe import OperatorRecipe
from .rollout import Stepper, relative_l2
from .unet import UNet

LAYERS = {"all": ("lift", "pointwise.*", "hidden"), "mlp": ("hidden",)}


class OperatorProblem(Problem):
    """Series of an equation's solutions, scaled, in the order test, validation, training.

    Attributes:
        series: float32 ``[samples, times, *shape]``; a run with more training samples has the same others.

    Raises:
        ValueError: for solutions that are not finite, or a file of them that cannot be read.
    """

    def __init__(self, recipe: OperatorRecipe) -> None:
        self.recipe = recipe
        device = device_of(None if recipe.device == "auto" else recipe.device)
        arrays, about = cached(Path(recipe.cache), _parameters(recipe), lambda: _solve(recipe, device))
        self.series = torch.from_numpy(arrays["series"])
        about["scales"] = []
        # a map of materials has a mean, all else does not; of a pair of functions each has a scale of its own
        for index, part in enumerate(self.series.unbind(1) if recipe.times == 2 else [self.series]):
            shift = part.mean() if recipe.equation == "darcy" and index == 0 else torch.zeros(())
            scale = part.std()
            part.sub_(shift).div_(scale)
            about["scales"].append([shift.item(), scale.item()])
        self.about = about
        self._valid = recipe.test_samples
        self._train = recipe.test_samples + recipe.valid_samples

    def model(self) -> nn.Module:
        """The operator."""
        r = self.recipe
        model: Stepper
        if r.model == "unet":
            model = UNet(r.history, r.width)
        else:
            model = FNO(r.shape, r.history, r.width, r.modes, r.depth, r.model == "monarch_no", r.pad)
        if r.compile != "none":
            model.compile_step(r.compile)
        return model

    def rules(self) -> dict[str, Spec | None]:
        """Structures for the pointwise layers."""
        return chosen(self.recipe, LAYERS)

    def rates(self) -> dict[str, float]:
        """Learned transforms start as the right ones, so they move less."""
        globs = ("spectral.*.forth.*", "spectral.*.back.*") if self.recipe.model == "monarch_no" else ()
        return dict.fromkeys(globs, self.recipe.transform_lr)

    def to(self, device: torch.device) -> None:
        """Keep all solutions there."""
        self.series = self.series.to(device)

    def batch(self, step: int) -> Batch:
        """Windows ``[batch, *shape, history]`` and what follows them, ``[batch, *shape, times]``."""
        r = self.recipe
        chosen, starts = [], []
        early = step < r.short_share * r.steps
        draw = random.Random(f"{r.seed}:{step}")
        for place in range(step * r.batch, (step + 1) * r.batch):
            chosen.append(self._train + _order(r.seed, place // r.samples, r.samples)[place % r.samples])
            starts.append(draw.randrange(r.horizon - r.short + 1) if early else 0)
        return self._windows(torch.tensor(chosen), torch.tensor(starts), r.short if early else r.horizon)

    @torch.compiler.disable
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean of the relative L2 errors of all predicted times; only the model's step is compiled."""
        window, truth = batch
        found: Tensor = model(window, truth.shape[-1])
        return relative_l2(found.movedim(-1, 1).flatten(0, 1), truth.movedim(-1, 1).flatten(0, 1)).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``valid_loss``, the mean over times, and ``relative_l2`` over all times and points of a sample at once."""
        by_time, whole, _ = self._errors(model, self._valid, self._train)
        return {"valid_loss": by_time, "relative_l2": whole}

    def test(self, model: nn.Module) -> dict[str, float]:
        """The same on test data, and of the last time alone."""
        by_time, whole, last = self._errors(model, 0, self._valid)
        return {"test_loss": by_time, "test_relative_l2": whole, "test_relative_l2_last": last}

    def picture(self, model: nn.Module, series: dict[str, list[float]], path: Path) -> None:
        """Truth, prediction and error of a test sample at some of its times."""
        from .picture import draw

        # as many samples as in other calls, so that nothing is compiled for one
        samples = torch.arange(min(self.recipe.batch, self.recipe.test_samples))
        window, truth = self._windows(samples, torch.zeros_like(samples), self.recipe.horizon)
        found: Tensor = model(window, self.recipe.horizon)
        draw(window[0].cpu(), truth[0].cpu(), found[0].cpu(), self.recipe, path)

    def _windows(self, samples: Tensor, starts: Tensor, horizon: int) -> Batch:
        """History and ``horizon`` times after it, of each of ``samples`` from its start on."""
        history = self.recipe.history
        times = starts[:, None] + torch.arange(history + horizon)
        places = (part.to(self.series.device, non_blocking=True) for part in (samples[:, None], times))
        found = self.series[tuple(places)].movedim(1, -1)
        return found[..., :history].contiguous(), found[..., history:].contiguous()

    def _errors(self, model: nn.Module, first: int, end: int) -> tuple[float, float, float]:
        """Relative L2 errors: mean over times, of all times at once, of the last; means over samples."""
        errors = []
        for part in torch.arange(first, end).split(self.recipe.batch):
            window, truth = self._windows(part, torch.zeros_like(part), self.recipe.horizon)
            found = model(window, self.recipe.horizon)
            by_time = torch.stack([relative_l2(f, t) for f, t in zip(found.unbind(-1), truth.unbind(-1), strict=True)])
            errors.append(torch.stack([by_time.mean(0), relative_l2(found, truth), by_time[-1]]))
        by_time, whole, last = torch.cat(errors, 1).mean(1).tolist()
        return by_time, whole, last


def _parameters(recipe: OperatorRecipe) -> dict[str, Any]:
    """Everything that solutions follow from."""
    count = recipe.test_samples + recipe.valid_samples + recipe.samples
    names = ["equation", "resolution", "grid"]
    if recipe.equation != "darcy":
        names += ["viscosity", "time_step"]
    if recipe.equation == "navier_stokes":
        names += ["times", "initial_variance"]
    return {name: getattr(recipe, name) for name in names} | {"count": count, "seed": recipe.data_seed}


def _solve(recipe: OperatorRecipe, device: str) -> Mapping[str, NDArray[np.float32]]:
    r = recipe
    count = r.test_samples + r.valid_samples + r.samples
    if r.equation == "navier_stokes":
        series = navier_stokes.trajectories(
            count, r.resolution, r.grid, r.viscosity, r.times, r.time_step, r.initial_variance, r.data_seed, device
        ).movedim(-1, 1)
    elif r.equation == "burgers":
        pair = burgers.pairs(count, r.resolution, r.grid, r.viscosity, r.time_step, r.data_seed, device)
        series = torch.stack(pair, 1)
    else:
        series = torch.stack(darcy.pairs(count, r.resolution, r.grid, r.data_seed, device), 1)
    return {"series": series.contiguous().numpy()}


@lru_cache(2)
def _order(seed: int, epoch: int, samples: int) -> list[int]:
    """The samples in the order of an epoch."""
    order = list(range(samples))
    random.Random(f"{seed}:epoch {epoch}").shuffle(order)
    return order
