"""Classifiers of images, dense and structured, on one device: accuracy, parameters, step time, time to an accuracy.

    PYTHONPATH=src python benchmarks/vision.py --data DATA --limit 560
    PYTHONPATH=src python benchmarks/vision.py --only 'step-*' --limit 560
    PYTHONPATH=src python benchmarks/vision.py --only '*mnist*' --data DATA --device cpu
    PYTHONPATH=src python benchmarks/vision.py --smoke --out /tmp/vision.json

DATA (or STRUCTLIN_IMAGES) is a folder with MNIST as arrays, CIFAR-10 in its folder cifar10, and ten classes of Tiny
ImageNet in tiny_imagenet_10.tar.xz. Runs are those of ``structlin train``: a ViT and an MLP-Mixer on both of these,
small ones and a perceptron on MNIST, each dense and in four structures or more, three seeds each, dense and Monarch
first. Each structure of the ViT on CIFAR-10 trains at the learning rate at which seed 0 has the best accuracy in
validation: from that of `STARTS` it is doubled and halved until the best has a worse one on both sides. Runs named
vit_cifar10@RATE-* are of that. Runs named step-* time whole steps on random images: of the models of Dao et al. 2022,
table 3.1, and of the others, whose runs may share a device. Nothing starts that is not expected to end within --limit;
the file is written after every run, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from claims_vision import draw

from structlin import recipes
from structlin.once import alone
from structlin.problems import train
from structlin.problems.loop import Run as Steps
from structlin.problems.vision import VisionRecipe
from structlin.problems.vision.classify import Classify
from structlin.problems.vision.images import VARIABLE, read, read_test
from structlin.report import records
from structlin.report.records import Record
from structlin.train.config import OptionError, device_of
from structlin.train.settings import override

STRUCTURES = {
    "dense": "dense", "monarch4": "monarch:nblocks=4:order=blocked", "dyad8": "dyad:nblocks=8", "btt4": "btt:rank=4",
    "pixelfly": "pixelfly:block_size=64:butterfly_size=8:nfactors=1:rank=32",
}  # fmt: skip
OF_MNIST = {**STRUCTURES, "dyad4": "dyad:nblocks=4",
            "pixelfly": "pixelfly:block_size=32:butterfly_size=16:rank=32:pad=true"}  # fmt: skip
OF_SMALL = {**{name: OF_MNIST[name] for name in ("dense", "monarch4", "dyad4", "dyad8")}, "btt2": "btt:rank=2",
            "pixelfly": "pixelfly:block_size=16:butterfly_size=8:nfactors=1:rank=8"}  # fmt: skip
SEEDS = 3
SHAPES = {"cifar10": (32, 32, 3), "mnist": (28, 28, 1), "tiny_imagenet_10": (64, 64, 3)}
LARGE = (224, 224, 3)
EPOCH = {"cifar10": 45_000, "mnist": 54_000, "tiny_imagenet_10": 2_700}  # images, without those held out
EPOCHS = {"mnist_mlp": 10, "vit_mnist": 3, "mixer_mnist": 3, "vit_tiny_imagenet": 100, "mixer_tiny_imagenet": 100}
TABLE = {  # of Dao et al. 2022, table 3.1; their ViT-S is that of timm in 2021
    "vit_s16": {"model": "vit", "width": 768, "depth": 8, "heads": 8, "mlp_width": 2304},
    "vit_b16": {"model": "vit", "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "mixer_s16": {"model": "mixer", "width": 512, "depth": 8, "token_width": 256, "mlp_width": 2048, "layers": "mlp"},
    "mixer_b16": {"model": "mixer", "width": 768, "depth": 12, "token_width": 384, "mlp_width": 3072, "layers": "mlp"},
}
TURNS, TURN = 3, 20  # steps of a turn
STARTS = {"vit_cifar10": 2.5e-4}  # recipe -> learning rate that its sweeps start at
SWEPT = {"vit_cifar10": "vit_cifar10", "vit_tiny_imagenet": "vit_cifar10"}  # recipe -> whose sweeps give its rates
SMALL = {"batch": 16, "steps": 6, "valid_every": 3, "checkpoint_every": 6, "log_every": 3}


@dataclass(frozen=True)
class Run:
    """One run: its name, recipe and changed fields, which set it is on, and the seconds that it is expected to take.

    One without a set times steps on random images of a ``shape``.
    """

    name: str
    recipe: str
    given: dict[str, Any] = field(hash=False)
    data: str | None
    seconds: float
    shape: tuple[int, ...] = LARGE


def sweep(kept: Mapping[str, Record], recipe: str, label: str) -> tuple[float, bool]:
    """Learning rate of the best accuracy in validation and True, or the one to try next and False."""
    name = re.compile(rf"{recipe}@.*-{label}-s0")
    runs = [record for title, record in kept.items() if name.fullmatch(title)]
    found = {run["config"]["given"]["lr"]: run["metrics"].get("accuracy") or 0.0 for run in runs}
    if STARTS[recipe] not in found:
        return STARTS[recipe], False
    best = max(found, key=lambda rate: found[rate])
    following = next((rate for rate in (best / 2, 2 * best) if rate not in found), None)
    return (best, True) if following is None else (following, False)


def plan(epochs: int, kept: Mapping[str, Record]) -> Iterator[Run]:
    """All runs, the most wanted first, as far as the sweeps in ``kept`` say; the next run of each sweep among them."""
    for labels in (("dense", "monarch4", "dyad4"), ("dyad8", "pixelfly", "btt4", "btt2")):
        for recipe, data, known in (("vit_cifar10", "cifar10", STRUCTURES), ("mixer_cifar10", "cifar10", STRUCTURES),
                                    ("mnist_mlp", "mnist", OF_MNIST), ("vit_mnist", "mnist", OF_SMALL),
                                    ("mixer_mnist", "mnist", OF_SMALL),
                                    ("vit_tiny_imagenet", "tiny_imagenet_10", STRUCTURES),
                                    ("mixer_tiny_imagenet", "tiny_imagenet_10", STRUCTURES)):  # fmt: skip
            for label in (label for label in labels if label in known):
                steps = EPOCHS.get(recipe, epochs) * EPOCH[data] // (256 if data == "mnist" else 512)
                given = {"structure": known[label], "steps": steps, "checkpoint_every": steps}
                start, step = (20, 0.002) if data == "mnist" else (40, 0.011)
                if recipe in SWEPT:
                    given["lr"], ready = sweep(kept, SWEPT[recipe], label)
                    if recipe in STARTS:
                        name = f"{recipe}@{given['lr']:g}-{label}-s0"
                        yield Run(name, recipe, given | {"seed": 0}, data, start + steps * step)
                    if not ready:
                        continue
                for seed in range(SEEDS):
                    seconds = (start if seed == 0 else 8) + steps * step
                    yield Run(f"{recipe}-{label}-s{seed}", recipe, given | {"seed": seed}, data, seconds)
    for model, sizes in TABLE.items():
        for label in ("dense", "monarch4", "dyad8", "btt4"):
            given = {**sizes, "structure": STRUCTURES[label], "patch": 16, "batch": 128, "log_every": TURN}
            yield Run(f"step-{model}-{label}", "vit_cifar10", given, None, 80)
    for recipe, known, data, turn in (("vit_cifar10", STRUCTURES, "cifar10", 5 * TURN),
                                      ("mixer_cifar10", STRUCTURES, "cifar10", 5 * TURN),
                                      ("mnist_mlp", OF_MNIST, "mnist", 5 * TURN),
                                      ("vit_mnist", OF_SMALL, "mnist", TURN // 2),
                                      ("mixer_mnist", OF_SMALL, "mnist", TURN // 2)):  # fmt: skip
        for label, structure in known.items():
            yield Run(f"step-{recipe}-{label}", recipe, {"structure": structure, "log_every": turn}, None, 60,
                      SHAPES[data])  # fmt: skip


def smoke() -> Iterator[Run]:
    """The machinery on a CPU in seconds, on images that are made here."""
    known = {"dense": "dense", "monarch4": "monarch:nblocks=4", "pixelfly": "pixelfly:block_size=8:butterfly_size=8"}
    for recipe, data in (("tiny_vit", "cifar10"), ("tiny_mixer", "cifar10"), ("tiny_mnist", "mnist")):
        for label, structure in known.items():
            for seed in range(2):
                given = {**SMALL, "structure": structure, "seed": seed, "patch": 8}
                yield Run(f"{recipe}-{label}-s{seed}", recipe, given, data, 5)
    for label in ("dense", "monarch4"):
        yield Run(f"step-vit_s16-{label}", "tiny_vit", {**SMALL, "structure": known[label], "patch": 56}, None, 5)


class Random(Classify):
    """One batch of random images, large ones of 1000 classes and others of 10, for steps that are timed."""

    def __init__(self, recipe: VisionRecipe, shape: tuple[int, ...]) -> None:
        classes = 1000 if shape == LARGE else 10
        self.recipe, self.about = recipe, {"images": f"random, {shape[0]} pixels", "classes": classes}
        generator = torch.Generator().manual_seed(recipe.seed)
        self.examples = (torch.randn(recipe.batch, shape[2], *shape[:2], generator=generator),
                         torch.randint(classes, (recipe.batch,), generator=generator))  # fmt: skip
        self.train = _Set(shape, tuple(map(str, range(classes))))  # type: ignore[assignment]

    def to(self, device: torch.device) -> None:
        self.examples = self.examples[0].to(device), self.examples[1].to(device)

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.examples


@dataclass(frozen=True)
class _Set:
    shape: tuple[int, ...]
    classes: tuple[str, ...]


def timed(recipe: VisionRecipe, shape: tuple[int, ...], device: torch.device, command: str) -> Record:
    """The record of whole steps: forward, backward, clipping and AdamW."""
    recipe = dataclasses.replace(recipe, steps=10**6, valid_every=10**6, checkpoint_every=10**6)
    steps = Steps(recipe, Random(recipe, shape), device, lambda line: None)
    begun = time.perf_counter()
    steps.resume(Path("no checkpoint"))
    steps.advance()
    ready, times = time.perf_counter() - begun, []
    with alone():
        for _ in range(TURNS):
            before = steps.state.seconds
            steps.advance()
            times.append((steps.state.seconds - before) / recipe.log_every)
    found = steps.record(command, {}, None)
    kept = ("swapped_params", "replaced_params", "model_params", "peak_memory_bytes")
    metrics = {name: found["metrics"][name] for name in kept}
    metrics |= {"step_seconds": median(times), "spread": max(times) / min(times) - 1, "build_and_compile_s": ready}
    return {**found, "kind": "bench", "metrics": metrics, "series": {}}


def perform(run: Run, recipe: VisionRecipe, folder: Path, device: torch.device, command: str) -> Record:
    """The small record of a run."""
    if run.data is None:
        found = timed(recipe, run.shape, device, command)
    else:
        found = train(recipe, folder, command, lambda line: None)
        for name in ("checkpoint.safetensors", "model"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    metrics = dict(found["metrics"])
    counts = [metrics[name] or 0 for name in ("model_params", "swapped_params", "replaced_params")]
    metrics["params_share"] = counts[0] / (counts[0] - counts[1] + counts[2])
    config = {name: value for name, value in found["config"].items() if name not in ("data", "device")}
    return {**found, "metrics": metrics, "config": {**config, "given": run.given}}


def again(run: Run, kept: Mapping[str, Record]) -> Record | None:
    """The record of the same run under its name in a sweep."""
    alike = (kept[name] for name in kept if name.startswith(f"{run.recipe}@"))
    return next((record for record in alike if record["config"]["given"] == run.given), None)


def as_arrays(source: Path, folder: Path) -> Path:
    """The images of ``source`` decoded once, as arrays in ``folder``; all runs read these."""
    if not (folder / "test_y.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        train = read(source)
        for split, found in (("train", train), ("test", read_test(source, train))):
            if found is None or found.pixels is None:
                raise ValueError(f"--data: {source} has no {split} images that fit into memory")
            np.save(folder / f"{split}_x.npy", found.pixels)
            np.save(folder / f"{split}_y.npy", found.labels)
        (folder / "classes.json").write_text(json.dumps(train.classes), encoding="utf-8")
    return folder


def made(folder: Path) -> Path:
    """A set of noise whose brightest colour is its class."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 240), ("test", 60)):
        labels = np.arange(count) % 3
        pixels = random.integers(120, size=(count, 16, 16, 3))
        pixels[np.arange(count), :, :, labels] += 60
        np.save(folder / f"{split}_x.npy", pixels.astype(np.uint8))
        np.save(folder / f"{split}_y.npy", labels)
    return folder


