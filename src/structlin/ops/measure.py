"""How long the candidates for a layer take, on random inputs of the size in question.

Two times are taken. ``eager``: launched from Python, as the next line of a script would see it. ``graph``: on the
device alone, with the launches queued ahead, as in the replay of a CUDA graph. They differ where launching takes longer
than the work, and so may the winner.

Everything runs in a thread of its own, which has none of the caller's state: no autocast, no gradient mode, no hooks on
saved tensors, no transform.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dense
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
    """The backends that run the steps of a program there: `triton` where a kernel of ours takes part, and `bmm`."""
    ours = kernels_on(device, dtype)
    none = Kernels(False, False)
    if what.in_place and ours != none and schedule(what.text, tokens, ours) != schedule(what.text, tokens, none):
        return "triton", "bmm"
    return ("bmm",)


def times(subject: Subject) -> Times:
    """Median milliseconds of every candidate that did not run out of memory."""

    def body() -> Times:
        runs = _warmed_up(subject)
        eager = _medians(runs, subject.device, {})
        # queued behind twice the time that launching can take
        graph = _medians(runs, subject.device, {name: min(0.05, 2e-3 * ms + 2e-4) for name, ms in eager.items()})
        return {"eager": eager, "graph": graph}

    return _apart(subject.device, body)


def warm_up(subject: Subject, backend: str) -> None:
    """Run one candidate once, so that its kernels are compiled and its tables are on the device."""
    _apart(subject.device, lambda: _candidate(subject, backend)())


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
        with torch.cuda.stream(stream):
            return body()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _warmed_up(subject: Subject) -> dict[str, Run]:
    names = (*structured(subject.what, subject.dtype, subject.tokens, subject.device), "dense")
    runs: dict[str, Run] = {}
    for name in names:
        try:
            run = _candidate(subject, name)
            for _ in range(WARMUP):
                run()
            runs[name] = run
        except torch.OutOfMemoryError:
            continue  # it loses
    return runs


def _medians(runs: dict[str, Run], device: torch.device, ahead: dict[str, float]) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(SAMPLES):
        for name, run in runs.items():
            try:
                if name in samples:
                    samples[name].append(seconds(run, device, ahead.get(name, 0.0)))
            except torch.OutOfMemoryError:
                del samples[name]
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def _candidate(subject: Subject, backend: str) -> Run:
    """One call of the layer by ``backend``: forward, or in training forward and all gradients, which are dropped."""
    what, training = subject.what, subject.training
    plan = plan_of(what, subject.kept)
    generator = torch.Generator(subject.device).manual_seed(0)  # the caller's random state stays as it is

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=subject.device, dtype=subject.dtype)
        return drawn.requires_grad_(training)

    x, factors = random(subject.tokens, plan.in_features), [random(*shape) for shape in plan.shapes.values()]
    kept = dense.weight(plan, factors) if backend == "dense" and not training else None

    def forward() -> Tensor:
        if backend == "dense":
            return F.linear(x, dense.weight(plan, factors) if kept is None else kept)
        padded = F.pad(x, (0, plan.padded[1] - plan.in_features)) if plan.kept else x
        y = multiply(padded, factors, what, kernels=backend == "triton")
        return y[:, : plan.out_features].contiguous()

    dy = random(subject.tokens, plan.out_features).detach()

    def step() -> object:
        y = forward()
        return torch.autograd.grad(y, (x, *factors), dy) if training else y

    return step
