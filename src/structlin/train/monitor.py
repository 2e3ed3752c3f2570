"""What a run says about itself: loss, speed, share of the device's peak, memory and time left, and where that goes.

The device is waited for only here, when a line is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ..nn import routing_load
from ..progress import duration
from .checkpoints import Progress
from .config import OptionError
from .engine import Engine
from .model import flops_per_token, routers
from .recipe import Recipe
from .worker import DivergedError, peak_memory

Say = Callable[[str], None]

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


class Monitor:
    """Reads the losses of an `Engine`, times it, and reports."""

    def __init__(self, engine: Engine, progress: Progress, say: Say) -> None:
        self.engine, self.progress, self.say = engine, progress, say
        self.recipe: Recipe = engine.recipe
        self.tokens = self.recipe.batch * self.recipe.context
        self.peak = self.recipe.peak_flops or measured_peak(engine.device, self.recipe.dtype)
        self.first = progress.step
        self.start()

    def start(self) -> None:
        """Start the clock, after what is not training."""
        self.engine.restart()
        self.last, self.begun = self.progress.step, time.perf_counter()

    def read(self, done: int) -> None:
        """Wait for the device, and add a point to the curves at ``done`` updates.

        Raises:
            DivergedError: when an update had a gradient that is not finite; `Engine.healthy` is how many did not.
        """
        engine, progress = self.engine, self.progress
        loss = float(engine.accelerator.reduce(engine.loss_sum, "mean").item()) / max(1, engine.losses)
        seconds = time.perf_counter() - self.begun
        progress.seconds += seconds
        if engine.failed.item() or not math.isfinite(loss):
            raise DivergedError(f"loss or gradient is not finite at step {self.last + int(engine.healthy.item()) + 1}")
        progress.step = done
        progress.peak_memory = max(progress.peak_memory, peak_memory(engine.device))
        speed = (done - self.last) * self.tokens / seconds
        for name, value in (("step", done), ("seconds", progress.seconds), ("train_loss", loss)):
            progress.series[name].append(value)
        rate = self.recipe.lr * self.recipe.rate(done - 1)
        left = (self.recipe.steps - done) * seconds / (done - self.last)
        memory, spread = progress.peak_memory / 1e9, self._spread()
        self._line(
            f"step {done} of {self.recipe.steps}, {duration(left)} left: loss {loss:.4f}, rate {rate:.2e}, "
            f"{speed:,.0f} tokens/s, {self.utilisation(speed):.1%} of peak, {memory:.1f} GB"
            + "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in spread.items())
        )
        values = {"loss": loss, "lr": rate, "tokens_per_second": speed, "memory_gb": memory}
        engine.accelerator.log(values | spread, step=done)
        self.start()

    def _spread(self) -> dict[str, float]:
        """How this process's last tokens were spread over experts, where there are any; of all routers."""
        if not routers(self.engine.model):
            return {}
        found = routing_load(self.engine.model).values()
        entropy = sum(load.entropy.item() for load in found) / len(found)
        return {"largest_load": max(load.load.max().item() for load in found), "routing_entropy": entropy}

    def validated(self, loss: float) -> None:
        """Add a validation to the curves."""
        if not math.isfinite(loss):
            raise DivergedError(f"validation loss is {loss} at step {self.progress.step}")
        values = (("valid_step", self.progress.step), ("valid_seconds", self.progress.seconds), ("valid_loss", loss))
        for name, value in values:
            self.progress.series[name].append(value)
        self._line(f"step {self.progress.step}: validation loss {loss:.4f}")
        self.engine.accelerator.log({"valid_loss": loss}, step=self.progress.step)

    def utilisation(self, speed: float) -> float:
        """Model FLOPs at ``speed`` tokens a second as a share of the peak of all devices (MFU)."""
        spent: float = 3 * flops_per_token(self.recipe, self.engine.model) * speed
        processes: int = self.engine.accelerator.num_processes
        return spent / (self.peak * processes)

    def _line(self, text: str) -> None:
        if self.engine.accelerator.is_main_process:
            self.say(text)


def check_trackers(recipe: Recipe) -> None:
    """See that the packages of ``recipe.trackers`` are there; OptionError otherwise."""
    missing = [name for name in recipe.trackers if not any(map(find_spec, PACKAGES[name]))]
    if missing:
        hint = f"install with: pip install {' '.join(missing)}"
        raise OptionError("--trackers", f"{', '.join(missing)} is not installed; {hint}")


@torch.no_grad()
def measured_peak(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large matrix product on ``device`` in ``dtype``, the best of a few."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 512
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)
