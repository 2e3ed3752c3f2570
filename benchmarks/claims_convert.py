"""Rows on pretrained models for the page of claims, from the records that benchmarks/real_models.py writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from evidence import Finding, finished

TITLE = "Pretrained models"
INTRO = """MiniLM (6 layers of 384 features) with structured layers in place of its dense ones, distilled without
labels, then tuned on rte, mrpc, stsb, sick and qnli, one seed; each model at the better of two learning rates. Speeds
are those of compiled training steps. [convert.md](convert.md#what-is-lost) has all cases."""
RESULTS = Path(__file__).resolve().parents[1] / "results"


def score(case: str) -> float | None:
    """Mean of the tasks' main metrics in percent at the better rate, None where one is missing."""
    runs = finished(RESULTS / "minilm-d2s-h200.json").values()
    by_rate: dict[str, list[float]] = {}
    for run in runs:
        if run["name"].partition(f"{run['config']['task']} ")[2].partition(" at ")[0] == case:
            by_rate.setdefault(run["config"]["rate"], []).append(100 * (run["metrics"]["score"] or 0.0))
    return max(map(mean, by_rate.values()), default=None)


def keeps(share: str, gap: float) -> Callable[[], Finding]:
    """The score with Monarch at a share of the parameters; at most ``gap`` points may be lost."""

    def measure() -> Finding:
        dense, ours = score("dense"), score(f"monarch {share}")
        if dense is None or ours is None:
            return None
        return f"{ours:.1f}, dense {dense:.1f}, with Monarch at {share} of the parameters of those layers", (
            ours >= dense - gap
        )

    return measure


def faster() -> Finding:
    """Compiled training steps of MiniLM and SmolLM2 with Monarch at half of the parameters, over dense."""
    said, ratios = [], []
    for model, shown in (("minilm", "MiniLM"), ("smollm2", "SmolLM2, 576 features")):
        runs = finished(RESULTS / f"{model}-speed-h200.json")
        if not {"speed dense", "speed monarch 50%"} <= set(runs):
            return None
        dense, ours = (runs[f"speed {name}"]["metrics"]["compiled_step_ms"] for name in ("dense", "monarch 50%"))
        ratios.append((dense or 0.0) / (ours or 1.0))
        said.append(f"{shown} {ratios[-1]:.2f}")
    return f"{', '.join(said)} times as fast, Monarch at 50%", min(ratios) >= 1.5


ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("tuned as well as dense at half of the parameters", "BERT-base 78.3, dense 78.6, mean of GLUE",
     "Dao et al. 2022, table 3.8", keeps("50%", 0.3)),
    ("the same at three quarters", "no number", "-", keeps("75%", 0.3)),
    ("tuning is faster", "BERT-base 1.5 times, BERT-large 1.7 times", "Dao et al. 2022, table 3.8", faster),
]  # fmt: skip
