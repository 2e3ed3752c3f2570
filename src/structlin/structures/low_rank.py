"""Low rank: the product of a wide and a tall matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..analysis import fan
from ..plan import Plan
from ..spec import Spec, register
from ..widths import share


@register("low_rank")
class LowRank(Spec):
    """``W = up @ down`` with ``down`` (rank, in_features) and ``up`` (out_features, rank).

    Rank is a whole number or a fraction of min(out_features, in_features): ``low_rank:rank=0.25``.
    """

    rank: int | float = 8

    def plan(self, out_features: int, in_features: int) -> Plan:
        limit = min(out_features, in_features)
        rank = share(self.rank, limit)
        if rank > limit:
            raise ValueError(f"rank={rank} exceeds min(out_features, in_features); rank may be 1 to {limit}")
        return Plan.einsum("i, r i, o r -> o", names=["down", "up"], i=in_features, r=rank, o=out_features)

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Normal with standard deviation 1 / sqrt(fan-in) (Potapczynski et al. 2024, `cola_nn.py`)."""
        return {name: ("normal", fan(plan, name)[0] ** -0.5) for name in plan.factors}

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(rank=4), (24, 16)
        yield cls(rank=0.5), (16, 24)
