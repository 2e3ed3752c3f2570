"""One run: for every problem check every contender, time those that are right in turns, and write down all of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .. import analysis
from ..machine import provenance
from ..nn import StructuredLinear
from ..plan import Plan
from ..report.records import Record
from ..structures import Dense
from . import block, contenders, gate, roofline, timing
from .contenders import LINEAR, Contender, Inputs, ModuleContender
from .problems import BlockProblem, Problem
from .race import MEANS, NO_GRAPH, NOT_TRIED, Metrics, Outcome, one_line, race
from .settings import DTYPES, Settings


def run(settings: Settings, command: str) -> Iterator[list[Record]]:
    """Measure the ceilings of the machine, then yield the records of one problem after another.

    A contender that is wrong, or cannot run, gets a record that says so, with status "failed" and without times.
    """
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # streams and graphs are those of the current device
    clock = timing.Clock(device)
    torch.manual_seed(settings.seed)
    ceilings = roofline.measure(clock, DTYPES[settings.dtype])
    for problem in settings.problems:
        torch.manual_seed(settings.seed)
        try:
            if isinstance(problem, BlockProblem):
                outcomes = block.measure(problem, settings, clock)
            else:
                outcomes = _measure(settings, problem, clock, ceilings)
        except RuntimeError as error:  # out of memory, mostly: no number of this problem can be trusted
            reason = f"cannot run: {one_line(error)}"
            outcomes = [(name, {}, NOT_TRIED, reason) for name in problem.contenders(settings.backends)]
        where = provenance(command, settings.seed, device)
        yield [_record(where, settings, problem, *outcome) for outcome in outcomes]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _record(
    where: dict[str, Any],
    settings: Settings,
    problem: Problem | BlockProblem,
    name: str,
    metrics: Metrics,
    graph: str,
    error: str | None,
) -> Record:
    fields = {
        "kind": "bench",
        "name": f"{problem} {name}",
        **where,
        "config": {**settings.config(problem, name), "graph": graph},
        "metrics": metrics,
        "status": "failed" if error else "ok",
        "error": error,
    }
    return cast(Record, fields)


def _measure(settings: Settings, problem: Problem, clock: timing.Clock, ceilings: roofline.Ceilings) -> list[Outcome]:
    inputs = _inputs(settings, problem, clock.device)
    layer = StructuredLinear(
        problem.in_features,
        problem.out_features,
        problem.spec,
        bias=False,
        device=clock.device,
        dtype=DTYPES[settings.dtype],
    )
    ready, errors, metrics = _check(settings, layer, inputs)
    graphs = dict.fromkeys(ready, NO_GRAPH)
    for mode in settings.modes:
        for name, found in race(settings, clock, ready, mode, len(inputs), graphs).items():
            metrics[name] |= found
    for name in ready:
        plan = Dense().plan(problem.out_features, problem.in_features) if name == LINEAR else problem.plan
        metrics[name] |= _derived(settings, plan, metrics[name], metrics[LINEAR], ceilings)
    return [
        (name, metrics[name] if name in ready else {}, graphs.get(name, NOT_TRIED), errors.get(name))
        for name in settings.backends
    ]


def _inputs(settings: Settings, problem: Problem, device: torch.device) -> Inputs:
    dtype = DTYPES[settings.dtype]
    nbytes = settings.tokens * (problem.in_features + problem.out_features) * dtype.itemsize

    def random(width: int) -> Tensor:
        return torch.randn(settings.tokens, width, device=device, dtype=dtype)

    return [
        (random(problem.in_features).requires_grad_(), random(problem.out_features))
        for _ in range(timing.number_of_sets(device, nbytes))
    ]


def _check(
    settings: Settings, layer: StructuredLinear, inputs: Inputs
) -> tuple[dict[str, Contender], dict[str, str], dict[str, Metrics]]:
    """The contenders that are right, why the others are not, and the errors of all against float64."""
    ready: dict[str, Contender] = {}
    errors: dict[str, str] = {}
    metrics: dict[str, Metrics] = {}
    truth = gate.truth(layer, inputs)
    for name in settings.backends:
        metrics[name] = {"error": None}
        try:
            contender = contenders.build(name, layer, inputs)
            if isinstance(contender, ModuleContender) and name != LINEAR:
                metrics[name]["error"] = gate.check(contender, truth, settings.modes)
        except AssertionError as wrong:
            errors[name] = f"not timed, because it is wrong: {wrong}"
        except Exception as failure:  # a backend or a compiler that this machine cannot run; others still can
            errors[name] = f"cannot run: {one_line(failure)}"
        else:
            ready[name] = contender
    return ready, errors, metrics


def _derived(settings: Settings, plan: Plan, own: Metrics, linear: Metrics, ceilings: roofline.Ceilings) -> Metrics:
    """Rates, the share of the roofline, and the speed-up over ``linear``; rates from the graph where there is one."""
    derived: Metrics = {"ceiling_tflops": ceilings.flops / 1e12, "ceiling_gbps": ceilings.bandwidth / 1e9}
    itemsize = DTYPES[settings.dtype].itemsize
    for mode in settings.modes:
        times = {means: own.get(f"{means}_{mode}_ms") for means in MEANS}
        for means, ms in times.items():
            dense = linear.get(f"{means}_{mode}_ms")
            derived[f"{means}_{mode}_speedup"] = dense / ms if ms and dense else None
        ms = times["graph"] or times["eager"]
        assert ms is not None
        passes = roofline.PASSES[mode]
        derived |= {
            f"{mode}_tflops": passes * settings.tokens * analysis.flops(plan) / ms / 1e9,
            f"{mode}_gbps": passes * analysis.traffic(plan, settings.tokens, itemsize) / ms / 1e6,
            f"{mode}_roofline": 1e3 * roofline.floor(plan, mode, settings.tokens, itemsize, ceilings) / ms,
        }
    return derived
