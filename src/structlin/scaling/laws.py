"""Power laws of the compute-optimal frontier, compute multipliers and differences at equal FLOPs, with intervals.

Intervals of the laws come from resampling seeds, all structures alike, since one seed is the same data for all of them;
those of differences between two structures are Student's over the seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from .curves import Curve, Points, at, frontier, hull

RESAMPLES = 200
GRID = 9  # budgets at which two frontiers are compared, spread evenly in logarithms


class Interval(NamedTuple):
    """A number and its 95% interval, None where there are too few seeds for one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.3g}" + (f" ({self.low:.3g} to {self.high:.3g})" if self.low is not None else "")


class Law(NamedTuple):
    """``loss = floor + coefficient flops**-exponent``.

    Attributes:
        exponent: of FLOPs.
        coefficient: ``A`` of ``loss = floor + A flops**-exponent``.
        floor: what no compute goes below.
    """

    exponent: float
    coefficient: float
    floor: float

    def loss(self, flops: float) -> float:
        """The loss at ``flops``."""
        return self.floor + self.coefficient * math.pow(flops, -self.exponent)


def straight(points: Points) -> Law:
    """The power law without a floor through the hull of a frontier, by least squares in logarithms.

    Raises:
        ValueError: for fewer than two points.
    """
    found = hull(points)
    if len(found) < 2:
        raise ValueError(f"{len(found)} points of a frontier make no law; give runs of more sizes or lengths")
    x, y = [math.log(c) for c, _ in found], [math.log(loss) for _, loss in found]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return Law(-slope, math.exp(mean_y - slope * mean_x), 0.0)


def parametric(points: Points) -> Law:
    """``floor + A flops**-exponent`` through a frontier, by robust least squares in logarithms of loss. Needs scipy.

    Raises:
        ValueError: for fewer than four points.
    """
    from scipy.optimize import least_squares

    if len(points) < 4:
        raise ValueError(f"{len(points)} points of a frontier make no law with a floor; give more sizes or lengths")
    centre = math.exp(sum(math.log(c) for c, _ in points) / len(points))
    smallest = min(loss for _, loss in points)

    def law(given: Sequence[float]) -> Law:
        floor, size, exponent = smallest * given[0], math.exp(given[1]), given[2]
        return Law(exponent, size * centre**exponent, floor)

    def off(given: Sequence[float]) -> list[float]:
        found = law(given)
        return [math.log(found.loss(c) / loss) for c, loss in points]

    start = [0.5, math.log(smallest), 0.3]
    bounds = ([0.0, math.log(smallest) - 20, 1e-3], [0.999, math.log(smallest) + 20, 5.0])
    return law(least_squares(off, start, loss="soft_l1", f_scale=0.01, bounds=bounds).x)


def multiplier(ours: Points, dense: Points) -> float:
    """How many times the FLOPs of ``ours`` the dense frontier needs for the same loss: the geometric mean over the
    losses that both reach; above 1 where ours is better.

    Raises:
        ValueError: where no loss is reached by both.
    """
    low = max(ours[-1][1], dense[-1][1])
    high = min(ours[0][1], dense[0][1])
    if not ours or not dense or low >= high:
        raise ValueError("the frontiers reach no loss in common")
    flipped = [[(loss, cost) for cost, loss in reversed(points)] for points in (ours, dense)]
    grid = [math.exp(math.log(low) + i / (GRID - 1) * math.log(high / low)) for i in range(GRID)]
    ratios = [math.log(at(flipped[1], x) / at(flipped[0], x)) for x in (min(max(g, low), high) for g in grid)]
    return math.exp(sum(ratios) / GRID)


def loss_ratio(ours: Points, other: Points) -> float:
    """Loss of ``ours`` over that of ``other`` at equal cost: the geometric mean over the costs that both have.

    Raises:
        ValueError: where they have no cost in common.
    """
    low, high = max(ours[0][0], other[0][0]), min(ours[-1][0], other[-1][0])
    if low >= high:
        raise ValueError("the frontiers have no cost in common")
    grid = [math.exp(math.log(low) + i / (GRID - 1) * math.log(high / low)) for i in range(GRID)]
    ratios = [math.log(at(ours, x) / at(other, x)) for x in (min(max(g, low), high) for g in grid)]
    return math.exp(sum(ratios) / GRID)


def resampled(
    runs: Mapping[str, Sequence[Curve]], statistic: Callable[[Mapping[str, Sequence[Curve]]], float], seed: int = 0
) -> Interval:
    """A number of all ``runs``, with the percentile interval over resampled seeds; None where there is one seed.

    Args:
        runs: structure -> its curves.
        statistic: of such a mapping; resamples for which it raises ValueError are left out.
        seed: of the resampling.
    """
    from numpy import quantile
    from numpy.random import default_rng

    value = statistic(runs)
    seeds = sorted({run.seed for found in runs.values() for run in found})
    if len(seeds) < 2:
        return Interval(value, None, None)
    rng = default_rng(seed)
    draws = Counter(tuple(sorted(rng.choice(seeds, len(seeds)).tolist())) for _ in range(RESAMPLES))
    values: list[float] = []
    for drawn, times in draws.items():  # few seeds make few different draws
        some = {name: [run for s in drawn for run in of if run.seed == s] for name, of in runs.items()}
        with suppress(ValueError):
            values += [statistic(some)] * times
    if not values:
        return Interval(value, None, None)
    low, high = quantile(values, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def paired(
    runs: Mapping[str, Sequence[Curve]], ours: Sequence[str], others: Sequence[str], cost: str = "flops"
) -> Interval:
    """Loss of the structures ``ours`` over that of ``others`` at equal cost, seed by seed: the geometric mean over all
    pairs and seeds, with Student's 95% interval over the seeds. Needs scipy.

    Raises:
        ValueError: where two of them have no seed or cost in common.
    """
    from scipy.stats import t

    seeds = sorted(set.intersection(*({run.seed for run in runs[name]} for name in (*ours, *others))))
    if not seeds:
        raise ValueError(f"{', '.join((*ours, *others))} have no seed in common")
    logs = []
    for seed in seeds:
        fronts = {name: frontier([r for r in runs[name] if r.seed == seed], cost) for name in {*ours, *others}}
        pairs = [math.log(loss_ratio(fronts[a], fronts[b])) for a in ours for b in others]
        logs.append(sum(pairs) / len(pairs))
    mean = sum(logs) / len(logs)
    if len(logs) < 2:
        return Interval(math.exp(mean), None, None)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
    half = float(t.ppf(0.975, len(logs) - 1)) * deviation / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
