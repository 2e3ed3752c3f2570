"""Training curves out of records, and the compute-optimal frontier of a structure over its sizes.

A point of a curve is a validation: training FLOPs up to there (three times those of the forward pass), seconds, loss.
Curves of one size with several seeds are averaged; the frontier takes, at every budget, the size that is best there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..analysis import Taxonomy, taxonomy
from ..report.records import Record
from ..spec import parse

Points = list[tuple[float, float]]
"""(cost, loss), the cost rising."""


class Curve(NamedTuple):
    """One run: its structure, what tells its size from those of other runs, its seed, and its validations."""

    structure: str
    size: str
    seed: int
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    taxonomy: Taxonomy | None = None

    def points(self, cost: str) -> Points:
        """(cost, loss) of every validation; ``cost`` is "flops" or "seconds"."""
        return list(zip(self.flops if cost == "flops" else self.seconds, self.loss, strict=True))


def curves(records: Iterable[Record]) -> list[Curve]:
    """The curves of records of `structlin compare`, `structlin train` and others with the same metrics.

    Failed runs are left out. Runs are of one size when they have the same FLOPs per token and tokens in a step.

    Raises:
        ValueError: for a record without a curve, naming what it lacks, or with a loss that is not positive.
    """
    found = []
    for record in records:
        if record["status"] != "ok":
            continue
        metrics, series, config = record["metrics"], record.get("series", {}), record["config"]
        per_token, tokens, steps = (metrics.get(name) for name in ("flops_per_token", "tokens", "steps"))
        step = series.get("valid_step", series.get("step", []))
        seconds = series.get("valid_seconds", series.get("seconds", []))
        loss = series.get("valid_loss", [])
        if not per_token or not tokens or not steps or not loss or not len(step) == len(seconds) == len(loss):
            raise ValueError(
                f"record {record['name']!r} is no training run: it needs the metrics flops_per_token, tokens and steps "
                "and the series step, seconds and valid_loss, of one length"
            )
        if min(loss) <= 0:
            raise ValueError(f"record {record['name']!r} has the loss {min(loss)}; allowed: positive numbers")
        flops = tuple(3.0 * per_token * tokens * s / steps for s in step)
        structure = str(config.get("structure", record["name"]))
        size = f"{per_token:.6g} FLOPs/token, {tokens / steps:.6g} tokens/step"
        found.append(
            Curve(structure, size, record["seed"], flops, tuple(seconds), tuple(loss), _taxonomy(structure, config))
        )
    return found


def by_structure(found: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Structure -> its curves, in the order in which they come."""
    runs: dict[str, list[Curve]] = {}
    for curve in found:
        runs.setdefault(curve.structure, []).append(curve)
    return runs


def _taxonomy(structure: str, config: dict[str, object]) -> Taxonomy | None:
    """Where the structure stands: from the record, or as a matrix of the model's width."""
    given, width = config.get("taxonomy"), config.get("width")
    if isinstance(given, dict):
        return Taxonomy(**given)
    if not isinstance(width, int):
        return None
    try:
        return taxonomy(parse(structure).plan(width, width))
    except ValueError:
        return None


def averaged(runs: Sequence[Curve], cost: str = "flops") -> dict[str, Points]:
    """Size -> the mean over seeds of the loss at every validation that all of them have, against the mean cost."""
    by_size: dict[str, list[Points]] = defaultdict(list)
    for run in runs:
        by_size[run.size].append(run.points(cost))
    return {
        size: [
            (sum(c for c, _ in column) / len(column), math.exp(sum(math.log(x) for _, x in column) / len(column)))
            for column in zip(*found, strict=False)
        ]
        for size, found in by_size.items()
    }


def frontier(runs: Sequence[Curve], cost: str = "flops") -> Points:
    """What no other point of ``runs`` is at or below in cost and loss, from the cheapest on."""
    kept: Points = []
    for point in sorted(p for points in averaged(runs, cost).values() for p in points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def hull(points: Points) -> Points:
    """The lower convex hull of ``points`` in the logarithms of cost and loss, as far as it falls."""
    found: Points = []
    for point in sorted(points):
        while len(found) > 1 and not _turns(found[-2], found[-1], point):
            found.pop()
        found.append(point)
    lowest = min(range(len(found)), key=lambda i: found[i][1], default=0)
    return found[: lowest + 1]


def _turns(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies strictly below the line from a to c, in logarithms."""
    (ax, ay), (bx, by), (cx, cy) = ((math.log(x), math.log(y)) for x, y in (a, b, c))
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) > 0


def at(points: Points, cost: float) -> float:
    """The loss of a frontier at ``cost``, between its points along straight lines in logarithms.

    Raises:
        ValueError: outside of the frontier.
    """
    if not points or not points[0][0] <= cost <= points[-1][0]:
        raise ValueError(f"a cost of {cost:.4g} is outside of the frontier")
    i = min(bisect_right([c for c, _ in points], cost), len(points) - 1)
    if i == 0:
        return points[0][1]
    (low, first), (high, last) = points[i - 1], points[i]
    share = math.log(cost / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(first) + share * math.log(last))
