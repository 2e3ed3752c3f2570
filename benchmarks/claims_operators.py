"""Rows of docs/claims.md on operators of differential equations, from the records of benchmarks/operators.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from evidence import Finding, finished

TITLE = "Operators of differential equations"
INTRO = (
    "Navier-Stokes vorticity on 64x64 points from our own solver, 1000 solutions to train on, 10 times given and the "
    "rest predicted up to time 50, 30 and 20 at viscosities 1e-3, 1e-4 and 1e-5; relative L2 error on 200 test ones, "
    "mean and half of the range over seeds. A claim that one model has less error than another is reproduced where the "
    "share that is saved is at least the published one."
)
RESULTS = Path(__file__).resolve().parents[1] / "results"
RECORDS, BURGERS = RESULTS / "operators-h200.json", RESULTS / "burgers-cpu.json"
SOURCE = "Dao et al. 2022, table 3.3"
PUBLISHED = {
    "fno": {"1e-3": 0.017, "1e-4": 0.178, "1e-5": 0.155},
    "monarch_no": {"1e-3": 0.010, "1e-4": 0.145, "1e-5": 0.136},
    "unet": {"1e-3": 0.025, "1e-4": 0.205, "1e-5": 0.198},
}
NAMES = {"fno": "FNO", "monarch_no": "Monarch-NO", "unet": "U-Net"}


def errors(model: str, flow: str) -> list[float]:
    """Test errors of all seeds of a model."""
    runs = [r for name, r in finished(RECORDS).items() if re.fullmatch(rf"{model}-{re.escape(flow)}-s\d+", name)]
    return [float(run["metrics"]["test_relative_l2"] or 0.0) for run in runs]


def said(values: list[float]) -> str:
    """Mean and half of the range, and over how many seeds."""
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return f"{mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f} ({seeds})"


def reaches(least: float) -> Callable[[], Finding]:
    """The error of FNO at the largest viscosity is at most ``least``."""

    def measure() -> Finding:
        values = errors("fno", "1e-3")
        return (said(values), mean(values) <= least) if values else None

    return measure


def saves(better: str, worse: str, flow: str) -> Callable[[], Finding]:
    """The share of the error of ``worse`` that ``better`` saves is at least the published one."""

    def measure() -> Finding:
        low, high = errors(better, flow), errors(worse, flow)
        if not low or not high:
            return None
        saved, published = (
            1 - a / b for a, b in ((mean(low), mean(high)), (PUBLISHED[better][flow], PUBLISHED[worse][flow]))
        )
        direction = "less" if saved > 0 else "more"
        words = f"{NAMES[better]} {said(low)}, {NAMES[worse]} {said(high)}: {abs(saved):.0%} {direction}"
        return words, saved >= published

    return measure


def on_burgers() -> Finding:
    """Whether Monarch-NO has less error than FNO on Burgers' equation, three seeds each."""
    runs = finished(BURGERS)
    low, high = (
        [
            float(run["metrics"]["test_relative_l2"] or 0.0)
            for name, run in runs.items()
            if name.startswith(f"burgers-{m}-")
        ]
        for m in ("monarch_no", "fno")
    )
    if min(len(low), len(high)) < 3:
        return None
    return f"Monarch-NO {said(low)}, FNO {said(high)}; 1024 points, 1500 updates", mean(low) < mean(high)


ROWS: list[tuple[str, str, str, Callable[[], Finding]]] = [
    ("FNO reaches 0.02 at viscosity 1e-3", "0.017", SOURCE, reaches(0.02)),
    *(
        (
            f"{NAMES[better]} has less error than {NAMES[worse]} at viscosity {flow}",
            f"{PUBLISHED[better][flow]:.3f}, {PUBLISHED[worse][flow]:.3f}: "
            f"{1 - PUBLISHED[better][flow] / PUBLISHED[worse][flow]:.0%} less",
            SOURCE,
            saves(better, worse, flow),
        )
        for better, worse in (("monarch_no", "fno"), ("fno", "unet"))
        for flow in ("1e-3", "1e-4", "1e-5")
    ),
    ("Monarch-NO has less error than FNO on Burgers' equation, on a CPU", "no number", "-", on_burgers),
]
