"""Rows of docs/claims.md on Pixelated attention, from the records of benchmarks/attention.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evidence import Finding, finished

from structlin.report.records import Record

RESULTS = Path(__file__).resolve().parents[1] / "results" / "attention-h200.json"
TITLE = "Pixelated attention"
INTRO = (
    "The published values are from memory and of whole models on the Long Range Arena; here attention alone is timed "
    "beside PyTorch's fastest dense attention, and quality is that of a language model ([attention.md](attention.md))."
)


def found() -> Mapping[str, Record]:
    """The finished records by name."""
    return finished(RESULTS)


def speed(prefix: str, budget: str, least: float) -> Finding:
    """Forward with backward against the fastest dense backend, heads of 64 and of 128; the slower one counts."""
    kept = found()
    values: dict[int, float] = {}
    for dim in (64, 128):
        metrics = kept[name]["metrics"] if (name := f"{prefix} x 16 heads of {dim}") in kept else {}
        if value := metrics.get(f"{budget}_speedup"):
            values[dim] = value
    if len(values) < 2:
        return None
    said = ", ".join(f"{value:.2f} (heads of {dim})" for dim, value in values.items())
    return f"{said} times as fast, attention alone, forward and backward, bf16", min(values.values()) >= least


def quality(budget: str) -> Finding:
    """Validation loss beside dense, same steps and text."""
    kept = found()
    losses = [kept[name]["metrics"]["valid_loss"] for n in ("dense", budget) if (name := f"quality {n}") in kept]
    if len(losses) < 2 or None in losses:
        return None
    dense, ours = (float(loss) for loss in losses if loss is not None)
    return f"validation loss {ours:.3f}, dense {dense:.3f} (1 seed), windows of 4096", ours <= dense


LRA, TABLE = "5.2 times as fast", "Chen et al. 2022, Long Range Arena, from memory"
ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("attention trains faster: 4096 tokens, 1/8 of the work", LRA, TABLE, lambda: speed("full 4096", "eighth", 5.2)),
    ("the same: 8192 tokens, causal", "no number", "Chen et al. 2022", lambda: speed("causal 8192", "eighth", 2.0)),
    ("the same, 1/4 of the work", "no number", "Chen et al. 2022", lambda: speed("causal 8192", "quarter", 1.0)),
    ("quality is kept, 1/4 of the work", "average accuracy 59.86, dense 59.01", TABLE, lambda: quality("quarter")),
    ("the same, 1/8 of the work", "average accuracy 59.86, dense 59.01", TABLE, lambda: quality("eighth")),
]
