"""Rows of docs/claims.md on pixelfly for whole models, from the records of benchmarks/sparsify.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean

from evidence import Finding, finished

from structlin.report.records import Record

TITLE = "Pixelfly for whole models"
INTRO = (
    'Dao et al. 2022, "Pixelated Butterfly". Steps are whole training steps in bfloat16, compiled and as CUDA graphs, '
    "with a quarter of the weights in the sparse layers; values from memory were not read in a source."
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "sparsify-h200.json"
NAMES = {"gpt2_medium": "GPT-2 medium", "vit_b": "ViT-B", "mixer_b": "Mixer-B"}
MASKS = ("random", "magnitude")


def found() -> dict[str, Record]:
    """The finished records by name, none where the file is missing."""
    return finished(RESULTS)


def over_butterfly() -> Finding:
    """How much faster layers are than the product of factors: the largest of the shapes has to reach 3.

    Layers whose rival of as many weights has a single factor are left out, as that is no product.
    """
    ratios = {
        record["name"].removeprefix("layer "): record["metrics"]["butterfly_ms"] / record["metrics"]["pixelfly_ms"]
        for record in found().values()
        if record["name"].startswith("layer ") and not record["config"]["specs"]["butterfly"].endswith(":nfactors=1")
    }
    if not ratios:
        return None
    said = ", ".join(f"{name.replace(' d', ' at ')} {ratio:.2f}" for name, ratio in ratios.items())
    return f"{said} times as fast, layers by density", max(ratios.values()) >= 3


def steps(goal: float, *models: str) -> Callable[[], Finding]:
    """How much faster than dense the steps of models are; one of them has to reach ``goal``."""

    def measure() -> Finding:
        runs = found()
        pairs = {m: (runs.get(f"{m} dense d1.0"), runs.get(f"{m} pixelfly d0.25")) for m in models}
        ratios = {
            NAMES[m]: (dense["metrics"]["step_ms"] or 0) / (fly["metrics"]["step_ms"] or 1)
            for m, (dense, fly) in pairs.items()
            if dense and fly
        }
        if len(ratios) < len(models):
            return None
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        return f"{said} times dense's speed, whole step", max(ratios.values()) >= goal

    return measure


def losses(runs: Mapping[str, Record], contender: str) -> list[float]:
    """Validation losses over seeds, at the rate that most of them have."""
    own = [r for name, r in runs.items() if name.startswith(f"quality {contender} ")]
    rates = [r["config"]["rate"] for r in own]
    rate = max(rates, key=rates.count, default=None)
    return [r["metrics"]["valid_loss"] or 0.0 for r in own if r["config"]["rate"] == rate]


def quality(others: tuple[str, ...], margin: float) -> Callable[[], Finding]:
    """Loss of pixelfly beside that of others: it may exceed none of theirs by more than ``margin`` nats a byte."""

    def measure() -> Finding:
        runs = found()
        each = {name: losses(runs, name) for name in ("pixelfly", *others)}
        if any(len(values) < 2 for values in each.values()):
            return None
        said = ", ".join(f"{n} {mean(v):.3f} ± {(max(v) - min(v)) / 2:.3f}" for n, v in each.items())
        seeds = min(map(len, each.values()))
        within = all(mean(each["pixelfly"]) <= mean(each[name]) + margin for name in others)
        return f"{said}; bytes, a small decoder, {seeds} seeds", within

    return measure


ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("faster than the product of butterfly factors", "3 times", "abstract", over_butterfly),
    ("GPT-2 medium, ViT or Mixer trains faster", "up to 2.5 times", "abstract", steps(2.5, *NAMES)),
    ("GPT-2 medium trains faster", "2.5 times (from memory)", "-", steps(2.5, "gpt2_medium")),
    ("ViT-B trains faster", "2.0 times (from memory)", "-", steps(2.0, "vit_b")),
    ("Mixer-B trains faster", "2.3 times (from memory)", "-", steps(2.3, "mixer_b")),
    ("no drop in quality at a density of 0.25", "no drop", "abstract", quality(("dense",), 0.01)),
    ("as good as a random or magnitude mask", "no number", "-", quality(MASKS, 0.01)),
]
"""Claim, published value, its source, and what measures it."""
