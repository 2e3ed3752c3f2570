"""What the host takes to launch one layer, beside nn.Linear. Prints what it finds and writes records.

    PYTHONPATH=src python benchmarks/host_time.py results/host-time-cpu.json
    PYTHONPATH=src python benchmarks/host_time.py results/host-time-cpu.json --before OTHER/src
    PYTHONPATH=src python benchmarks/host_time.py results/host-time-h200.json --device cuda

The least of many short turns of all layers, in microseconds, of a forward pass with gradients, of one with its backward
pass, of the same with the backward pass in the thread that asks for it, and of one in inference mode. On one core of a
CPU layers have 64 features, 8 tokens and float32, so that next to nothing is computed; a batched product is a loop over
its batch there and takes longer than a launch on a GPU. There they have 1024 features, 256 tokens and bfloat16, so that
kernels of ours run, and what is timed is launching. ``--before`` is the source of another version, measured in a
process of its own in turn with this one. ``--profile SPEC`` prints where a pass forward and backward spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structlin as sl
from structlin.machine import provenance
from structlin.report import records

CALLS, TURNS, SEED = 15, 40, 0
SIZES = {"cpu": (64, 8, torch.float32), "cuda": (1024, 256, torch.bfloat16)}  # features, tokens
PASSES = ("forward_us", "forward_backward_us", "same_thread_us", "inference_us")
SPECS = (
    "block_diagonal:nblocks=4", "low_rank:rank=8", "monarch:nblocks=4", "dyad:nblocks=4", "blast:nblocks=4:rank=8",
    "btt:rank=2", "pixelfly:block_size=16",
)  # fmt: skip
Times = dict[str, list[float]]


def calls(layer: nn.Module, device: str) -> list[Callable[[], object]]:
    """What `PASSES` names."""
    width, tokens, dtype = SIZES[device]
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, width, device=device, dtype=dtype)

    def in_one_thread() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            layer(x).backward(dy)

    def infer() -> None:
        with torch.inference_mode():
            layer(x)

    return [lambda: layer(x), lambda: layer(x).backward(dy), in_one_thread, infer]


def made(text: str, device: str) -> nn.Module:
    """``nn.Linear``, or a structured layer by the text of its spec."""
    width, _, dtype = SIZES[device]
    kind: Any = nn.Linear if text == "linear" else partial(sl.StructuredLinear, spec=sl.spec.parse(text))
    layer: nn.Module = kind(width, width, device=device, dtype=dtype)
    return layer


def measure(device: str) -> Times:
    """Name -> microseconds of each of `PASSES`."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    runs = {name: calls(made(name, device), device) for name in ("linear", *SPECS)}
    best = {name: [float("inf")] * len(PASSES) for name in runs}
    gc.disable()
    for turn in range(TURNS):
        for name, several in runs.items():
            for i, call in enumerate(several):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                taken = (time.perf_counter() - start) / CALLS * 1e6
                best[name][i] = min(best[name][i], taken) if turn else float("inf")
                if device == "cuda":
                    torch.cuda.synchronize()
        gc.collect()
    return best


def profiled(text: str, device: str) -> None:
    """Print where the passes forward and backward of a layer spend their time, in one thread."""
    torch.set_num_threads(1)
    call = calls(made(text, device), device)[PASSES.index("same_thread_us")]
    for _ in range(100):
        call()
    profile = cProfile.Profile()
    with profile:
        for _ in range(1000):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def in_turns(sources: list[Path], device: str) -> list[Times]:
    """What `measure` finds with each source, the least of three processes."""
    found: list[Times] = [{} for _ in sources]
    for _ in range(3):
        for times, source in zip(found, sources, strict=True):
            environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "-", "--device", device]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, values in json.loads(done.stdout).items():
                times[name] = [min(pair) for pair in zip(values, times.get(name, values), strict=True)]
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file of records; - prints what one process finds")
    parser.add_argument("--before", type=Path, metavar="SRC", help="source of another version")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--profile", metavar="SPEC", help="of one structure, or linear; writes nothing")
    options = parser.parse_args()
    if options.profile:
        profiled(options.profile, options.device)
        return
    if options.out == "-":
        print(json.dumps(measure(options.device)))
        return
    sources = [Path(sl.__file__).parents[1], *([options.before] if options.before else [])]
    now, *before = in_turns(sources, options.device)
    command = f"python benchmarks/host_time.py {options.out}" + " --before OTHER/src" * bool(before)
    command += f" --device {options.device}" * (options.device != "cpu")
    width, tokens, dtype = SIZES[options.device]
    found: list[records.Record] = []
    for name, values in now.items():
        metrics = dict(zip(PASSES, values, strict=True))
        if before:
            others = before[0][name]
            metrics |= {f"before_{key}": value for key, value in zip(list(metrics), others, strict=True)}
        print(f"{name}: " + "  ".join(f"{key} {value:.1f}" for key, value in metrics.items()), flush=True)
        config = {"structure": name, "shape": [width, width], "tokens": tokens, "dtype": str(dtype), "turns": TURNS}
        where = provenance(command, SEED, torch.device(options.device))
        measured = {"config": config, "metrics": metrics, "status": "ok", "error": None}
        found.append({"kind": "spike", "name": f"host time {name}", **where, **measured})
    records.write(Path(options.out), found)


if __name__ == "__main__":
    main()
