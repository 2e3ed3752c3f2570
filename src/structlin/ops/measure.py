"""How long the candidates for a layer take, on random inputs of the size in question.

Two times are taken. ``eager``: launched from Python, as the next line of a script would see it. ``graph``: on the
device alone, with the launches queued ahead, as in the replay of a CUDA graph. They differ where launching takes longer
than the work, and so may the winner. In inference the first also finds a dense weight that was kept; a graph or
compiled code multiplies it out each time, since the factors may have changed.

Everything runs in a thread of its own, which has none of the caller's state: no autocast, no gradient mode, no hooks on
saved tensors, no transform.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..once import alone
from . import dense, joined
from .chain import multiply
from .lowering import Program, plan_of
from .moves import Kernels, kernels_on
from .schedule import schedule

WARMUP = 3  # calls of each candidate before the first sample
SAMPLES = 10  # of each candidate, in turns

Times = dict[str, dict[str, float]]
"""``{"eager": {backend: ms}, "graph": {backend: ms}}``."""

Run = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Subject:
    """A layer, as far as its time depends on it; ``kept`` as in `structlin.plan.Plan`."""

    what: Program
    kept: tuple[int, int] | None
    dtype: torch.dtype
    tokens: int
    device: torch.device
    training: bool


def structured(what: Program, dtype: torch.dtype, tokens: int, device: torch.device) -> tuple[str, ...]:
    """The backends that run the steps of a program there: `joined` for a sum that can be one product, `triton` where a
    kernel of ours takes part, and `bmm`."""
    found = ("bmm",) if joined.joined(what) is None else ("joined", "bmm")
    ours = kernels_on(device, dtype)
    none = Kernels(False, False)
    if what.in_place and ours != none and schedule(what.text, tokens, ours) != schedule(what.text, tokens, none):
        return (*found[:-1], "triton", "bmm")
    return found


def times(subject: Subject) -> Times:
    """Milliseconds of every candidate that did not run out of memory: the median of what Python launches, and the least
    on the device alone, to which a busy host can only add."""

    def body() -> Times:
        try:
            operands = _Operands(subject)
        except torch.OutOfMemoryError:
            return {"eager": {}, "graph": {}}
        eager = _measured(operands, not subject.training, 0.0, statistics.median)
        # queued behind twice the time that launching can take; what is compiled or captured may not keep a weight
        ahead = min(0.05, 2e-3 * max(eager.values(), default=0.0) + 1e-3)
        graph = _measured(operands, False, ahead, min)
        return {"eager": eager, "graph": graph}

    return _apart(subject.device, body)


def warm_up(subject: Subject, backend: str) -> None:
    """Run one candidate once, so that its kernels are compiled and its tables are on the device."""
    _apart(subject.device, lambda: _Operands(subject).run(backend, False)())


def seconds(run: Run, device: torch.device, ahead: float) -> float:
    """Seconds that ``run`` takes; on a GPU by events, after the device was kept busy for ``ahead`` seconds."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if ahead:
        torch.cuda._sleep(int(2e9 * ahead))  # in cycles, of which no GPU makes more in a second
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _apart(device: torch.device, body: Callable[[], Result]) -> Result:
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> Result:
        if stream is None:
            return body()
        torch.cuda.synchronize(device)  # makes the context that of this thread
        with torch.cuda.stream(stream):
            return body()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _measured(
    operands: _Operands, keep: bool, ahead: float, summary: Callable[[list[float]], float]
) -> dict[str, float]:
    subject = operands.subject
    runs: dict[str, Run] = {}
    samples: dict[str, list[float]] = {}
    for name in (*structured(subject.what, subject.dtype, subject.tokens, subject.device), "dense"):
        with suppress(torch.OutOfMemoryError):  # whoever runs out of memory loses
            run = operands.run(name, keep)
            for _ in range(WARMUP):
                run()
            runs[name], samples[name] = run, []
    with alone():  # kernels are compiled by now, beside others
        for _ in range(SAMPLES):
            for name in list(samples):
                try:
                    samples[name].append(seconds(runs[name], subject.device, ahead))
                except torch.OutOfMemoryError:
                    del samples[name]
    return {name: 1e3 * summary(taken) for name, taken in samples.items()}


class _Operands:
    """Random input, factors and gradient of the output of a layer, drawn without touching the caller's random state."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.plan = subject, plan_of(subject.what, subject.kept)
        generator = torch.Generator(subject.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=subject.device, dtype=subject.dtype)

        self.x = random(subject.tokens, self.plan.in_features).requires_grad_(subject.training)
        self.factors = [random(*shape).requires_grad_(subject.training) for shape in self.plan.shapes.values()]
        self.dy = random(subject.tokens, self.plan.out_features) if subject.training else None

    def run(self, backend: str, keep: bool) -> Run:
        """One call by ``backend``, forward, or in training forward and all gradients, which are dropped; with ``keep``
        a dense weight is multiplied out beforehand."""
        kept = dense.weight(self.plan, self.factors) if backend == "dense" and keep else None

        def step() -> object:
            y = self._forward(backend, kept)
            return y if self.dy is None else torch.autograd.grad(y, (self.x, *self.factors), self.dy)

        return step

    def _forward(self, backend: str, kept: Tensor | None) -> Tensor:
        if backend == "dense":
            return F.linear(self.x, dense.weight(self.plan, self.factors) if kept is None else kept)
        padded = F.pad(self.x, (0, self.plan.padded[1] - self.plan.in_features)) if self.plan.kept else self.x
        how = joined.joined(self.subject.what) if backend == "joined" else None
        if how is None:
            y = multiply(padded, self.factors, self.subject.what, kernels=backend != "bmm")
        else:
            y = joined.multiply(padded, self.factors, how)
        return y[:, : self.plan.out_features].contiguous()
