"""What it takes to build, project and analyse layers, beside nn.Linear. Prints what it finds and writes records.

    PYTHONPATH=src OMP_NUM_THREADS=2 python benchmarks/building.py results/building-cpu.json

For each structure: seconds to build a layer of 8192x8192, per parameter relative to nn.Linear (they take turns), and on
the meta device, the first time and later; and seconds to build every linear layer of a 7B decoder on the meta device
and describe each. Then seconds to project a 4096x4096 weight. All on the CPU. The load of the machine before and at
the record is in it, and seconds of the processor beside those of the clock, which tell how busy the machine was.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import structlin as sl
from structlin.describe import describe
from structlin.machine import provenance
from structlin.report import records

SEED, WIDTH, TURNS = 0, 8192, 3
SPECS = (
    "dense", "low_rank:rank=0.25", "block_diagonal:nblocks=4", "block_dense:nblocks=4:rank=256", "monarch:nblocks=4",
    "monarch:nblocks=16", "block_shuffle:nblocks=4", "btt:rank=4", "dyad:nblocks=4", "kronecker",
    "tensor_train:cores=3:rank=16", "blast:nblocks=4:rank=128", "einsum:theta=0.5x0.25x0.25x0.25x0.5x0.25x0.25",
    "pixelfly:block_size=8:rank=32", "block_diagonal:nblocks=4+low_rank:rank=64",
    "monarch:nblocks=4@monarch:nblocks=4.T",
)  # fmt: skip
LAYERS, SHAPES = 32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LOAD = os.getloadavg()[0]
found: list[records.Record] = []


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def note(name: str, config: dict[str, object], metrics: dict[str, float]) -> None:
    print(f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()), flush=True)
    where = provenance(" ".join(["python", *sys.argv]), SEED, torch.device("cpu"))
    config = {**config, "load_before": LOAD, "load": os.getloadavg()[0]}
    measured = {"config": config, "metrics": metrics, "status": "ok", "error": None}
    found.append({"kind": "spike", "name": f"building {name}", **where, **measured})


def build(text: str) -> None:
    spec, dense, ours = sl.spec.parse(text), [], []
    first, *again = (seconds(lambda: sl.StructuredLinear(WIDTH, WIDTH, spec, device="meta")) for _ in range(TURNS))
    for _ in range(TURNS):
        dense.append(seconds(lambda: nn.Linear(WIDTH, WIDTH)))
        # three, as memory that was just given back makes the first of a small layer slow
        ours += [seconds(lambda: sl.StructuredLinear(WIDTH, WIDTH, spec)) for _ in range(3)]
    params = sl.analysis.num_params(spec.plan(WIDTH, WIDTH)) + WIDTH
    per_parameter = median(ours) / params, median(dense) / (WIDTH * (WIDTH + 1))
    metrics = {"params": params, "build_s": median(ours), "linear_build_s": median(dense)}
    metrics |= {"per_parameter_over_linear": per_parameter[0] / per_parameter[1]}
    metrics |= {"meta_first_s": first, "meta_s": median(again)}
    note(text, {"structure": text, "shape": [WIDTH, WIDTH], "turns": TURNS}, metrics)


def analyse(text: str) -> None:
    def model() -> None:
        for _ in range(LAYERS):
            for rows, columns in SHAPES:
                sl.StructuredLinear(columns, rows, spec, device="meta")
                describe(spec, rows, columns)

    spec = sl.spec.parse(text)
    config = {"structure": text, "layers": LAYERS, "shapes": SHAPES}
    used = time.process_time()
    metrics = {"build_and_describe_s": seconds(model)}
    note(f"7B model, {text}", config, {**metrics, "build_and_describe_cpu_s": time.process_time() - used})


def projection(text: str, size: int) -> None:
    spec, weight = sl.spec.parse(text), torch.randn(size, size)
    plan = spec.plan(size, size)
    used = time.process_time()
    times = [seconds(lambda: sl.project(plan, weight)) for _ in range(TURNS)]
    used = (time.process_time() - used) / TURNS
    config = {"structure": text, "shape": [size, size], "turns": TURNS, "dtype": "float32"}
    metrics = {"project_s": median(times), "project_slowest_s": max(times), "project_cpu_s": used}
    note(f"projection {size}x{size}, {text}", config, metrics)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    for text in SPECS:
        analyse(text)
    projection("monarch:nblocks=4", 4096)
    for text in SPECS:
        build(text)
    records.write(sys.argv[1], found)
