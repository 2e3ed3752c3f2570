"""Two pictures of a comparison: validation loss as training goes on, and at its end against what it cost.

Each structure has one colour and one marker in both; dense is black. Drawn without a display, returned as PNG bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from .records import Record
from .tables import by_loss

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fbf", "#8c564b", "#b5a100", "#777777")
MARKERS = "osD^vPX*<>"
NOTE: Any = {"fontsize": 9, "color": "#666666"}
STYLE: Any = {
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 10,
    "grid.color": "#ebebeb",
    "legend.frameon": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def curves(records: Sequence[Record]) -> bytes:
    """Validation bits per byte against training steps and against training seconds, one line per structure."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = _two_panels("Validation loss during training")
        for record in records:
            series = record.get("series", {})
            bits = [loss / math.log(2) for loss in series.get("valid_loss", [])]
            for axes, x in ((left, "step"), (right, "seconds")):
                axes.plot(series.get(x, []), bits, markersize=4, linewidth=1.6, **_look(record, records))
        left.set_xlabel("training step")
        right.set_xlabel("training time, seconds")
        return _finish(figure, left, records)


def pareto(records: Sequence[Record]) -> bytes:
    """Final validation bits per byte against FLOPs per token and against training seconds, one point per structure.

    The grey line joins the structures that nothing beats in both.
    """
    with mpl.rc_context(STYLE):
        figure, panels = _two_panels("What the loss cost: lower left is better")
        for axes, metric in zip(panels, ("flops_per_token", "train_seconds"), strict=True):
            points = {
                record["name"]: (cost, bits)
                for record in records
                if (cost := record["metrics"].get(metric)) is not None
                and (bits := record["metrics"].get("bits_per_byte")) is not None
            }
            for record in records:
                if record["name"] in points:
                    axes.plot(*points[record["name"]], markersize=9, linestyle="", **_look(record, records))
            axes.plot(*front(list(points.values())), color="#bbbbbb", linewidth=1.2, zorder=1)
            axes.margins(0.12)
        panels[0].set_xlabel("forward FLOPs per token")
        panels[0].xaxis.set_major_formatter(EngFormatter())
        panels[1].set_xlabel("training time, seconds")
        panels[1].set_title("grey line: no other is better in both", loc="right", **NOTE)
        return _finish(figure, panels[0], records)


def front(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x and y of the points that no other point is at or below in both, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return [x for x, _ in kept], [y for _, y in kept]


def _two_panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2, sharey=True)
    return figure, (left, right)


def _look(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    others = [other["name"] for other in records if other["name"] != "dense"]
    if record["name"] == "dense":
        return {"color": "black", "marker": "o"}
    index = others.index(record["name"])
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + 1) % len(MARKERS)]}


def _finish(figure: Figure, left: Axes, records: Sequence[Record]) -> bytes:
    left.set_ylabel("validation bits per byte")
    left.set_title(_setting(records), loc="left", **NOTE)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    handles = [
        Line2D([], [], label=_label(record), linestyle="", markersize=7, **_look(record, records))
        for record in by_loss(records)
    ]
    figure.legend(handles=handles, loc="outside right center", title="lowest loss first", alignment="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _setting(records: Sequence[Record]) -> str:
    config = records[0]["config"]
    swapped = f"layers replaced: {config['where']}" if "where" in config else ""
    steps = f"{config['steps']} steps" if "steps" in config else ""
    return ", ".join(filter(None, [steps, swapped, records[0]["device"].get("name")]))


def _label(record: Record) -> str:
    return record["name"] if record["status"] == "ok" else f"{record['name']} (failed)"
