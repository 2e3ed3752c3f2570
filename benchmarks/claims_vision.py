"""Published claims on classifiers of images, and the picture of what was measured, from results/vision-*.json."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from evidence import Finding, finished
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from structlin.problems.vision.metrics import seconds_to
from structlin.report.records import Record

TITLE = "Vision"
INTRO = (
    "A ViT and an MLP-Mixer, 512 wide with 6 blocks, on CIFAR-10, and a perceptron of three hidden layers on MNIST, "
    "every structure with dense's recipe. Accuracies are those of 8,000 test images, the papers' of ImageNet; step "
    "times of the papers' models are of 128 random images of 224 pixels. Pixelfly's numbers are from memory: its "
    "tables were not at hand."
)
RESULTS = Path(__file__).resolve().parents[1] / "results"
MARGIN = 0.01  # "as accurate" means within one point of dense
COLOURS = {"dense": "#222222", "monarch4": "#0072b2", "dyad8": "#d55e00", "dyad4": "#e69f00", "btt4": "#009e73",
           "pixelfly": "#cc79a7"}  # fmt: skip


def named(device: str = "h200") -> dict[str, Record]:
    """The finished records of one device by name, none where the file is missing."""
    return finished(RESULTS / f"vision-{device}.json")


def seeds(found: dict[str, Record], recipe: str) -> dict[str, list[Record]]:
    """Label of a structure -> the records of its seeds, dense first."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for name, record in found.items():
        if match := re.fullmatch(rf"{recipe}-(\w+)-s\d+", name):
            runs[match[1]].append(record)
    return dict(sorted(runs.items(), key=lambda item: item[0] != "dense"))


def accuracy(runs: Sequence[Record]) -> float:
    """Mean test accuracy of the seeds, as a share."""
    return mean(run["metrics"]["test_accuracy"] or 0.0 for run in runs)


def steps_to(runs: Sequence[Record], level: float) -> float | None:
    """Mean steps of training until a validation had an accuracy of ``level``, None where a seed never had."""
    steps = [seconds_to(level, {**run["series"], "seconds": run["series"]["step"]}) for run in runs]
    return None if None in steps else mean(step for step in steps if step is not None)


def step_seconds(found: dict[str, Record], recipe: str, label: str) -> float | None:
    """Seconds of a step that was timed alone, else the mean of the runs' own; None where these shared a device."""
    alone = found.get(f"step-{recipe}-{label}")
    timed = [run["metrics"].get("step_seconds") for run in ([alone] if alone else seeds(found, recipe)[label])]
    return None if None in timed else mean(time for time in timed if time is not None)


def about(found: dict[str, Record], recipe: str, label: str) -> str:
    """Accuracy, share of the parameters, step time and time to an accuracy of one structure beside dense."""
    every = seeds(found, recipe)
    runs, dense = every[label], every["dense"]
    values = [100 * (run["metrics"]["test_accuracy"] or 0.0) for run in runs]
    said = f"{mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f} ({len(runs)} seeds)"
    if label == "dense":
        return said
    said += f" with {runs[0]['metrics']['params_share'] or 0.0:.0%} of the parameters"
    times = [step_seconds(found, recipe, name) for name in ("dense", label)]
    if times[0] is None or times[1] is None:
        return said
    said += f", steps {times[0] / times[1]:.2f} times as fast"
    level = mean(run["series"]["accuracy"][-1] for run in dense) - MARGIN
    steps = [steps_to(group, level) for group in (dense, runs)]
    if steps[0] and steps[1]:
        share = steps[1] * times[1] / (steps[0] * times[0])
        return f"{said}, at dense's accuracy less a point after {share:.2f} of its time"
    return f"{said}, never at dense's accuracy less a point in validation" if steps[0] else said


def as_accurate(recipe: str, labels: Sequence[str], device: str = "h200", least: int = 3) -> Callable[[], Finding]:
    """Accuracy of structures beside dense; the first with ``least`` seeds must be within a point."""

    def measure() -> Finding:
        found = named(device)
        runs = seeds(found, recipe)
        if len(runs.get("dense", ())) < least or len(runs.get(labels[0], ())) < least:
            return None
        shown = ["dense", *(label for label in labels if label in runs)]
        said = "; ".join(f"{label} {about(found, recipe, label)}" for label in shown)
        return said, accuracy(runs[labels[0]]) >= accuracy(runs["dense"]) - MARGIN

    return measure


def any_within(recipe: str, device: str = "h200") -> Callable[[], Finding]:
    """Whether a structure with at most half of the parameters and three seeds is within a point of dense."""

    def measure() -> Finding:
        found = named(device)
        runs = seeds(found, recipe)
        dense = runs.pop("dense", [])
        small = {n: g for n, g in runs.items() if len(g) >= 3 and (g[0]["metrics"]["params_share"] or 1) <= 0.5}
        if len(dense) < 3 or not small:
            return None
        best = max(small, key=lambda label: accuracy(small[label]))
        said = f"best: {best} {about(found, recipe, best)}; dense {about(found, recipe, 'dense')}"
        return said, accuracy(small[best]) >= accuracy(dense) - MARGIN

    return measure


