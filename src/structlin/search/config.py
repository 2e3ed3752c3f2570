"""Everything that fixes a search, as one frozen value that is checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import lacks
from ..train.config import OptionError, among, device_of
from .budget import EQUAL, GROW
from .presets import PRESETS, TASKS, load_task
from .space import Space, parse_space
from .tasks import Task

SAMPLERS = {
    "grid": "every listed candidate, and the published points of the einsum space",
    "random": "evenly from the space",
    "tpe": "where good candidates were, by a Parzen estimator",
    "cmaes": "where good points of the einsum space were, by an evolution strategy",
}
"""How candidates are chosen, and what that means."""

METRICS = {
    "loss": "valid_loss",
    "params": "model_params",
    "flops": "train_flops",
    "seconds": "train_seconds",
    "memory": "peak_memory_bytes",
}
"""What can be minimised, and the metric of the record that says it."""

SPACES = {
    "smoke": "einsum",
    "small": "einsum,monarch:nblocks=4/8,btt:rank=1/2,low_rank:rank=16/32,kronecker,dyad:nblocks=4/8",
    "large": "einsum,monarch:nblocks=4/8/16,btt:rank=1/2/4,low_rank:rank=64/128/256,kronecker,dyad:nblocks=4/8",
}
"""The space of each preset."""

DRAWN = 24
"""Trials of a search that draws, unless told."""

FREE = ("trials",)
"""Fields that a search may go on with other values of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One search. ``budget`` is in FLOPs, seconds or parameters, None for what the dense model takes; ``steps`` and
    ``lr`` are those of the dense model; ``share`` is the CPU threads or GPUs of a trial."""

    task: str
    preset: str
    data: tuple[str, ...]
    space: str
    sampler: str
    minimise: tuple[str, ...]
    equal: str
    grow: str
    budget: float | None
    trials: int
    halving: bool
    seed: int
    steps: int
    lr: float
    device: str
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Every value; JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def load(self) -> Task:
        """The task, with its data.

        Raises:
            OptionError: for data that cannot be used, and candidates that the task's model cannot have.
        """
        task = load_task(self.task, self.preset, self.data, self.seed, self.steps)
        for candidate in self.parsed().listed:
            task.rules(candidate, task.sizes.width)
        return task

    def parsed(self) -> Space:
        """The space."""
        return parse_space(self.space)


def configure(
    task: str = "teacher",
    preset: str = "small",
    data: tuple[str, ...] = (),
    space: str | None = None,
    sampler: str = "grid",
    minimise: str = "loss",
    equal: str = "flops",
    grow: str = "width",
    budget: float | None = None,
    trials: int | None = None,
    halving: bool = False,
    seed: int = 0,
    steps: int | None = None,
    lr: float | None = None,
    device: str | None = None,
    share: float = 1.0,
) -> Config:
    """A checked config; None takes the value of the preset.

    Raises:
        OptionError: naming the option, what was given and what is allowed.
    """
    sizes = PRESETS[among("--preset", preset, PRESETS)][among("--task", task, TASKS)]
    space = SPACES[preset] if space is None else space
    found = parse_space(space)
    grid = len(found.grid())
    config = Config(
        task=task,
        preset=preset,
        data=tuple(str(Path(path).absolute()) if Path(path).exists() else path for path in data),
        space=space,
        sampler=among("--sampler", sampler, SAMPLERS),
        minimise=tuple(among("--minimise", name, METRICS) for name in minimise.split(",")),
        equal=among("--equal", equal, EQUAL),
        grow=among("--grow", grow, GROW),
        budget=budget,
        trials=(grid if sampler == "grid" else DRAWN) if trials is None else trials,
        halving=halving,
        seed=seed,
        steps=sizes.steps if steps is None else steps,
        lr=sizes.lr if lr is None else lr,
        device=device_of(device),
        share=share,
    )
    _check(config, found, grid)
    return config


def _check(config: Config, space: Space, grid: int) -> None:
    for name, low, words in (("trials", 1, "1 or more"), ("steps", 1, "1 or more"), ("seed", 0, "0 to 2**31 - 1")):
        if not low <= getattr(config, name) < 2**31:
            raise OptionError(f"--{name}", f"{getattr(config, name)} is given; allowed: {words}")
    for name in ("budget", "lr", "share"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise OptionError(f"--{name}", f"{value} is given; allowed: positive numbers")
    if config.sampler == "grid" and config.trials > grid:
        raise OptionError("--trials", f"{config.trials} is given, and the grid has {grid}; give a larger --space")
    if config.sampler == "cmaes" and (space.listed or not space.continuous):
        raise OptionError("--sampler", "cmaes needs numbers; give --space einsum, or another sampler")
    if config.sampler == "cmaes" and (missing := lacks(("cmaes",), "search")):
        raise OptionError("--sampler", f"cmaes {missing}")
    if len(set(config.minimise)) < len(config.minimise) or "loss" not in config.minimise:
        raise OptionError("--minimise", f"{','.join(config.minimise)} is given; allowed: loss, and others each once")
    if len(config.minimise) > 1 and (config.halving or config.sampler == "cmaes"):
        what = "--halving" if config.halving else "--sampler cmaes"
        raise OptionError("--minimise", f"{what} looks at one number; minimise the loss alone")
    if config.device == "cpu" and "memory" in config.minimise:
        raise OptionError("--minimise", "memory is measured on a GPU only; allowed: loss, params, flops, seconds")
    if config.equal == "params" and config.grow == "steps":
        raise OptionError("--grow", "steps leaves parameters as they are; equal parameters need --grow width")
    if config.device == "cpu" and config.share != int(config.share):
        raise OptionError("--share", f"{config.share} is given; allowed on a CPU: whole numbers of threads")
    if config.device == "cpu" and config.share > (cores := os.cpu_count() or 1):
        raise OptionError("--share", f"{config.share:g} threads are given; allowed: up to {cores}, the cores there are")
    if config.equal == "seconds" and config.share < 1:
        raise OptionError("--share", "several trials on a GPU disturb each other's clock; give 1 or more")


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields that two searches of one study must not differ in, as ``name (old there, new here)``."""
    return [
        f"{name} ({before.get(name)!r} there, {now.get(name)!r} here)"
        for name in {**before, **now}
        if name not in FREE and before.get(name) != now.get(name)
    ]


assert {field.name for field in dataclasses.fields(Config)} >= set(FREE)
