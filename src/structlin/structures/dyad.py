"""DYAD (Chandy et al., 2023): a block-diagonal matrix plus one with strided blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import divide

VARIANTS = {"it": ("k g", "g n"), "ot": ("g k", "n g"), "dt": ("k g", "n g")}


@register("dyad")
class Dyad(Spec):
    """Factors ``lower`` and ``upper``, both (nblocks, out/nblocks, in/nblocks).

    ``lower`` is block diagonal. ``upper`` reads its input with stride nblocks (variant "it"), writes its output with
    stride nblocks ("ot"), or both ("dt"): the variants of the paper. "narrow" is "ot" where the output is narrower than
    the input and else "it", so that the stride is at the end with fewer features, where it costs least.
    """

    nblocks: int = 4
    variant: Literal["it", "ot", "dt", "narrow"] = "it"

    def plan(self, out_features: int, in_features: int) -> Plan:
        n, k = divide("nblocks", self.nblocks, out_features=out_features, in_features=in_features)
        narrow = "ot" if out_features < in_features else "it"
        x, y = VARIANTS[narrow if self.variant == "narrow" else self.variant]
        lower = Plan.einsum("g k, g n k -> g n", names=["lower"], g=self.nblocks, n=n, k=k)
        upper = Plan.einsum(f"{x}, g n k -> {y}", names=["upper"], g=self.nblocks, n=n, k=k)
        return lower + upper

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.nblocks, self.nblocks

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Uniform up to 1 / sqrt(in_features), the bias too (`dyad.py`), although an output has fewer inputs."""
        return dict.fromkeys((*plan.factors, "bias"), ("uniform", plan.in_features**-0.5))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4, variant="it"), (24, 16)
        yield cls(nblocks=4, variant="ot"), (24, 16)
        yield cls(nblocks=2, variant="dt"), (16, 24)
        yield cls(nblocks=2, variant="narrow"), (16, 24)