def faster(model: str, least: float) -> Callable[[], Finding]:
    """Step times of a model of table 3.1."""

    def measure() -> Finding:
        found = named()
        runs = {label: found.get(f"step-{model}-{label}") for label in COLOURS}
        dense, monarch = runs.pop("dense"), runs["monarch4"]
        if dense is None or monarch is None:
            return None
        slow = dense["metrics"]["step_seconds"] or 0.0
        ratios = {n: slow / (run["metrics"]["step_seconds"] or 1.0) for n, run in runs.items() if run is not None}
        said = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
        counts = [f"{(run['metrics']['model_params'] or 0) / 1e6:.1f}M" for run in (dense, monarch)]
        return f"{said} times as fast, whole step, bf16, {counts[1]} parameters instead of {counts[0]}", (
            ratios["monarch4"] >= least
        )

    return measure


_TABLE, _MEMORY = "table 3.1, ImageNet", "from memory, table not read"
ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("ViT with Monarch, n=4, is as accurate", "79.1, dense 79.4 (ViT-S/16)", _TABLE,
     as_accurate("vit_cifar10", ["monarch4"])),
    ("Mixer with Monarch in its channel MLPs is as accurate", "73.7, dense 74.0 (Mixer-S/16)", _TABLE,
     as_accurate("mixer_cifar10", ["monarch4"])),
    ("ViT-S/16 with Monarch trains faster", "1.9 times (V100), 19.6M for 48.8M", _TABLE, faster("vit_s16", 1.9)),
    ("ViT-B/16", "2.0 times (V100), 33.0M for 86.6M", _TABLE, faster("vit_b16", 2.0)),
    ("Mixer-S/16", "1.7 times (V100), 7.0M for 18.5M", _TABLE, faster("mixer_s16", 1.7)),
    ("Mixer-B/16", "1.9 times (V100), 20.9M for 59.9M", _TABLE, faster("mixer_b16", 1.9)),
    ("ViT with Pixelfly is as accurate", "77.5, dense 77.7 (ViT-S/16)", _MEMORY,
     as_accurate("vit_cifar10", ["pixelfly"])),
    ("Mixer with Pixelfly is as accurate", "72.6, dense 72.4 (Mixer-S/16)", _MEMORY,
     as_accurate("mixer_cifar10", ["pixelfly"])),
    ("MNIST perceptron with DYAD, n=4, is as accurate", "90% of dense, no number for MNIST found", "abstract of DYAD",
     as_accurate("mnist_mlp", ["dyad4", "dyad8"])),
    ("the same on a CPU", "no number found", "-", as_accurate("mnist_mlp", ["dyad4", "dyad8"], "cpu", 1)),
    ("ViT: within a point of dense with at most half of the parameters", "no number", "-", any_within("vit_cifar10")),
    ("Mixer: the same", "no number", "-", any_within("mixer_cifar10")),
    ("perceptron: the same", "no number", "-", any_within("mnist_mlp")),
    ("ViT on 10 classes of Tiny ImageNet: the same", "no number", "-", any_within("vit_tiny_imagenet")),
    ("Mixer on them: the same", "no number", "-", any_within("mixer_tiny_imagenet")),
    ("ViT, 128 wide, on MNIST, on a CPU: the same", "no number", "-", any_within("vit_mnist", "cpu")),
    ("Mixer, 128 wide, on MNIST, on a CPU: the same", "no number", "-", any_within("mixer_mnist", "cpu")),
    ("perceptron on a CPU: the same", "no number", "-", any_within("mnist_mlp", "cpu")),
]  # fmt: skip
"""Claim, published value, source, and what gives the finding."""


def draw(kept: Sequence[Record], path: Path) -> None:
    """Accuracy against parameters, and against the seconds of training, of every recipe in ``kept``."""
    by_name = {record["name"]: record for record in kept if record["status"] == "ok"}
    found = {n: record for n, record in by_name.items() if "accuracy" in record["series"] and "@" not in n}  # no sweeps
    recipes = list(dict.fromkeys(re.sub(r"-\w+-s\d+$", "", name) for name in found))
    if not recipes:
        return
    figure = Figure(figsize=(5 * len(recipes), 7.5), dpi=110, layout="constrained")
    axes: Any = figure.subplots(2, len(recipes), squeeze=False)
    for column, recipe in enumerate(recipes):
        above, below = axes[0][column], axes[1][column]
        for label, runs in seeds(found, recipe).items():
            colour = COLOURS.get(label, "#777777")
            shares = [100 * (run["metrics"]["params_share"] or 0.0) for run in runs]
            values = [100 * (run["metrics"].get("test_accuracy") or run["metrics"]["accuracy"] or 0.0) for run in runs]
            above.scatter(shares, values, color=colour, label=label)
            step = step_seconds(by_name, recipe, label)
            for run in runs if step else ():
                curve = [100 * value for value in run["series"]["accuracy"]]
                below.plot([step * count for count in run["series"]["step"]], curve, color=colour, linewidth=1.2)
        above.set(title=recipe, xlabel="parameters, % of dense", ylabel="test accuracy, %, a point each seed")
        below.set(xlabel="training time, seconds", ylabel="validation accuracy, %")
        above.legend(frameon=False)
        for part in (above, below):
            part.grid(color="#ebebeb")
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
