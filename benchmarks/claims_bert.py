"""Rows on BERT for the page of claims, from the records that benchmarks/bert.py writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from evidence import Finding, finished
from language_plans import speed, spread

from structlin.report.records import Record

TITLE = "BERT"
INTRO = """Masked tokens only, no next-sentence objective; BERT-base on one text, two seeds, then GLUE tasks.
[train.md](train.md#bert) has the recipe, `benchmarks/bert.py` all runs."""
SWITCH = 0.7  # share of the updates before the switch to dense weights, as published
TASKS = ("sst2", "mrpc", "cola", "rte")
PATH = Path(__file__).resolve().parents[1] / "results" / "bert-h200.json"


def found() -> dict[str, Record]:
    """The finished records by name."""
    return finished(PATH)


def seeds(name: str) -> list[Record]:
    """The records of both seeds, or none where one is missing."""
    runs = found()
    names = [f"{name}-s{seed}" for seed in (0, 1)]
    return [runs[each] for each in names] if set(names) <= set(runs) else []


def faster(size: str) -> tuple[float, float] | None:
    """How many times as fast as dense an update with Monarch is, and a run whose first 70% have Monarch."""
    runs = found()
    dense, ours = (runs.get(f"{size}-{name}-speed") for name in ("dense", "scratch"))
    if dense is None or ours is None:
        return None
    ratio = speed(ours) / speed(dense)
    return ratio, 1 / (SWITCH / ratio + 1 - SWITCH)


def large() -> Finding:
    """Speed of BERT-large, both ways."""
    ratios = faster("large")
    if ratios is None:
        return None
    update, whole = ratios
    return (
        f"{update:.2f} times as fast an update, {whole:.2f} times a run with the switch; dense compiled",
        whole >= 1.27,
    )


def reverse() -> Finding:
    """Time and loss of BERT-base with the switch beside dense, equal updates."""
    ratios, dense, ours = faster("base"), seeds("dense"), seeds("reverse")
    if ratios is None or not dense or not ours:
        return None
    ends = [spread([_metric(run, "valid_loss") for run in runs]) for runs in (ours, dense)]
    said = ", dense ".join(f"{middle:.3f} ± {half:.3f}" for middle, half in ends)
    return f"{ratios[1]:.2f} times as fast, loss {said}", ratios[1] > 1 and ends[0][0] <= ends[1][0] + ends[1][1]


def glue(variant: str, gap: float) -> Callable[[], Finding]:
    """Mean of the main metrics beside dense, in points; at most ``gap`` may be lost."""

    def measure() -> Finding:
        means = []
        for name in (variant, "dense"):
            runs = [seeds(f"finetune/{task} {name}") for task in TASKS]
            if not all(runs):
                return None
            means.append(
                [
                    mean(100 * _metric(run, str(run["config"]["main_metric"])) for run in of)
                    for of in zip(*runs, strict=True)
                ]
            )
        ends = [spread(values) for values in means]
        said = ", dense ".join(f"{middle:.1f} ± {half:.1f}" for middle, half in ends)
        return f"{said}: mean of {', '.join(TASKS)}", ends[0][0] >= ends[1][0] - gap

    return measure


def _metric(record: Record, name: str) -> float:
    value = record["metrics"][name]
    assert value is not None, f"{record['name']} is finished and has no {name}"
    return value


ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("BERT-large pretrains faster, Monarch then dense", "1.27 times MLPerf's code, 3.5 times transformers'",
     "Dao et al. 2022, table 3.7", large),
    ("the same without loss, BERT-base", "no number", "Dao et al. 2022, table 3.7", reverse),
    ("GLUE, dense weights projected, then tuned", "78.3, dense 78.6", "Dao et al. 2022, table 3.8",
     glue("projected", 0.3)),
]  # fmt: skip
