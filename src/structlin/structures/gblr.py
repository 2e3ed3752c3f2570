"""Generalised block low rank (Lee et al., 2024): a sum of low-rank blocks whose places and sizes are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..masks import Boxcar
from ..plan import Plan
from ..spec import Spec, register
from ..widths import share


@register("gblr")
class Gblr(Spec):
    """``W = sum_k (m2_k * up_k) (m1_k * down_k)`` with a trained boxcar mask at each end of each component (Lee et al.
    2024, "Gaudi-GBLR").

    Factors: ``down`` (components, rank, in), ``up`` (out, components, rank). A mask is one where its cyclic interval of
    features lies and zero elsewhere; ``sigma``, which training anneals upwards, smooths it, and left out its edges are
    hard.
    Components are a number or a fraction of min(out_features, in_features) / rank. ``width`` is the mean width of all
    intervals at first: a share width / 2 of the components is full, the others are equally narrow ("splr", sparse plus
    low rank), and their locations are spread evenly. ``rounding`` keeps intervals on whole features.
    """

    components: int | float = 0.25
    rank: int = 1
    width: float = 0.5
    sigma: int | None = None
    rounding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width == 0:
            raise ValueError("gblr: width=0.0 leaves no feature to any component; it may be above 0, up to 1")

    def plan(self, out_features: int, in_features: int) -> Plan:
        limit = min(out_features, in_features) // self.rank
        if limit == 0:
            raise ValueError(
                f"rank={self.rank} exceeds min(out_features, in_features); "
                f"rank may be 1 to {min(out_features, in_features)}"
            )
        components = share(self.components, limit)
        if components > limit:
            raise ValueError(
                f"components={components} of rank={self.rank} exceed min(out_features, in_features); "
                f"components may be 1 to {limit}"
            )
        return Plan.einsum(
            "i, k r i, o k r -> o", names=["down", "up"], i=in_features, k=components, r=self.rank, o=out_features
        )

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Both ends of every component; the locations of the outputs are those of the inputs."""
        components, fraction = plan.sizes["k"], self.width / 2
        full = round(fraction * components)
        widths = (1.0,) * full + (fraction / (1 - fraction),) * (components - full)
        locations = tuple(k / components for k in range(components))
        return {
            name: Boxcar(component, feature, widths, locations, self.sigma, self.rounding)
            for name, component, feature in (("down", 0, 2), ("up", 1, 0))
        }

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(components=4, rank=2), (24, 16)
        yield cls(components=0.5, width=0.8, sigma=4, rounding=False), (15, 20)
