"""The record of a run: what was trained, at which size, under which budget, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import optuna
import torch

from ..analysis import Taxonomy
from ..machine import provenance
from ..report.records import Record
from .budget import TRAINING, Size
from .config import Config
from .space import place, spec_of
from .tasks import Task
from .training import POINTS, Job


@dataclass
class Running:
    """A job that is under way, what it belongs to, and what it said."""

    job: Job
    size: Size
    trial: optuna.Trial | None
    attempt: int
    device: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)


def record_of(
    config: Config, task: Task, running: Running, budget: float | None, command: str, error: str | None
) -> Record:
    """The record of a job that ended, was stopped early, or failed with ``error``.

    ``budget`` is what it could spend; None for the dense run that sets a budget of seconds.
    """
    job, size, points = running.job, running.size, running.points
    last = points[-1] if points else {}
    stopped = error is None and last.get("point") != POINTS
    steps = last.get("step", 0)
    train_flops = TRAINING * size.flops * task.sizes.batch * steps
    spent = {"flops": train_flops, "seconds": last.get("seconds", 0.0), "params": size.params}[config.equal]
    metrics: dict[str, float | int | None] = {
        "valid_loss": None if stopped or error is not None else last["valid_loss"],
        "train_loss": last.get("train_loss"),
        "model_params": size.params,
        "flops_per_example": size.flops,
        "train_flops": train_flops,
        "train_seconds": last.get("seconds", 0.0),
        "steps": steps,
        "examples": steps * task.sizes.batch,
        "budget_share": spent / budget if budget else None,
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        **_place(job.candidate, size.width),
    }
    series = {name: [point[name] for point in points] for name in ("step", "seconds", "train_loss", "valid_loss")}
    series["flops"] = [float(TRAINING * size.flops * task.sizes.batch * step) for step in series["step"]]
    own = {"trial": job.number, "attempt": running.attempt, "width": size.width, "stopped": stopped, "spend": budget,
           "factors": _factors(job.candidate, size.width)}  # fmt: skip
    fields: dict[str, Any] = {
        "kind": "search",
        "name": job.candidate,
        **provenance(command, config.seed, torch.device("cpu")),
        "device": running.device or {"type": config.device},
        "config": {**config.to_dict(), "about": task.about, **own},
        "metrics": metrics,
        "series": series,
        "status": "ok" if error is None else "failed",
        "error": error,
    }
    return cast(Record, fields)


def _factors(candidate: str, width: int) -> str:
    """Sizes of the factors of a square layer, as ``first 8x8x8, second 8x8x8``."""
    if not width:
        return ""
    try:
        shapes = spec_of(candidate).plan(width, width).shapes
    except ValueError:
        return ""
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _place(candidate: str, width: int) -> dict[str, float | None]:
    try:
        found: Taxonomy | tuple[None, None, None] = place(candidate, width) if width else (None, None, None)
    except ValueError:
        found = (None, None, None)
    return dict(zip(("omega", "psi", "nu"), found, strict=True))
