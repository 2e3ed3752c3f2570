"""Curves of language-model runs: validation loss against seconds of training, a PNG beside each file of records.

PYTHONPATH=src python benchmarks/curves.py results/language-dyad.json results/language-time768.json
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

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


def main() -> None:
    """Draw every file that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for path in parser.parse_args().files:
        print(curves(path))


if __name__ == "__main__":
    main()
