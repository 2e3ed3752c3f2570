"""What the host takes to launch one layer, beside nn.Linear. Prints what it finds and writes records.

    PYTHONPATH=src python benchmarks/host_time.py results/host-time-cpu.json
    PYTHONPATH=src python benchmarks/host_time.py results/host-time-cpu.json --before OTHER/src

Layers of 64 features and 8 tokens, so that next to nothing is computed, in float32 on one core of a CPU: the least of
many short turns of all layers, in microseconds, of a forward pass with gradients, of one with its backward pass, and of
one in inference mode. ``--before`` is the source of another version, measured in a process of its own in turn with this
one. A batched product of a CPU is a loop over its batch and takes longer than a launch on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import structlin as sl
from structlin.machine import provenance
from structlin.report import records

WIDTH, TOKENS, CALLS, TURNS, SEED = 64, 8, 15, 40, 0
SPECS = (
    "block_diagonal:nblocks=4", "low_rank:rank=8", "monarch:nblocks=4", "dyad:nblocks=4", "blast:nblocks=4:rank=8",
    "btt:rank=2", "pixelfly:block_size=16",
)  # fmt: skip
Times = dict[str, list[float]]


def calls(layer: nn.Module) -> list[Callable[[], object]]:
    """A forward pass, one with its backward pass, and one without gradients."""
    x, dy = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)

    def infer() -> None:
        with torch.inference_mode():
            layer(x)

    return [lambda: layer(x), lambda: layer(x).backward(dy), infer]


def measure() -> Times:
    """Name -> microseconds of each of `calls`."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    layers: dict[str, nn.Module] = {"linear": nn.Linear(WIDTH, WIDTH)}
    layers |= {text: sl.StructuredLinear(WIDTH, WIDTH, sl.spec.parse(text)) for text in SPECS}
    runs = {name: calls(layer) for name, layer in layers.items()}
    best = {name: [float("inf")] * 3 for name in runs}
    gc.disable()
    for turn in range(TURNS):
        for name, several in runs.items():
            for i, call in enumerate(several):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                taken = (time.perf_counter() - start) / CALLS * 1e6
                best[name][i] = min(best[name][i], taken) if turn else float("inf")
        gc.collect()
    return best


def in_turns(sources: list[Path]) -> list[Times]:
    """What `measure` finds with each source, the least of three processes."""
    found: list[Times] = [{} for _ in sources]
    for _ in range(3):
        for times, source in zip(found, sources, strict=True):
            environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "-"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, values in json.loads(done.stdout).items():
                times[name] = [min(pair) for pair in zip(values, times.get(name, values), strict=True)]
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file of records; - prints what one process finds")
    parser.add_argument("--before", type=Path, metavar="SRC", help="source of another version")
    options = parser.parse_args()
    if options.out == "-":
        print(json.dumps(measure()))
        return
    sources = [Path(sl.__file__).parents[1], *([options.before] if options.before else [])]
    now, *before = in_turns(sources)
    command = f"python benchmarks/host_time.py {options.out}" + " --before OTHER/src" * bool(before)
    found: list[records.Record] = []
    for name, values in now.items():
        metrics = dict(zip(("forward_us", "forward_backward_us", "inference_us"), values, strict=True))
        if before:
            others = before[0][name]
            metrics |= {f"before_{key}": value for key, value in zip(list(metrics), others, strict=True)}
        print(f"{name}: " + "  ".join(f"{key} {value:.1f}" for key, value in metrics.items()), flush=True)
        config = {"structure": name, "shape": [WIDTH, WIDTH], "tokens": TOKENS, "turns": TURNS}
        where = provenance(command, SEED, torch.device("cpu"))
        measured = {"config": config, "metrics": metrics, "status": "ok", "error": None}
        found.append({"kind": "spike", "name": f"host time {name}", **where, **measured})
    records.write(Path(options.out), found)


if __name__ == "__main__":
    main()
