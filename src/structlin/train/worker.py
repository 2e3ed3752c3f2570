"""One structure, trained in a process of its own: the whole loop, readable from top to bottom.

All structures start from the same seed: the model is built dense, so every layer that is not swapped has the same
initial weights, and step by step they see the same batches. The process reports every step through a pipe, so it ends
when nobody listens any more, and leaves a checkpoint behind from which the same numbers follow.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conversion import Conversion
from ..machine import describe_device, provenance, versions
from ..models.gpt import GPT, flops_per_token
from ..optim import param_groups
from ..report.records import Record
from ..surgery import to_structured_
from . import data, state
from .config import DTYPES, PRESETS, Config, rules

WARMUP = 0.1  # share of the steps over which the learning rate rises
THREADS = 1  # on a CPU: two are 15% faster here on an idle machine and four times slower on a busy one
EVALUATIONS = 10  # validation points on the curve of a run
MAX_INTERVAL = 500  # steps between two validations, and so between two checkpoints, at most
CLIP = 1.0  # norm of the gradient
BETAS = (0.9, 0.95)

Emit = Callable[[dict[str, Any]], None]


class DivergedError(ArithmeticError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class Job:
    """One structure of a comparison, and the folder that holds its text and its checkpoint."""

    config: Config
    structure: str
    folder: Path
    command: str

    @property
    def checkpoint(self) -> Path:
        """Where the state of the unfinished run is kept."""
        return self.folder / f"{self.config.structures.index(self.structure)}.safetensors"


def main(job: Job, connection: Connection) -> None:
    """Body of the process: send what `train` emits, then the `outcome`; ends with the process that listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    try:
        connection.send(outcome(job, connection.send))
    except BrokenPipeError:
        os._exit(1)


def outcome(job: Job, emit: Emit) -> dict[str, Any]:
    """``{"record": ...}`` of a run that ended, else ``{"error": ...}``, an OSError or a RuntimeError of one line."""
    try:
        return {"record": train(job, emit)}
    except OSError as error:
        return {"error": error}
    except Exception as error:
        traceback.print_exc()
        return {"error": RuntimeError(" ".join(f"{type(error).__name__}: {error}".split()))}


def train(job: Job, emit: Emit) -> Record:
    """Train one structure to the end, from its checkpoint if there is one, and say what came out.

    Emits ``{"note": text}``, ``{"step": n, "loss": nats}`` and ``{"valid_loss": nats}``. A loss that is not finite ends
    the run with a record whose status is "failed".

    Raises:
        OSError: when a checkpoint cannot be written; the last one stays.
    """
    torch.set_num_threads(THREADS)
    trainer = Trainer(job)
    try:
        if job.checkpoint.exists():
            trainer.resume()
    except ValueError as error:
        emit({"note": f"{job.structure} starts anew: {error}"})
    try:
        trainer.warm_up()
        while trainer.run.step < job.config.steps:
            emit({"step": trainer.run.step + 1, "loss": trainer.step()})
            if trainer.run.step % trainer.interval == 0 or trainer.run.step == job.config.steps:
                emit({"valid_loss": trainer.evaluate()})
                trainer.save()
    except DivergedError as error:
        return trainer.record(str(error))
    return trainer.record()


