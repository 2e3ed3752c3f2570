"""All contenders of a problem timed in turns, launched from Python and as CUDA graphs, and the memory each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from . import timing
from .contenders import Contender, ModuleContender
from .settings import Settings

Metrics = dict[str, float | int | None]

MEANS = ("eager", "graph")
"""How a pass is launched: call by call from Python, or as one CUDA graph."""

NO_GRAPH, CAPTURED, NOT_TRIED = "none on this device", "captured", "not tried"

Outcome = tuple[str, Metrics, str, str | None]
"""A contender, its metrics, what became of its CUDA graph, and why it failed, if it did."""


def race(
    settings: Settings,
    clock: timing.Clock,
    ready: Mapping[str, Contender],
    mode: str,
    sets: int,
    graphs: dict[str, str],
) -> dict[str, Metrics]:
    """Metrics of one mode by contender: its time by both means, and its memory; notes captures in ``graphs``."""
    passes = {name: timing.one_pass(contender.step(mode), sets) for name, contender in ready.items()}
    found: dict[str, Metrics] = {name: {} for name in ready}
    runs: dict[str, Callable[[], object]] = dict(passes)
    for means in MEANS:
        if means == "graph":
            runs = _capture(passes, graphs) if clock.device.type == "cuda" else {}
        for name, times in timing.take_turns(clock, runs, sets, settings.repeats).items():
            found[name] |= {
                f"{means}_{mode}_ms": 1e3 * times.median,
                f"{means}_{mode}_p10_ms": 1e3 * times.p10,
                f"{means}_{mode}_p90_ms": 1e3 * times.p90,
                f"{means}_{mode}_samples": times.samples,
            }
    for name, contender in ready.items():
        for other in ready.values():
            other.clear()
        if isinstance(contender, ModuleContender):
            run_once = partial(contender.step(mode), 0)
            found[name][f"{mode}_peak_bytes"] = timing.peak_bytes(clock.device, run_once)
    return found


def _capture(passes: dict[str, Callable[[], Tensor]], graphs: dict[str, str]) -> dict[str, Callable[[], object]]:
    replays: dict[str, Callable[[], object]] = {}
    for name, run in passes.items():
        if graphs[name] not in (NO_GRAPH, CAPTURED):
            continue
        try:
            replays[name] = timing.capture(run).replay
        except RuntimeError as error:
            graphs[name] = f"not captured: {one_line(error)}"
        else:
            graphs[name] = CAPTURED
    return replays


def one_line(error: BaseException) -> str:
    """What ``error`` is and says, 500 letters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
