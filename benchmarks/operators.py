"""FNO, Monarch-NO and a U-Net of about as many parameters on Navier-Stokes flows at three viscosities, on one device.

    PYTHONPATH=src python benchmarks/operators.py --limit 560 --seeds 0
    PYTHONPATH=src python benchmarks/operators.py --smoke --device cpu    # seconds, to see that it runs

The setting is that of Li et al. 2021 and of table 3.3 of Dao et al. 2022: 64x64 points, 1000 solutions to train on and
200 to test on, 10 times given and the rest predicted, up to time 50, 30 and 20. The solver is first held to one of half
the step on twice the points. What is not done within --limit goes on from its checkpoint when the same command is given
again; what has a record is skipped. The file of records is written after each run, with pictures of the flows at the
largest viscosity beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from structlin import recipes
from structlin.machine import provenance
from structlin.problems import train
from structlin.problems.operators import navier_stokes
from structlin.problems.operators.recipe import OperatorRecipe
from structlin.report import records
from structlin.report.records import Record

MODELS = ("fno", "monarch_no", "unet")
FLOWS: dict[str, dict[str, Any]] = {
    "1e-3": {"viscosity": 1e-3, "times": 50, "grid": 64, "time_step": 0.02},
    "1e-4": {"viscosity": 1e-4, "times": 30, "grid": 128, "time_step": 0.01},
    "1e-5": {"viscosity": 1e-5, "times": 20, "grid": 256, "time_step": 0.005},
}
SMOKE: dict[str, Any] = {"times": 7, "grid": 16, "time_step": 0.1, "steps": 12, "valid_every": 6, "short": 2}
CHECKED = 8  # flows on which the solver is held to a finer one


class TimeUpError(Exception):
    """The limit is reached; the checkpoint stays."""


def recipe(model: str, flow: str, seed: int, options: argparse.Namespace) -> OperatorRecipe:
    """The recipe of a run, with the fields that were given for all."""
    found = recipes.find(f"{'tiny_' if options.smoke else ''}{model}_navier_stokes")
    assert isinstance(found, OperatorRecipe)
    fields = FLOWS[flow] | (SMOKE if options.smoke else {})
    for name in ("steps", "batch", "lr", "compile", "short_share", "transform_lr"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    cache = str(Path(options.folder) / "cache")
    return dataclasses.replace(found, name=f"{model}-{flow}-s{seed}", seed=seed, device=options.device, cache=cache,
                               **fields)  # fmt: skip


def solver(flow: str, made: OperatorRecipe, device: torch.device, command: str) -> Record:
    """Seconds to solve all flows, and the distance of some to finer ones at each time."""
    begun = time.perf_counter()
    made.problem()
    seconds = time.perf_counter() - begun

    def solved(finer: int) -> torch.Tensor:
        return navier_stokes.trajectories(
            CHECKED, made.resolution, finer * made.grid, made.viscosity, made.times, made.time_step / finer,
            made.initial_variance, made.data_seed, device,
        )  # fmt: skip

    coarse, fine = solved(1), solved(2)
    by_time = (coarse - fine).flatten(0, 2).norm(dim=0) / fine.flatten(0, 2).norm(dim=0)
    metrics = {"solve_seconds": seconds, "flows": made.samples + made.valid_samples + made.test_samples,
               "relative_l2_to_finer": ((coarse - fine).norm() / fine.norm()).item()}  # fmt: skip
    print(f"solver {flow}: {seconds:.1f} s, {metrics['relative_l2_to_finer']:.2e} from finer ones", flush=True)
    config = {name: getattr(made, name) for name in ("viscosity", "times", "grid", "time_step", "resolution")}
    return {
        "kind": "spike", "name": f"solver-{flow}", **provenance(command, made.data_seed, device), "config": config,
        "metrics": metrics, "series": {"relative_l2_to_finer": by_time.tolist()}, "status": "ok", "error": None,
    }  # fmt: skip


def run(made: OperatorRecipe, options: argparse.Namespace, command: str, end: float) -> Record:
    """The record of one run.

    Raises:
        TimeUpError: at ``end``, a time of the clock.
    """

    def say(line: str) -> None:
        print(f"{made.name}: {line}", flush=True)
        if time.monotonic() > end:
            raise TimeUpError

    folder = Path(options.folder) / made.name
    record = train(made, folder, command, say)
    model = made.problem().model()
    parts = {"real_params": sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())}
    if made.name.endswith("-1e-3-s0") and (folder / "picture.png").exists():
        shutil.copyfile(folder / "picture.png", Path(options.out).with_name(f"operators-{made.model}.png"))
    if record["status"] == "ok":
        error, seconds = record["metrics"]["test_relative_l2"], record["metrics"]["train_seconds"]
        print(
            f"{made.name}: test relative L2 {error:.4f}, {seconds:.0f} s, {parts['real_params']:,} numbers", flush=True
        )
    return {**record, "metrics": {**record["metrics"], **parts}}


def main() -> int:
    """Run what has no record; 0 when nothing is left."""
    options = parse()
    end, command, out = time.monotonic() + options.limit, " ".join(["python", *sys.argv]), Path(options.out)
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else
                          "cpu" if options.device == "auto" else options.device)  # fmt: skip
    torch.set_float32_matmul_precision(options.precision)
    kept = {record["name"]: record for record in records.read(out)} if out.exists() else {}

    def keep(record: Record) -> None:
        kept[record["name"]] = record
        out.parent.mkdir(parents=True, exist_ok=True)
        records.write(out, list(kept.values()))

    wanted = [(m, flow, seed) for seed in options.seeds for flow in options.flows for m in options.models]
    left = [(m, flow, seed) for m, flow, seed in wanted if f"{m}-{flow}-s{seed}" not in kept]
    for model, flow, seed in left:
        if time.monotonic() > end:
            break
        made = recipe(model, flow, seed, options)
        if f"solver-{flow}" not in kept:
            keep(solver(flow, made, device, command))
        try:
            keep(run(made, options, command, end))
        except TimeUpError:
            break
    missing = [f"{m}-{flow}-s{seed}" for m, flow, seed in wanted if f"{m}-{flow}-s{seed}" not in kept]
    print(f"{len(missing)} of {len(wanted)} runs left: {', '.join(missing)}", flush=True)
    return 1 if missing else 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="trains operators on Navier-Stokes flows")
    add = parser.add_argument
    add("--out", default="results/operators-h200.json", help="file for the records, JSON")
    add("--folder", default="runs/operators", help="folder of the runs and their flows")
    add("--limit", type=float, default=540.0, help="seconds after which nothing goes on")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--flows", nargs="+", default=list(FLOWS), choices=list(FLOWS), help="viscosities")
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--steps", type=int, help="updates of every run")
    add("--batch", type=int, help="samples of an update of every run")
    add("--lr", type=float, help="peak learning rate of every run")
    add("--short-share", type=float, help="share of the updates that predict few times, of every run")
    add("--transform-lr", type=float, help="of every run of monarch_no")
    add("--compile", help="mode of torch.compile, or none, of every run")
    add("--precision", default="high", choices=["highest", "high"], help="of products in float32; high is TF32")
    add("--device", default="auto")
    add("--smoke", action="store_true", help="tiny models and flows")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
