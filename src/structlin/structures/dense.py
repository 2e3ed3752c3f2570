"""The unstructured matrix, so that sweeps treat the baseline like everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, register


@register("dense")
class Dense(Spec):
    """An ordinary weight of shape (out_features, in_features); runs as ``torch.nn.functional.linear``."""

    def plan(self, out_features: int, in_features: int) -> Plan:
        return Plan.einsum("i, o i -> o", names=["weight"], i=in_features, o=out_features)

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """As ``torch.nn.Linear``: uniform up to 1 / sqrt(in_features), the bias too."""
        bound = plan.in_features**-0.5
        return {"weight": ("uniform", bound), "bias": ("uniform", bound)}

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(), (24, 16)