class Trainer:
    """Model, optimizer and text of one job, and how far it is (``run``)."""

    def __init__(self, job: Job) -> None:
        self.job, self.preset, self.run = job, PRESETS[job.config.preset], state.State()
        self.device = torch.device(job.config.device)
        context = self.preset.model.context
        self.text = load_text(job.folder / "train.bin")
        self.validation = data.spread(load_text(job.folder / "valid.bin"), self.preset.valid_windows, context)
        self.model, self.conversion = build(job.config, job.structure)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr=job.config.lr), betas=BETAS, fused=True)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.environment = {"versions": versions(), "device": describe_device(self.device)}
        self.interval = min(math.ceil(job.config.steps / EVALUATIONS), MAX_INTERVAL)
        self.losses: list[float] = []

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss over windows, in the config's dtype: weights stay float32, autocast narrows the products."""
        dtype = DTYPES[self.job.config.dtype]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: Tensor = self.model.loss(windows.to(self.device))
        return loss

    def batch(self, step: int) -> Tensor:
        """Windows of one step, counted from 0."""
        return data.batch(self.text, self.job.config.seed, step, self.preset.batch_size, self.preset.model.context)

    def warm_up(self) -> None:
        """One pass without an update, so that libraries load, kernels compile and backends are chosen outside of the
        timed steps; what that takes of memory does not count."""
        self.loss(self.batch(0)).backward()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step(self) -> float:
        """One update; returns the loss before it. Only this is timed."""
        start = time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = rate * schedule(self.run.step, self.job.config.steps)
        loss = self.loss(self.batch(self.run.step))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, so that the clock is right
        self.run.step += 1
        self.run.seconds += time.perf_counter() - start
        return self._finite("loss", self.losses[-1])

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss in nats; adds a point to the curves."""
        chunks = self.validation.split(self.preset.batch_size)
        total = sum(self.loss(chunk).item() * len(chunk) for chunk in chunks)
        valid_loss = self._finite("validation loss", total / len(self.validation))
        self.run.peak_memory = max(self.run.peak_memory, peak_memory(self.device))
        train_loss = sum(self.losses) / len(self.losses)
        point = {
            "step": self.run.step, "seconds": self.run.seconds, "train_loss": train_loss, "valid_loss": valid_loss
        }  # fmt: skip
        for name, value in point.items():
            self.run.series[name].append(value)
        self.losses.clear()
        return valid_loss

    def save(self) -> None:
        """Write the checkpoint."""
        state.save(self.job.checkpoint, self.run, self.model, self.optimizer, self.environment)

    def resume(self) -> None:
        """Continue from the checkpoint; ValueError if it does not fit this job."""
        self.run = state.load(self.job.checkpoint, self.model, self.optimizer, self.environment)

    def record(self, error: str | None = None) -> Record:
        """What came out; ``error`` makes it a failure."""
        run, tokens = self.run, self.run.step * self.preset.batch_size * self.preset.model.context
        last = {name: values[-1] if values and error is None else None for name, values in run.series.items()}
        metrics: dict[str, float | int | None] = {
            "swapped_params": sum(swap.params for swap in self.conversion),
            "model_params": sum(parameter.numel() for parameter in self.model.parameters()),
            "swapped_flops_per_token": sum(swap.flops for swap in self.conversion),
            "flops_per_token": flops_per_token(self.model),
            "steps": run.step,
            "tokens": tokens,
            "train_seconds": run.seconds,
            "tokens_per_second": tokens / run.seconds,
            "train_loss": last["train_loss"],
            "valid_loss": last["valid_loss"],
            "bits_per_byte": None if last["valid_loss"] is None else last["valid_loss"] / math.log(2),
            "peak_memory_bytes": max(run.peak_memory, peak_memory(self.device)),
            "seconds_to_dense_loss": None,
        }
        fields = {
            "kind": "compare",
            "name": self.job.structure,
            **provenance(self.job.command, self.job.config.seed, self.device),
            "config": {**self.job.config.to_dict(), "structure": self.job.structure},
            "metrics": metrics,
            "series": run.series,
            "status": "ok" if error is None else "failed",
            "error": error,
        }
        return cast(Record, fields)

    def _finite(self, what: str, value: float) -> float:
        if not math.isfinite(value):
            raise DivergedError(f"{what} is {value} at step {self.run.step} of {self.job.config.steps}")
        return value


def build(config: Config, structure: str) -> tuple[GPT, Conversion]:
    """The model on the CPU, ``structure`` swapped in; layers that stay have the same weights for every structure."""
    torch.manual_seed(config.seed)
    model = GPT(PRESETS[config.preset].model)
    return model, to_structured_(model, rules(config.where, structure))


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear rise, then a cosine down to zero at ``steps``."""
    return min((step + 1) / (WARMUP * steps), 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def load_text(path: Path) -> Tensor:
    """The bytes of a file, uint8, mapped into memory: text is shared with other processes and read as it is used."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: tensors on a GPU, else this process as a whole, interpreter and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
