"""Training on a problem, from a recipe to a record, on one device.

The folder of a run holds ``run.json`` (recipe and data; another run may not share it), ``checkpoint.safetensors``, and
at the end ``model/``, ``picture.png`` where matplotlib is installed, and ``record.json``. The same call goes on after
whatever stopped the one before, to the same bits on a CPU.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..machine import describe_device, provenance, versions
from ..ops.choice import MEASURED
from ..optim import param_groups
from ..report import records
from ..report.records import Record
from ..surgery import to_structured_
from ..train import rules, state
from ..train.config import device_of
from ..train.folder import MODEL, RECORD, check_writable, claim, finished, locked
from ..train.worker import DivergedError, peak_memory
from .problem import Batch, Problem, ProblemRecipe

CHECKPOINT, PICTURE = "checkpoint.safetensors", "picture.png"
Say = Callable[[str], None]


def train(recipe: ProblemRecipe, folder: Path, command: str, say: Say = print) -> Record:
    """Train what ``recipe`` says in ``folder``, from its checkpoint if there is one, and say what came out.

    Args:
        recipe: the run.
        folder: made if needed.
        command: for the record.
        say: called with lines of progress.

    Returns:
        The record, which is in ``folder`` too; its status is "failed" where a loss was not finite.

    Raises:
        OptionError: for a recipe that does not fit this machine, its data or ``folder``; nothing was trained then.
        OSError: when something cannot be written; the checkpoint before it stays.
    """
    check_writable(folder)
    device = torch.device(device_of(None if recipe.device == "auto" else recipe.device))
    problem = recipe.problem()
    check(recipe, problem)
    with locked(folder):
        claim(folder, {"command": command, "recipe": recipe.to_dict(), "data": problem.about})
        if (done := finished(folder / RECORD)) is not None:
            return done
        run = Run(recipe, problem, device, say)
        run.resume(folder / CHECKPOINT)
        error, tested = None, {}
        try:
            while run.state.step < recipe.steps:
                run.advance()
                if run.due("valid"):
                    run.evaluate()
                if run.due("checkpoint"):
                    run.save(folder / CHECKPOINT)
            tested = run.test()
        except DivergedError as failure:
            error = str(failure)
        record = run.record(command, tested, error)
        if error is None:
            shutil.rmtree(folder / MODEL, ignore_errors=True)  # left by a run that was killed here
            checkpoint.save(run.model, folder / MODEL)
            if find_spec("matplotlib"):
                run.watched(lambda: problem.picture(run.model, run.state.series, folder / PICTURE))
        records.write(folder / RECORD, [record])
    return record


def check(recipe: ProblemRecipe, problem: Problem) -> None:
    """See that the structure fits the layers, on shapes alone.

    Raises:
        OptionError: for a structure that does not fit, or layers that are not there.
    """
    with torch.device("meta"):
        model = problem.model()
    rules.check(model, problem.rules(), recipe.init)


class Run:
    """Model and optimizer of a recipe on a device, and how far it is (``state``)."""

    def __init__(self, recipe: ProblemRecipe, problem: Problem, device: torch.device, say: Say) -> None:
        self.recipe, self.problem, self.device, self.say = recipe, problem, device, say
        torch.manual_seed(recipe.seed)
        self.model = problem.model()
        self.conversion = to_structured_(self.model, problem.rules(), init=recipe.init)
        self.model.to(device).train()
        problem.to(device)
        groups = param_groups(self.model, recipe.lr, recipe.weight_decay, multipliers=problem.rates())
        fused = not any(parameter.is_complex() for parameter in self.model.parameters())
        betas = recipe.beta1, recipe.beta2
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=recipe.eps, fused=fused, foreach=not fused)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        compiled = recipe.compile != "none"
        self._loss = torch.compile(problem.loss, mode=recipe.compile) if compiled else problem.loss
        self.state = state.State()
        self.metrics: dict[str, float] = {}
        self.environment = {"versions": versions(), "device": describe_device(device)}
        self._sum, self._count = torch.zeros((), device=device), 0
        self._train_loss, self._losses = 0.0, 0

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint at ``path``, if one is there and fits, and compile what the steps will run."""
        if path.exists():
            try:
                self.state = state.load(path, self.model, self.optimizer, self.environment)
            except ValueError as error:
                self.say(f"starting anew: {error}")
        batch = self.problem.batch(self.state.step)
        if self.conversion and self.recipe.compile != "none" and self.device.type in MEASURED:
            self.loss(batch, self.problem.loss).backward()  # layers choose backends; compiled code measures nothing
        self.loss(batch).backward()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def loss(self, batch: Batch, run: Callable[..., Tensor] | None = None) -> Tensor:
        """Loss of a batch by ``run``, else the compiled one; products in the recipe's dtype, weights stay float32."""
        if self.recipe.compile in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        there = tuple(part.to(self.device, non_blocking=True) for part in batch)
        with self.autocast():
            found: Tensor = (run or self._loss)(self.model, there)
        return found

    def autocast(self) -> torch.autocast:
        """Where products have the recipe's dtype."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16")

    def advance(self) -> None:
        """Updates until the next line of progress; only they are timed, and nothing is read back between them.

        Raises:
            DivergedError: when a loss was not finite.
        """
        start, first = time.perf_counter(), self.state.step
        while True:
            self._update()
            if any(self.due(name) for name in ("log", "valid", "checkpoint")):
                break
        total = self._sum.item()  # waits for the device, so that the clock is right
        seconds, done = time.perf_counter() - start, self.state.step - first
        if not math.isfinite(total):
            raise DivergedError(f"the loss is {total} between steps {first + 1} and {self.state.step}")
        self.state.seconds += seconds
        self.state.peak_memory = max(self.state.peak_memory, peak_memory(self.device))
        self._train_loss, self._losses = self._train_loss + total, self._losses + self._count
        left = (self.recipe.steps - self.state.step) * seconds / done
        if self.due("log"):
            self.say(
                f"step {self.state.step} of {self.recipe.steps}, {left:.0f} s left: loss {total / self._count:.4f}, "
                f"{1e3 * seconds / done:.1f} ms a step"
            )
        self._sum, self._count = torch.zeros((), device=self.device), 0

    def due(self, name: str) -> bool:
        """Whether what ``NAME_every`` counts is to be done after the last update."""
        return self.recipe.due(name, self.state.step)

    def evaluate(self) -> None:
        """Measure on validation data; adds a point to the curves.

        Raises:
            DivergedError: when the loss is not finite.
        """
        self.metrics = self.watched(lambda: self.problem.evaluate(self.model))
        if not math.isfinite(self.metrics["valid_loss"]):
            raise DivergedError(f"validation loss is {self.metrics['valid_loss']} at step {self.state.step}")
        train_loss = self._train_loss / max(1, self._losses)
        self._train_loss, self._losses = 0.0, 0
        point = {"step": self.state.step, "seconds": self.state.seconds, "train_loss": train_loss, **self.metrics}
        for name, value in point.items():
            self.state.series.setdefault(name, []).append(value)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.metrics.items())
        self.say(f"step {self.state.step}: {shown}")

    def test(self) -> dict[str, float]:
        """Measure on test data."""
        if not self.metrics:  # the last update was made by a run that was killed after it
            self.evaluate()
        found: dict[str, float] = self.watched(lambda: self.problem.test(self.model))
        return found

    def watched(self, measure: Callable[[], Any]) -> Any:
        """What ``measure`` gives in eval mode, without gradients, in the recipe's dtype."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                return measure()
        finally:
            self.model.train()

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state.save(path, self.state, self.model, self.optimizer, self.environment)

    def record(self, command: str, tested: dict[str, float], error: str | None) -> Record:
        """What came out; ``error`` makes it a failure."""
        done, seconds = self.state.step, self.state.seconds
        found = {**self.metrics, **tested} if error is None else {"valid_loss": None}
        metrics: dict[str, float | int | None] = {
            "swapped_params": sum(swap.params for swap in self.conversion),
            "replaced_params": sum(swap.dense_params for swap in self.conversion),
            "model_params": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": done,
            "train_seconds": seconds,
            "step_seconds": seconds / done if done else None,
            "examples_per_second": done * self.recipe.batch / seconds if seconds else None,
            "peak_memory_bytes": self.state.peak_memory,
            **found,
        }
        fields = {
            "kind": "train", "name": self.recipe.name, **provenance(command, self.recipe.seed, self.device),
            "config": {**self.recipe.to_dict(), "about": self.problem.about}, "metrics": metrics,
            "series": self.state.series, "status": "ok" if error is None else "failed", "error": error,
        }  # fmt: skip
        return cast(Record, fields)

    def _update(self) -> None:
        step = self.state.step
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.recipe.rate(step)
        loss = self.loss(self.problem.batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._sum += loss.detach()
        self._count += 1
        self.state.step += 1