def sets(options: argparse.Namespace, folder: Path, wanted: set[str | None]) -> dict[str | None, Path]:
    """Where each set lies.

    Raises:
        ValueError: where they are not given.
    """
    if options.smoke:
        return {name: made(folder / "sets" / str(name)) for name in wanted}
    if not options.data and wanted - {None}:
        raise ValueError("--data is not given; allowed: a folder, here or in STRUCTLIN_IMAGES")
    given = Path(options.data or "")
    places = {"cifar10": given / "cifar10", "mnist": given, "tiny_imagenet_10": given / "tiny_imagenet_10.tar.xz"}
    return {name: as_arrays(places[name], folder / "sets" / name) for name in wanted if name}


def fields(run: Run, where: dict[str | None, Path], device: torch.device) -> VisionRecipe:
    """The recipe of a run on this machine."""
    given = {name: str(value) for name, value in run.given.items()} | {"name": run.name, "device": device.type}
    if run.data:
        given["data"] = [str(where[run.data])]  # type: ignore[assignment]
    if device.type == "cpu":
        given |= {"compile": "none", "dtype": "float32"}
    elif "mnist" in run.recipe:
        given["compile"] = "reduce-overhead"
    recipe = override(recipes.find(run.recipe), given)
    assert isinstance(recipe, VisionRecipe)
    return recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 0 when all is recorded, 1 when something is left, 2 for bad options."""
    begun, options = time.monotonic(), parse(arguments)
    device = torch.device("cpu" if options.smoke else device_of(options.device))
    name = "cpu" if device.type == "cpu" else "h200"
    out = Path(options.out or f"results/vision-{name}.json")
    kept = {record["name"]: record for record in records.read(out)} if out.exists() else {}

    def remaining() -> float:
        return float(options.limit - (time.monotonic() - begun))

    def left() -> list[Run]:
        planned = smoke() if options.smoke else plan(options.epochs, kept)
        wanted = (
            run for run in planned if not options.only or any(fnmatchcase(run.name, glob) for glob in options.only)
        )
        return [run for run in wanted if kept.get(run.name, {}).get("config", {}).get("given") != run.given]

    command = " ".join(["python", "benchmarks/vision.py", *(arguments if arguments is not None else sys.argv[1:])])
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="vision-"))
    last, failed = None, set[str]()
    while run := next((run for run in left() if run.name not in failed and run.seconds <= remaining()), None):
        try:
            where = sets(options, folder, {run.data})
        except (OptionError, ValueError) as error:
            print(f"vision.py: error: {error}", file=sys.stderr)
            return 2
        if run.given["structure"] != last or run.data is None:
            forget()  # seeds of a run share what is compiled
        last, start = run.given["structure"], time.monotonic()
        try:
            recipe = fields(run, where, device)
            record = again(run, kept) or perform(run, recipe, folder / run.name, device, command)
        except Exception as error:  # the others may still run
            print(f"{run.name}: {error!r}"[:600], flush=True)
            failed.add(run.name)
            continue
        kept[run.name] = {**record, "name": run.name}
        records.write(out, list(kept.values()))
        print(f"{run.name}: {said(record)}, {time.monotonic() - start:.0f} s in all", flush=True)
    pictures(folder, out, list(kept.values()), options.picture)
    missing = left()
    print(f"{len(missing)} runs left after {time.monotonic() - begun:.0f} s: "
          f"{', '.join(run.name for run in missing)}", flush=True)  # fmt: skip
    return 1 if missing else 0


def forget() -> None:
    """Let go of compiled code and the models that it holds."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pictures(folder: Path, out: Path, kept: list[Record], where: str | None) -> None:
    """The picture of all records, and those of single runs that are shown in the documents."""
    place = Path(where) if where else out.parent
    draw(kept, place / f"{out.stem}.png")
    for name in ("vit_cifar10-monarch4-s0", "mixer_cifar10-monarch4-s0", "mnist_mlp-dyad4-s0"):
        if (folder / name / "picture.png").exists():
            shutil.copy(folder / name / "picture.png", place / f"vision-{name.split('-')[0]}.png")


def said(record: Record) -> str:
    """What came out, in a line."""
    metrics = record["metrics"]
    if record["status"] == "failed":
        return f"failed: {record['error']}"
    accuracy = f"test accuracy {metrics['test_accuracy']:.4f}, " if "test_accuracy" in metrics else ""
    step = f"{1e3 * metrics['step_seconds']:.2f} ms a step, " if metrics["step_seconds"] else ""
    return f"{accuracy}{step}{metrics['params_share']:.1%} of the weights"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get(VARIABLE), help="folder of MNIST, cifar10 and tiny_imagenet_10.tar.xz"
    )
    parser.add_argument("--only", nargs="+", default=[], help="globs over names of runs")
    parser.add_argument("--epochs", type=int, default=40, help="of the runs on CIFAR-10")
    parser.add_argument("--limit", type=float, default=560, help="seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--out", help="file of records; default: results/vision-h200.json, or vision-cpu.json")
    parser.add_argument("--picture", help="folder of the pictures; default: that of the records")
    parser.add_argument("--folder", help="folder of the runs; default: a temporary one")
    parser.add_argument("--smoke", action="store_true", help="tiny runs on a CPU, on images made here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
