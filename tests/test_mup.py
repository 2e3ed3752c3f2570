"""The sweep of learning rates over widths: its verdict, its picture, and a tiny run of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import script

from structlin.report import records

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mup.py"


@pytest.fixture(scope="module")
def mup():
    return script("mup")


def record(width, rule, losses, seed=0):
    """One with the given validation losses, by rate."""
    config = {"structure": "monarch:nblocks=4", "width": width, "widths": [128, 512], "rule": rule}
    series = {"lr": list(losses), "valid_loss": list(losses.values())}
    return {
        "kind": "train", "name": f"{width} {rule}", "created": "2026-01-31T12:00:00+00:00", "command": "", "seed": seed,
        "device": {"type": "cpu"}, "versions": {}, "commit": None, "config": config, "metrics": {}, "series": series,
        "status": "ok", "error": None,
    }  # fmt: skip


FOUND = [
    record(128, "param_groups", {0.125: 3.0, 0.25: 2.0, 0.5: 2.5}),
    record(128, "param_groups", {0.125: 3.0, 0.25: 2.0, 0.5: 2.5, 1.0: 0.5}, seed=1),  # the other seed diverged at 1
    record(512, "param_groups", {0.125: 2.0, 0.25: 1.5, 0.5: 1.25}),
    record(128, "one rate", {0.125: 3.0, 0.25: 2.5, 0.5: 2.0}),
    record(512, "one rate", {0.125: 1.5, 0.25: 1.75}),
]


def test_the_drift_is_counted_in_doublings_and_over_seeds(mup):
    ours, one = mup.verdicts(FOUND)
    assert (ours["rule"], ours["best"], ours["drift"]) == ("param_groups", {128: 0.25, 512: 0.5}, 1)
    assert (ours["loss"], ours["loss_at_base_rate"]) == ({128: 2.0, 512: 1.25}, 1.5)
    assert (one["rule"], one["best"], one["drift"]) == ("one rate", {128: 0.5, 512: 0.125}, -2)
    assert one["loss_at_base_rate"] is None
    assert [row["rule"] for row in mup.verdicts(FOUND[:-1])] == ["param_groups"]


def test_it_is_drawn(mup):
    pytest.importorskip("matplotlib")
    assert mup.draw(FOUND).startswith(b"\x89PNG")
    assert mup.draw(FOUND[:1]).startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_tiny_sweep_records_and_draws(tmp_path):
    out, png = tmp_path / "mup.json", tmp_path / "mup.png"
    options = ["--smoke", "--device", "cpu", "--structures", "dense,btt:rank=2", "--out", str(out)]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = records.read(out)
    assert [(r["config"]["structure"], r["config"]["width"], r["config"]["rule"]) for r in found] == [
        (structure, width, rule)
        for structure in ("dense", "btt:rank=2")
        for width in (64, 128)
        for rule in ("param_groups", "one rate")
    ]
    assert found[0]["series"] == found[1]["series"], "both rules are the same for a dense model at the base width"
    assert found[2]["series"] != found[3]["series"]
    drawn = subprocess.run([sys.executable, SCRIPT, "--draw", png, out], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.count("drift") == 4
    assert png.read_bytes().startswith(b"\x89PNG")
    cut = subprocess.run([sys.executable, SCRIPT, *options, "--minutes", "0"], capture_output=True, text=True)
    assert "left out after 0.0 minutes: dense 64 seed 0; dense 128 seed 0;" in cut.stdout


def test_a_run_does_not_depend_on_the_runs_before_it(mup):
    settings = mup.replace(mup.SMOKE, steps=2, exponents=(-8,))
    trained = mup.Sweep("monarch:nblocks=4", 128, 0, settings, mup.Text(b"abcd" * 99, b"abdc" * 99, (), 1), "cpu")
    first = trained.run(2**-8, "param_groups")
    assert trained.run(2**-6, "one rate") != first
    assert trained.run(2**-8, "param_groups") == first
