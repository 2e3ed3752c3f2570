"""What masks a factor of a structure: a description without tensors, from which a layer makes a parametrization."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Boxcar:
    """A trained mask on a factor: each component keeps one interval of its features, which may wrap around.

    Attributes:
        component: the dimension of the stored factor whose indices have an interval each.
        feature: the dimension along which the intervals lie.
        widths: of the intervals at first, one for each component, as fractions of all features.
        locations: where they start at first, likewise.
        sigma: standard deviation of the Gaussian that smooths the mask, in frequencies; None leaves its edges hard.
        rounding: whether widths and locations are rounded to whole features; their gradients pass straight through.
    """

    component: int
    feature: int
    widths: tuple[float, ...]
    locations: tuple[float, ...]
    sigma: float | None = None
    rounding: bool = True
