"""A folder about some training runs: the laws of every structure as a table and as JSON, and three pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.plots import COLOURS, MARKERS, NOTE, STYLE
from ..report.records import write_bytes
from .curves import Curve, Points, averaged, by_structure, frontier
from .laws import Interval, loss_ratio, multiplier, parametric, resampled, straight

FILES = ("scaling.json", "report.md", "flops.png", "seconds.png", "taxonomy.png")
"""What `write` leaves in its folder."""

DENSE = "dense"
Runs = Mapping[str, Sequence[Curve]]


class Row(NamedTuple):
    """The laws of a structure, each with its interval; None where there are too few points, or no dense runs.

    Attributes:
        structure: as text.
        runs: how many.
        exponent: of the power law through the hull.
        coefficient: of the same.
        floor: of the parametric fit.
        floor_exponent: exponent of the parametric fit.
        multiplier: FLOPs that dense needs for the same loss, over those of the structure.
    """

    structure: str
    runs: int
    exponent: Interval
    coefficient: Interval
    floor: Interval | None
    floor_exponent: Interval | None
    multiplier: Interval | None


def rows(runs: Runs) -> list[Row]:
    """The laws of every structure: dense, then the others by their multiplier, the best first.

    Raises:
        ValueError: for a structure with too few points for a law.
    """

    def law(name: str, number: Callable[[Points], float]) -> Interval:
        return resampled({name: runs[name]}, lambda some: number(frontier(some[name])))

    def row(name: str) -> Row:
        floor = floor_exponent = times = None
        if len(frontier(runs[name])) >= 4:
            floor = law(name, lambda points: parametric(points).floor)
            floor_exponent = law(name, lambda points: parametric(points).exponent)
        if DENSE in runs and name != DENSE and _meets(runs, name):
            both = {DENSE: runs[DENSE], name: runs[name]}
            times = resampled(both, lambda some: multiplier(frontier(some[name]), frontier(some[DENSE])))
        exponent = law(name, lambda points: straight(points).exponent)
        coefficient = law(name, lambda points: straight(points).coefficient)
        return Row(name, len(runs[name]), exponent, coefficient, floor, floor_exponent, times)

    return sorted(map(row, runs), key=lambda r: (r.structure != DENSE, -(r.multiplier.value if r.multiplier else 0)))


def _meets(runs: Runs, name: str) -> bool:
    """Whether a structure and dense reach a loss in common."""
    ours, dense = frontier(runs[name]), frontier(runs[DENSE])
    return max(ours[-1][1], dense[-1][1]) < min(ours[0][1], dense[0][1])


def markdown(found: Sequence[Row]) -> str:
    """The laws as a Markdown table."""
    lines = [
        "| structure | runs | exponent | coefficient | floor | exponent above it | FLOPs of dense for the same loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        cells = (row.exponent, row.coefficient, row.floor, row.floor_exponent, row.multiplier)
        shown = ["-" if cell is None else str(cell) for cell in cells]
        lines.append(f"| {row.structure} | {row.runs} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, curves: Sequence[Curve]) -> list[Row]:
    """Write `FILES` into ``folder``, which is made; ``taxonomy.png`` where dense ran too and widths are known.

    Raises:
        ValueError: for a structure with too few points for a law.
        OSError: when something cannot be written.
    """
    runs = by_structure(curves)
    found = rows(runs)
    folder.mkdir(parents=True, exist_ok=True)
    values = [{name: value._asdict() if isinstance(value, Interval) else value for name, value in row._asdict().items()}
              for row in found]  # fmt: skip
    write_bytes(folder / "scaling.json", (json.dumps(values, indent=1) + "\n").encode())
    write_bytes(folder / "report.md", markdown(found).encode())
    write_bytes(folder / "flops.png", picture(runs, "flops"))
    write_bytes(folder / "seconds.png", picture(runs, "seconds"))
    if DENSE in runs and any(curve.taxonomy for curve in curves):
        write_bytes(folder / "taxonomy.png", by_taxonomy(runs))
    return found


def picture(runs: Runs, cost: str) -> bytes:
    """Loss against ``cost`` ("flops" or "seconds"), as PNG: all curves thin, frontiers thick, laws of FLOPs dotted."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, (name, curves) in enumerate(runs.items()):
            colour = "black" if name == DENSE else COLOURS[index % len(COLOURS)]
            for points in averaged(curves, cost).values():
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.4)
            front = frontier(curves, cost)
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*front, strict=True), marker + "-", color=colour, markersize=3.5, label=name)
            if cost == "flops" and len(front) > 1:
                law, ends = straight(front), (front[0][0], front[-1][0])
                axes.plot(ends, [law.loss(c) for c in ends], ":", color=colour, linewidth=1.2)
        _finish(figure, axes, "training FLOPs" if cost == "flops" else "training seconds", "validation loss")
        return _png(figure)


def by_taxonomy(runs: Runs) -> bytes:
    """Loss over dense at equal FLOPs against omega, psi and nu of each structure, as PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharey=True)
        reference = frontier(runs[DENSE]) if DENSE in runs else None
        for index, (name, curves) in enumerate(runs.items()):
            known = [curve.taxonomy for curve in curves if curve.taxonomy is not None]
            if not known or reference is None:
                continue
            try:
                ratio = loss_ratio(frontier(curves), reference)
            except ValueError:
                continue  # no FLOPs in common
            colour = "black" if name == DENSE else COLOURS[index % len(COLOURS)]
            for axes, exponent in zip(panels, ("omega", "psi", "nu"), strict=True):
                mean = sum(getattr(one, exponent) for one in known) / len(known)
                axes.plot(mean, ratio, MARKERS[index % len(MARKERS)], color=colour, markersize=8, label=name)
                axes.set_xlabel(exponent)
        panels[0].set_ylabel("loss over dense at equal FLOPs")
        panels[0].set_title("exponents at the sizes that ran", loc="left", **NOTE)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        return _png(figure)


def _finish(figure: Figure, axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title("thick: best size at each cost; dotted: power law of its hull", loc="left", **NOTE)
    figure.legend(loc="outside right center")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
