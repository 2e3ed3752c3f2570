"""Accelerated MRI: zero-filling, SENSE, a U-Net and SENSE with a learnable Monarch transform, on the same measurements.

    PYTHONPATH=src python benchmarks/mri.py --out results/mri-h200.json --picture docs/img/mri.png --limit 290
    PYTHONPATH=src python benchmarks/mri.py --small --out results/mri-cpu.json --picture docs/img/mri.png

The folder of images (--data, or STRUCTLIN_MRI) is as docs/mri.md says. Every run is that of a recipe, at 2x, 4x and
8x with three seeds; then with few training slices, and the U-Net on SENSE's image; with --measured also at the size of
a scan, which has to be sampled at every place. No run starts that is not expected to end within --limit seconds, by the
longest of its method so far; a run whose record is in --out is not run again, so the same command goes on with what is
missing. Records hold no curves. The picture is drawn once the runs that it shows have left their models in --runs.
--small has small images, few slices and a small U-Net, for a CPU; --smoke has one tiny run of each kind, to see that
the script works.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import structlin as sl
from structlin import recipes
from structlin.problems import train
from structlin.problems.mri import MriRecipe, files
from structlin.problems.mri.picture import draw
from structlin.problems.mri.problem import MriProblem
from structlin.report import records
from structlin.report.records import Record
from structlin.train.config import OptionError

ACCELERATIONS, SEEDS, SHOTS = (2, 4, 8), (0, 1, 2), (1, 5, 20, 100)
METHODS: Mapping[str, dict[str, Any]] = {
    "monarch_sense": {}, "unet": {}, "unet_on_sense": {"model": "unet", "given": "sense"},
}  # fmt: skip
MEASURED = (230, 180)  # rows and columns of the k-space that is measured
SMALL: Mapping[str, Any] = {"size": (64, 64), "shots": 160, "valid_slices": 8, "channels": 6, "steps": 150,
                            "dtype": "float32"}  # fmt: skip
SMOKE: Mapping[str, Any] = {"size": (32, 32), "shots": 12, "valid_slices": 4, "test_slices": 4, "channels": 4,
                            "steps": 3, "batch": 4, "dtype": "float32"}  # fmt: skip
HERE = ("data", "device")  # fields that say where something lies or runs
SHOWN = ("SENSE + Monarch", "U-Net")


@dataclass(frozen=True)
class Run:
    """A run by name, METHOD[-LABEL]-ACCELERATIONx-sSEED; ``fields`` are those of its recipe."""

    name: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """What reconstructs."""
        return self.name.partition("-")[0]

    def recipe(self) -> MriRecipe:
        """What is run."""
        recipe = recipes.find("mri_monarch_sense" if self.method == "monarch_sense" else "mri_unet")
        assert isinstance(recipe, MriRecipe)
        return dataclasses.replace(recipe, **{**METHODS[self.method], **self.fields, "name": self.name})


def plan(base: Mapping[str, Any], measured: bool) -> Iterator[Run]:
    """The runs, those that matter most first; with ``measured`` also at the size of a scan."""
    every = [(a, s) for a in ACCELERATIONS for s in SEEDS]

    def runs(method: str, settings: list[tuple[int, int]], label: str = "", **more: Any) -> Iterator[Run]:
        for acceleration, seed in settings:
            fields = {**base, "acceleration": acceleration, "seed": seed, **more}
            yield Run(f"{method}{label}-{acceleration}x-s{seed}", fields)

    yield from runs("monarch_sense", every)
    yield from runs("unet", every)
    if measured:
        for method in ("monarch_sense", "unet"):
            yield from runs(method, every, "-measured", size=MEASURED)
    for shots in SHOTS:
        for method in ("monarch_sense", "unet"):
            yield from runs(method, [(4, seed) for seed in SEEDS], f"-shots{shots}", shots=shots)
    yield from runs("unet_on_sense", every)


def smoke(base: Mapping[str, Any], measured: bool) -> Iterator[Run]:
    """One tiny run of each kind."""
    for method in METHODS:
        yield Run(f"{method}-4x-s0", {**base, **SMOKE})
    if measured:
        yield Run("monarch_sense-measured-4x-s0", {**base, **SMOKE, "size": MEASURED})


def line(record: Record) -> str:
    """What came out, in a line."""
    metrics = record["metrics"]
    names = "", "sense_", "scaled_sense_", "zero_filled_"
    parts = [f"{name or 'model'} {metrics[f'test_{name}psnr_db']:.2f} dB {metrics[f'test_{name}ssim']:.4f}"
             for name in names if f"test_{name}psnr_db" in metrics]  # fmt: skip
    return f"{record['name']}: {', '.join(parts)}; {metrics['train_seconds']:.1f} s"


def picture(folder: Path, fields: Mapping[str, Any], runs: Mapping[str, str], index: int) -> dict[str, dict[str, Any]]:
    """A test slice and the measured image, where there is one, with every method; models from their folders."""
    rows: dict[str, dict[str, Any]] = {}
    for shown, name in runs.items():
        problem = MriProblem(Run(name, fields).recipe())
        problem.to(torch.device("cpu"))
        model = sl.load(problem.model(), folder / name / "model").eval()
        part = "measured" if "measured" in problem.parts else "test"
        row = rows.setdefault(part, problem.images(part, index if part == "test" else 0))
        row[shown] = problem.image(model, part, index if part == "test" else 0)
    return rows


def show(path: Path, runs: Path, base: Mapping[str, Any], index: int = 1) -> None:
    """Draw the picture at 4x from seed 0 of the runs that are there."""
    rows: dict[str, dict[str, Any]] = {}
    for label, more in (("", {}), ("-measured", {"size": MEASURED})):
        names = [f"{method}{label}-4x-s0" for method in ("monarch_sense", "unet")]
        if all((runs / name / "model").exists() for name in names):
            fields = {**base, "acceleration": 4, "seed": 0, **more}
            found = picture(runs, fields, dict(zip(SHOWN, names, strict=True)), index)
            rows |= {f"{part}, 4x": {"truth": row.pop("truth"), **row} for part, row in found.items()}
    if rows:
        draw(rows, path)
        print(path)


def main() -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description="accelerated MRI, all methods on the same measurements")
    parser.add_argument("--data", default=os.environ.get(files.VARIABLE), help=f"folder of images, or {files.VARIABLE}")
    parser.add_argument("--out", required=True, help="file for the records, JSON")
    parser.add_argument("--runs", default="runs/mri", help="folder for what runs leave")
    parser.add_argument("--picture", help="PNG to draw at the end")
    parser.add_argument("--limit", type=float, default=290, help="seconds after which nothing starts")
    parser.add_argument("--small", action="store_true", help="small images, for a CPU")
    parser.add_argument(
        "--measured", action="store_true", help="also runs at the size of the folder's measured k-space"
    )
    parser.add_argument("--smoke", action="store_true", help="one tiny run of each kind")
    parser.add_argument("--only", default="*", help="runs by name, as 'unet-4x-*'; default: all")
    options = parser.parse_args()
    base: dict[str, Any] = {"data": (options.data,)} if options.data else {}
    if options.small:
        base |= SMALL
    start, longest, out, folder = time.monotonic(), dict[str, float](), Path(options.out), Path(options.runs)
    found = records.read(out) if out.exists() else []
    planned = smoke(base, options.measured) if options.smoke else plan(base, options.measured)
    todo = [run for run in planned if fnmatchcase(run.name, options.only)]
    for run in todo:
        if any(record["name"] == run.name for record in found):
            continue
        began = time.monotonic()
        if began - start + longest.get(run.method, 0.0) > options.limit:
            continue
        try:
            record = train(run.recipe(), folder / run.name, " ".join(["python", *sys.argv]), lambda _: None)
        except OptionError as error:
            print(f"{run.name}: {error}", file=sys.stderr)
            return 2
        record["config"] = {name: value for name, value in record["config"].items() if name not in HERE}
        record.pop("series", None)
        found.append(record)
        records.write(out, found)
        longest[run.method] = max(longest.get(run.method, 0.0), time.monotonic() - began)
        print(line(record) if record["status"] == "ok" else f"{run.name}: {record['error']}", flush=True)
    missing = len(todo) - sum(run.name in {record["name"] for record in found} for run in todo)
    print(f"{missing} of {len(todo)} runs are missing", flush=True)
    if options.picture and not options.smoke:
        show(Path(options.picture), folder, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
