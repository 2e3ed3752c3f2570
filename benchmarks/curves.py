"""Curves of language-model runs: validation loss against seconds of training, a PNG beside each file of records.

    PYTHONPATH=src python benchmarks/curves.py results/language-dyad.json results/language-time768.json
    PYTHONPATH=src python benchmarks/curves.py results/language-mixtures.json --mixtures docs/img/experts.png

The second draws mixtures beside dense, against training FLOPs and against the seconds that each takes alone on its GPU.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from language_plans import MIXED_WIDTHS, MIXTURES, STEP, final_mixtures, speed

from structlin.report import records

mpl.use("Agg")
from matplotlib import pyplot


def curves(path: Path) -> Path:
    """Draw validation loss against seconds of training of all runs of a file of records, beside it as PNG."""
    runs: list[Any] = [r for r in records.read(path) if len(r.get("series", {}).get("valid_loss", [])) > 2]
    groups = sorted({re.split(r"-(?:dense|dyad|monarch)", r["name"])[0] for r in runs})
    figure, all_axes = pyplot.subplots(1, max(1, len(groups)), figsize=(5 * max(1, len(groups)), 4), squeeze=False)
    for axes, group in zip(all_axes[0], groups, strict=False):
        for run in runs:
            if run["name"].startswith(group):
                label = run["name"].removeprefix(group).strip("-")
                series = run["series"]
                axes.plot(series["valid_seconds"][1:], series["valid_loss"][1:], label=label, linewidth=1)
        axes.set(title=group, xlabel="seconds of training", ylabel="validation loss, nats per token")
        axes.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=90)
    return path.with_suffix(".png")


def mixtures(path: Path, out: Path) -> Path:
    """Draw the runs of the plan "mixtures" of a file of records: a row of panels for each width, two seeds a colour."""
    runs: dict[str, Any] = {r["name"]: r for r in records.read(path)}
    figure, rows = pyplot.subplots(len(MIXED_WIDTHS), 2, figsize=(9, 3.4 * len(MIXED_WIDTHS)))
    for width, panels in zip(MIXED_WIDTHS, rows, strict=True):
        for index, name in enumerate(("dense", *MIXTURES)):
            rate = speed(runs[f"moe-w{width}-{name}-speed"])
            for seed, run in enumerate(final_mixtures(runs.values(), width, name, "flops")[0]):
                tokens = [step * STEP for step in run["series"]["valid_step"]]
                scales = 3 * run["metrics"]["flops_per_token"], 1 / rate
                for axes, scale in zip(panels, scales, strict=True):
                    axes.plot([scale * n for n in tokens], run["series"]["valid_loss"], color=f"C{index}",
                              linewidth=1.2, label=name if seed == 0 else None)  # fmt: skip
        for axes, what in zip(panels, ("training FLOPs", "seconds of training, alone on an H200"), strict=True):
            axes.set(xlabel=what, ylabel="validation loss", title=f"width {width}")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    return out


def main() -> None:
    """Draw every file that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--mixtures", type=Path, metavar="FILE.png", help="draw the plan of mixtures there")
    options = parser.parse_args()
    for path in options.files:
        print(mixtures(path, options.mixtures) if options.mixtures else curves(path))


if __name__ == "__main__":
    main()
