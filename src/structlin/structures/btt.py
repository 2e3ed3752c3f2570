"""Block tensor train with two cores (Qiu et al., 2024): Monarch with freely chosen factors of the widths and a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, balanced, register


@register("btt")
class BTT(Spec):
    """Both widths are split into their two factors nearest the square root; every pair of blocks has rank ``rank``.

    Factors: ``first`` (c, f, rank, a), ``second`` (f, e, c, rank) for in_features = c a and out_features = f e.
    """

    rank: int = 1

    def plan(self, out_features: int, in_features: int) -> Plan:
        (a, c), (f, e) = balanced(in_features), balanced(out_features)
        limit = min(a, e)
        if self.rank > limit:
            raise ValueError(
                f"rank={self.rank} exceeds that of a block of {e}x{a} ({out_features}x{in_features}); "
                f"rank may be 1 to {limit}"
            )
        return Plan.einsum("c a, c f r a, f e c r -> f e", names=["first", "second"], c=c, a=a, f=f, e=e, r=self.rank)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(rank=1), (16, 16)
        yield cls(rank=2), (24, 16)
        yield cls(rank=3), (16, 24)
