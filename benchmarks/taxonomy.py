"""Does sharing weights cost, does a lower rank, and does neither come close to dense? The einsum paper's regression.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/taxonomy.py results/taxonomy-cpu.json
    PYTHONPATH=src python benchmarks/taxonomy.py results/taxonomy-h200.json --device cuda

A student with two structured layers of some width learns a fixed random ReLU network from fresh inputs (Potapczynski et
al. 2024, section 4). On a GPU the teacher is 1024 wide as theirs, and the students are four times as wide, learn four
times as long and from sixteen times the examples a step as on a CPU, where all of it takes minutes on one processor.
Every structure is a point theta of the continuous space, trained at several widths with several seeds, each of which
is another teacher, at muP learning rates and with a constant schedule, so that every point of a curve is a run of that
length. Records that are in the file are kept, so the same command goes on, and `--seeds` shares the work between
devices. `structlin scaling` fits the records, docs/scaling.md says what is concluded.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import structlin as sl
from structlin.machine import provenance
from structlin.report import records

INPUTS, VALID, LR, BASE, SEEDS = 8, 4096, 4e-3, 64, (0, 1, 2, 3)
POINTS = {  # theta -> widths of about equal FLOPs on a CPU
    "dense": (32, 64, 128),
    "einsum:theta=0.5x0x0.5x0x0.5x0.5x0": (64, 256, 512),
    "einsum:theta=0.33x0x0.67x0x0.67x0.33x0": (64, 128, 256),
    "einsum:theta=0.5x0.5x0x0.5x0.5x0x0": (64, 256, 512),
    "einsum:theta=0.5x0.5x0x0.5x0.5x0x0.25": (64, 128, 256),
    "einsum:theta=1x0x0x0x1x0x0.5": (64, 256, 512),
    "einsum:theta=1x0x0x0x1x0x0.75": (64, 128, 256),
    "einsum:theta=0.67x0x0.33x0x0.67x0.33x0": (64, 256, 512),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment; ``wider`` multiplies the widths of `POINTS`."""

    teacher: int
    steps: int
    batch: int
    wider: int

    @property
    def checks(self) -> list[int]:
        """The steps at which a student is validated."""
        return sorted({round(self.steps * 2 ** (-i / 2)) for i in range(9)})


SCALES = {"cpu": Scale(256, 1000, 256, 1), "cuda": Scale(1024, 4000, 4096, 4)}


def teacher(seed: int, width: int) -> nn.Module:
    """Six layers of random weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    widths = [INPUTS, *[width] * 5, 1]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        layer.weight.data = torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5
        layer.bias.data = torch.randn(fan_out, generator=generator) * 0.5
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def problem(seed: int, scale: Scale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of mean 0 and variance 1, the validation set first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(VALID + scale.steps * scale.batch, INPUTS, generator=generator).to(device)
    net = teacher(seed, scale.teacher).to(device)
    y = torch.cat([net(part) for part in x.split(8192)])
    return x, (y - y.mean()) / y.std()


def student(width: int) -> nn.Sequential:
    """Two layers of ``width`` x ``width`` between an input and an output layer."""
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))  # fmt: skip


def train(structure: str, width: int, seed: int, x: Tensor, y: Tensor, scale: Scale) -> dict[str, list[float]]:
    """The curve of one student: validation loss as a share of the targets' variance, and seconds, on a CPU those of the
    processor."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    torch.manual_seed(seed)
    model, spec = student(width), sl.spec.parse(structure)
    sl.to_structured_(model, {"2": spec, "4": spec})
    nn.init.zeros_(model[6].weight)
    model.to(x.device)
    with torch.device("meta"):
        base = student(BASE)
    optimizer = torch.optim.Adam(sl.param_groups(model, lr=LR, base=base))
    series: dict[str, list[float]] = {"step": [], "seconds": [], "valid_loss": []}
    spent = 0.0
    begin = clock()
    for step in range(1, scale.steps + 1):
        batch = slice(VALID + (step - 1) * scale.batch, VALID + step * scale.batch)
        loss = (model(x[batch]) - y[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in scale.checks:
            loss.item()  # waits for the device
            spent += clock() - begin
            with torch.no_grad():
                valid = float((model(x[:VALID]) - y[:VALID]).square().mean())
            for name, value in zip(series, (step, spent, valid), strict=True):
                series[name].append(value)
            begin = clock()
    return series


def runs(seeds: list[int], device: torch.device, done: set[str]) -> Iterator[records.Record]:
    """One record per structure, width and seed whose name is not in ``done``."""
    scale = SCALES[device.type]
    for seed in seeds:
        x, y = problem(seed, scale, device)
        for structure, widths in POINTS.items():
            for width in (scale.wider * width for width in widths):
                name = f"{structure}@{width} seed {seed}"
                if name in done:
                    continue
                plan, series = sl.spec.parse(structure).plan(width, width), train(structure, width, seed, x, y, scale)
                flops = 2 * sl.analysis.flops(plan) + 2 * width * (INPUTS + 1)
                where = provenance(" ".join(["python", *sys.argv]), seed, device)
                config = {"task": "teacher regression", "structure": structure, "width": width, "depth": 2,
                          "steps": scale.steps, "batch_size": scale.batch, "lr": LR,
                          "teacher_width": scale.teacher,
                          "taxonomy": sl.analysis.taxonomy(plan)._asdict()}  # fmt: skip
                metrics = {"flops_per_token": flops, "tokens": scale.steps * scale.batch, "steps": scale.steps,
                           "valid_loss": series["valid_loss"][-1], "train_seconds": series["seconds"][-1]}  # fmt: skip
                failed = None if all(map(math.isfinite, series["valid_loss"])) else "the loss is not finite"
                print(f"{name}: {metrics['valid_loss']:.4f} in {metrics['train_seconds']:.1f} s", flush=True)
                yield {"kind": "spike", "name": name, **where, "config": config,
                       "metrics": {} if failed else metrics, "series": {} if failed else series,
                       "status": "failed" if failed else "ok", "error": failed}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the taxonomy of the einsum space on a synthetic regression")
    parser.add_argument("out", type=Path, help="file for the records, JSON")
    parser.add_argument("--device", choices=list(SCALES), default="cpu", help="default: cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2 3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = records.read(options.out) if options.out.exists() else []
    for record in runs(options.seeds, torch.device(options.device), {record["name"] for record in found}):
        found.append(record)
        records.write(options.out, found)
