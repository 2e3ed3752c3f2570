"""How time and memory are measured: one sample is a pass over all sets of inputs, and all contenders take turns.

Taking turns lets a drift of the clock rate hit all alike. The sets of inputs together exceed the cache, so that a pass
reads memory as a network would. On a GPU a pass is timed by events on the device, once launched call by call from
Python and once as the replay of a CUDA graph; where the launches take longer than the work, only the latter is the
time of the work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..once import alone

CACHES = 3  # the inputs of a pass are this many times as large as the cache
MIN_SETS, MAX_SETS = {"cuda": 4, "cpu": 2}, 64
WARMUP = {"cuda": 3, "cpu": 1}  # passes before the first sample
MIN_SAMPLES = 3
BUDGET = {"cuda": 8.0, "cpu": 1.0}  # seconds for the samples of all contenders of a problem in one mode

Step = Callable[[int], Tensor]
"""Runs a contender once, on the set of inputs of that number, and returns what it wrote last."""


@dataclass(frozen=True)
class Clock:
    """Times work on one device: by events on a GPU, by `time.perf_counter` on the CPU."""

    device: torch.device

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds that ``run`` takes on the device, idle before and after."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Times:
    """Median and the 10th and 90th percentile of the samples, in seconds per call, and the number of samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        """Summarise two or more samples."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def number_of_sets(device: torch.device, nbytes: int) -> int:
    """How many sets of inputs of ``nbytes`` each a pass goes through: `CACHES` times the cache, within limits."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MAX_SETS, max(MIN_SETS[device.type], -(-CACHES * cache // nbytes)))


def one_pass(step: Step, sets: int) -> Callable[[], Tensor]:
    """A function that runs ``step`` on every set of inputs and returns what the last call wrote."""

    def run() -> Tensor:
        for index in range(sets - 1):
            step(index)
        return step(sets - 1)

    return run


def take_turns(clock: Clock, runs: Mapping[str, Callable[[], Any]], sets: int, repeats: int) -> dict[str, Times]:
    """Time every run in turns after a warm-up; seconds per call for runs of ``sets`` calls each.

    Ends after ``repeats`` samples of each, or with `MIN_SAMPLES` or more when `BUDGET` is used up. No process does so
    beside another one with the same `structlin.once.ALONE`.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with alone():
        for run in list(runs.values()) * WARMUP[clock.device.type]:
            run()
        begin = time.perf_counter()
        for index in range(repeats):
            if index >= MIN_SAMPLES and time.perf_counter() - begin > BUDGET[clock.device.type]:
                break
            for name, run in runs.items():
                samples[name].append(clock.seconds(run) / sets)
    return {name: Times.of(taken) for name, taken in samples.items()}


def capture(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """``run`` as a CUDA graph, whose replay is seen to write the result of ``run`` anew.

    Raises:
        RuntimeError: when it cannot be captured, or the replay leaves the result as it was.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # a backward pass syncs with the stream where its graph was first built
        result = run()
    with torch.no_grad():
        result.fill_(float("nan"))
        graph.replay()
        if not result.isfinite().all():
            raise RuntimeError("the replay of the CUDA graph does not write the result")
    graph.captured = run  # type: ignore[attr-defined]  # a replay reads its inputs where they were
    return graph


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int | None:
    """Most memory that tensors take while ``run`` runs a second time, beyond what they took before the first.

    So what is kept from call to call counts, and what only the first call needs does not. None on the CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
