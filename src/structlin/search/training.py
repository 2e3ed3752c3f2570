"""One candidate trained under its budget: a generator of what is known so far, so that whoever runs it, in this process
or on another machine, can show progress and stop it early.

The clock runs in training steps only, not in drawing batches and validating. All random numbers follow from the seed.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import describe_device
from ..optim import param_groups
from ..surgery import to_structured_
from ..train.worker import BETAS, CLIP, DivergedError, schedule
from .presets import load_task
from .tasks import Batch, Task

POINTS = 8
"""Validations of a run, evenly spread over its budget; successive halving may stop a run at each but the last."""


@dataclass(frozen=True)
class Job:
    """All that a run needs, wherever it runs.

    Attributes:
        number: of the trial; -1 is the dense model.
        candidate: from the space.
        task, preset, data, task_steps, seed: of the task.
        width: of the model.
        steps: updates; None to train until the clock says ``seconds``.
        seconds: of training steps, where ``steps`` is None.
        lr: peak rate of a dense layer at the task's width.
        device: as torch names it.
        threads: of the CPU.
    """

    number: int
    candidate: str
    task: str
    preset: str
    data: tuple[str, ...]
    task_steps: int | None
    seed: int
    width: int
    steps: int | None
    seconds: float | None
    lr: float
    device: str
    threads: int


def outcome(job: Job) -> Iterator[dict[str, Any]]:
    """What `train` yields; an exception becomes ``{"error": text}`` of one line."""
    try:
        yield from train(job)
    except DivergedError as error:
        yield {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        yield {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def train(job: Job) -> Iterator[dict[str, Any]]:
    """Train a candidate, yielding where it runs (``device``, ``pid``), then a point at each of `POINTS` shares.

    A point has ``point`` (1 to `POINTS`), ``step``, ``seconds``, ``train_loss`` (mean since the point before),
    ``valid_loss`` and ``peak_memory_bytes`` (of tensors on a GPU, None elsewhere).

    Raises:
        DivergedError: for a loss that is not finite.
        OptionError: for data that is not there.
        ValueError: for a structure that does not fit.
    """
    torch.set_num_threads(job.threads)
    task = load_task(job.task, job.preset, job.data, job.seed, job.task_steps)
    run = _Run(job, task)
    yield {"device": describe_device(run.device), "pid": os.getpid()}
    for point in range(1, POINTS + 1):
        while run.share() < point / POINTS:
            run.update()
        yield {
            "point": point, "step": run.step, "seconds": run.seconds, "train_loss": run.mean_loss(),
            "valid_loss": run.evaluate(), "peak_memory_bytes": run.peak_memory(),
        }  # fmt: skip


class _Run:
    """Model, optimizer and clock of a job."""

    def __init__(self, job: Job, task: Task) -> None:
        self.job, self.task, self.device = job, task, torch.device(job.device)
        torch.manual_seed(job.seed)
        self.model = task.model(job.width)
        to_structured_(self.model, task.rules(job.candidate, job.width))
        self.model.to(self.device)
        task.to(self.device)
        with torch.device("meta"):
            base = task.model(task.sizes.width)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, job.lr, base=base), betas=BETAS, fused=True)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step, self.seconds, self.mean = 0, 0.0, math.nan
        self.losses: list[float] = []
        self._valid = [self._there(batch) for batch in task.validation()]
        self._loss(self._there(task.batch(0))).backward()  # libraries load and kernels compile outside of the clock
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def share(self) -> float:
        """How much of the budget is used, from 0 on."""
        if self.job.steps is not None:
            return self.step / self.job.steps
        assert self.job.seconds is not None
        return self.seconds / self.job.seconds

    def update(self) -> None:
        """One step; only this is timed."""
        batch = self._there(self.task.batch(self.step))
        start = time.perf_counter()
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._rate()
        loss = self._loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, so that the clock is right
        self.step += 1
        self.seconds += time.perf_counter() - start
        self._finite("loss", self.losses[-1])

    def mean_loss(self) -> float:
        """Mean training loss since the point before; that of the point before where there was no step since."""
        if self.losses:
            self.mean = sum(self.losses) / len(self.losses)
            self.losses.clear()
        return self.mean

    def peak_memory(self) -> int | None:
        """Most bytes that tensors took on a GPU; a CPU's process is not this run's alone."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over examples."""
        sums = [self._loss(batch).item() * len(batch[0]) for batch in self._valid]
        return self._finite("validation loss", sum(sums) / sum(len(batch[0]) for batch in self._valid))

    def _rate(self) -> float:
        if self.job.steps is not None:
            return schedule(self.step, self.job.steps)
        # in thousandths of the clock, the first of which no step can be sure to meet
        return schedule(min(int(1000 * self.share()), 999), 1000)

    def _loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)

    def _there(self, batch: Batch) -> Batch:
        return tuple(part.to(self.device) for part in batch)

    def _finite(self, what: str, value: float) -> float:
        if not math.isfinite(value):
            raise DivergedError(f"{what} is {value} at step {self.step}")
        return value
