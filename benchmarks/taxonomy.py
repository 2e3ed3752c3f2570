"""Does sharing weights cost, does a lower rank, and does neither come close to dense? The einsum paper's regression.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/taxonomy.py results/taxonomy-cpu.json

A student with two structured layers of some width learns a fixed random ReLU network from fresh inputs (Potapczynski et
al. 2024, section 4, whose teacher is 1024 wide; this one is 256, so that it runs on one processor in minutes). Every
structure is a point theta of the continuous space, trained at several widths with several seeds, each of which is
another teacher, at muP learning rates and with a constant schedule, so that every point of a curve is a run of that
length. `structlin scaling` fits the records, docs/scaling.md says what is concluded.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import structlin as sl
from structlin.machine import provenance
from structlin.report import records

INPUTS, TEACHER, STEPS, BATCH, VALID, LR, BASE, SEEDS = 8, 256, 1000, 256, 4096, 4e-3, 64, (0, 1, 2, 3)
POINTS = {  # theta -> widths of about equal FLOPs
    "dense": (32, 64, 128),
    "einsum:theta=0.5x0x0.5x0x0.5x0.5x0": (64, 256, 512),
    "einsum:theta=0.33x0x0.67x0x0.67x0.33x0": (64, 128, 256),
    "einsum:theta=0.5x0.5x0x0.5x0.5x0x0": (64, 256, 512),
    "einsum:theta=0.5x0.5x0x0.5x0.5x0x0.25": (64, 128, 256),
    "einsum:theta=1x0x0x0x1x0x0.5": (64, 256, 512),
    "einsum:theta=1x0x0x0x1x0x0.75": (64, 128, 256),
    "einsum:theta=0.67x0x0.33x0x0.67x0.33x0": (64, 256, 512),
}
CHECKS = sorted({round(STEPS * 2 ** (-i / 2)) for i in range(9)})


def teacher(seed: int) -> nn.Module:
    """Six layers of random weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    widths = [INPUTS, *[TEACHER] * 5, 1]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        layer.weight.data = torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5
        layer.bias.data = torch.randn(fan_out, generator=generator) * 0.5
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of mean 0 and variance 1, the validation set first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(VALID + STEPS * BATCH, INPUTS, generator=generator)
    y = torch.cat([teacher(seed)(part) for part in x.split(8192)])
    return x, (y - y.mean()) / y.std()


def student(width: int) -> nn.Sequential:
    """Two layers of ``width`` x ``width`` between an input and an output layer."""
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))  # fmt: skip


def train(structure: str, width: int, seed: int, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """The curve of one student: validation loss as a share of the targets' variance, and seconds of the processor."""
    torch.manual_seed(seed)
    model, spec = student(width), sl.spec.parse(structure)
    sl.to_structured_(model, {"2": spec, "4": spec})
    nn.init.zeros_(model[6].weight)
    with torch.device("meta"):
        base = student(BASE)
    optimizer = torch.optim.Adam(sl.param_groups(model, lr=LR, base=base))
    series: dict[str, list[float]] = {"step": [], "seconds": [], "valid_loss": []}
    spent = 0.0
    for step in range(1, STEPS + 1):
        begin = time.process_time()
        batch = slice(VALID + (step - 1) * BATCH, VALID + step * BATCH)
        loss = (model(x[batch]) - y[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.process_time() - begin
        if step in CHECKS:
            with torch.no_grad():
                valid = float((model(x[:VALID]) - y[:VALID]).square().mean())
            for name, value in zip(series, (step, spent, valid), strict=True):
                series[name].append(value)
    return series


def runs(seeds: Sequence[int]) -> Iterator[records.Record]:
    """One record per structure, width and seed."""
    for seed in seeds:
        x, y = problem(seed)
        for structure, widths in POINTS.items():
            for width in widths:
                plan, series = sl.spec.parse(structure).plan(width, width), train(structure, width, seed, x, y)
                flops = 2 * sl.analysis.flops(plan) + 2 * width * (INPUTS + 1)
                where = provenance(" ".join(["python", *sys.argv]), seed, torch.device("cpu"))
                config = {"task": "teacher regression", "structure": structure, "width": width, "depth": 2,
                          "steps": STEPS, "batch_size": BATCH, "lr": LR, "teacher_width": TEACHER,
                          "taxonomy": sl.analysis.taxonomy(plan)._asdict()}  # fmt: skip
                metrics = {"flops_per_token": flops, "tokens": STEPS * BATCH, "steps": STEPS,
                           "valid_loss": series["valid_loss"][-1], "train_seconds": series["seconds"][-1]}  # fmt: skip
                name = f"{structure}@{width} seed {seed}"
                failed = None if all(map(math.isfinite, series["valid_loss"])) else "the loss is not finite"
                print(f"{name}: {metrics['valid_loss']:.4f} in {metrics['train_seconds']:.1f} s", flush=True)
                yield {"kind": "spike", "name": name, **where, "config": config,
                       "metrics": {} if failed else metrics, "series": {} if failed else series,
                       "status": "failed" if failed else "ok", "error": failed}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for record in runs(SEEDS):
        found.append(record)
        records.write(sys.argv[1], found)
