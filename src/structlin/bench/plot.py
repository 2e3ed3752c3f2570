"""The picture of a run: speed-up over dense at every shape, from the narrowest to the widest, a panel per structure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..ops import BACKENDS
from ..report.records import Record
from .contenders import CEILING, COMPILED, MODES

COLOURS = {
    CEILING: "#9a9a9a",
    COMPILED: "#e69f00",
    "auto": "#000000",
    "dense": "#cc79a7",
    "reference": "#56b4e9",
    "bmm": "#0072b2",
    "copy": "#d55e00",
    "triton": "#009e73",
}
SPARE = ("#7a4fbf", "#8c564b", "#b8b800")
MARKERS = "os^DvPX*<>"
Points = dict[str, dict[str, float]]
"""Contender -> problem -> speed-up."""


def speedups(records: Sequence[Record]) -> tuple[str, dict[str, Points]]:
    """What is drawn: its name, and for each structure the speed-ups of its problems, narrow ones first.

    Forward and backward where they were measured, else forward; from CUDA graphs where they were captured.
    """
    for mode in reversed(MODES):
        for means in ("graph", "eager"):
            key = f"{means}_{mode}_speedup"
            if any(record["metrics"].get(key) is not None for record in records):
                return key, _points(records, key)
    return "", {}


def _points(records: Sequence[Record], key: str) -> dict[str, Points]:
    panels: dict[str, Points] = {}
    for record in sorted(records, key=lambda r: (r["config"]["in_features"], r["config"]["out_features"])):
        config, value = record["config"], record["metrics"].get(key)
        name, *parameters = config["structure"].split(":")
        panel = f"{name}, blocked" if "order=blocked" in parameters else name
        values = [part.partition("=")[2] for part in parameters if not part.startswith("order=")]
        label = "\n".join([f"{config['in_features']}", f"->{config['out_features']}", *values])
        if config["backend"] in (CEILING, COMPILED, *BACKENDS) and value is not None:
            panels.setdefault(panel, {}).setdefault(config["backend"], {})[label] = value
    return panels


def draw(records: Sequence[Record]) -> bytes:
    """The picture as PNG. Needs matplotlib.

    Raises:
        ValueError: when no record holds a speed-up.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    key, panels = speedups(records)
    if not panels:
        raise ValueError("no record holds a speed-up over dense")
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    looks = {name: _look(name, names) for name in names}
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}):
        figure = Figure(figsize=(1.6 + 4 * columns, 0.8 + 3.1 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (panel, points) in zip(all_axes, panels.items(), strict=False):
            ticks = list(dict.fromkeys(label for values in points.values() for label in values))
            axes.axhline(1, color="black", linewidth=0.8)
            for name, values in points.items():
                x = [ticks.index(label) for label in values]
                axes.plot(x, list(values.values()), linewidth=1.4, markersize=4.5, **looks[name])
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
            axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
            axes.margins(x=0.12)
            axes.set_title(panel, loc="left", fontweight="bold")
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        handles = [Line2D([], [], label=name, **looks[name]) for name in names]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        figure.suptitle(_title(records[0], key), x=0.01, ha="left", fontsize=10)
        figure.supxlabel("in_features -> out_features, and nblocks or rank", fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    unknown = [other for other in names if other not in COLOURS]
    colour = COLOURS.get(name) or SPARE[unknown.index(name) % len(SPARE)]
    return {
        "color": colour,
        "marker": MARKERS[names.index(name) % len(MARKERS)],
        "linestyle": "--" if name == CEILING else "-",
    }


def _title(record: Record, key: str) -> str:
    means, _, mode = key.removesuffix("_speedup").partition("_")
    config = record["config"]
    return (
        f"Speed-up over dense, {mode.replace('_', '+')} ({means}); {record['device']['name']}, "
        f"{config['tokens']} tokens, {config['dtype']}"
    )
