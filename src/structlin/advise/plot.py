"""The picture of a calibration: predicted against measured times of layers that it did not see."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.plots import COLOURS, NOTE, STYLE
from .ceilings import Check


def draw(checks: Mapping[str, Sequence[Check]], title: str) -> bytes:
    """One panel for each way to hold layers out, by its name, as PNG. Needs matplotlib."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(checks), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for axes, (held, found) in zip(figure.subplots(1, len(checks), squeeze=False)[0], checks.items(), strict=True):
            times = [1e3 * check.layer.seconds for check in found]
            ends = [0.8 * min(times), 1.25 * max(times)]
            axes.plot(ends, ends, color="#999999", linewidth=1)
            axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="#eeeeee", linewidth=0)
            for colour, backend in zip(COLOURS, dict.fromkeys(check.layer.backend for check in found), strict=False):
                points = [check for check in found if check.layer.backend == backend]
                x, y = ([1e3 * c.layer.seconds for c in points], [1e3 * c.seconds for c in points])
                label = f"{'dense' if backend == 'linear' else backend}: {median(c.error for c in points):.1%}"
                axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.7, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("measured, ms")
            axes.set_ylabel("predicted, ms")
            axes.legend(title="median error", loc="lower right")
            axes.set_title(f"{held}; grey: 15%", loc="left", **NOTE)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
