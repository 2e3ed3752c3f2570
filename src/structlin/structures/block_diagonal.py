"""Block diagonal: independent dense blocks, each seeing its own slice of the input (a grouped linear layer)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..analysis import fan
from ..plan import Plan
from ..spec import Spec, register
from ..widths import divide


@register("block_diagonal")
class BlockDiagonal(Spec):
    """``nblocks`` dense blocks on the diagonal; factor ``blocks`` (nblocks, out/nblocks, in/nblocks).

    With ``shuffle`` the input channels are shuffled first as in ShuffleNet (Zhang et al. 2018; `BlockdiagLinear` of
    Dao et al. 2022): the input, read as (group, channel), is written as (channel, group), so that every block sees a
    part of every group. ``nblocks**2`` must divide in_features then, and the factor is
    (nblocks, out/nblocks, in/nblocks**2, nblocks).
    """

    nblocks: int = 4
    shuffle: bool = False

    def plan(self, out_features: int, in_features: int) -> Plan:
        n = self.nblocks
        o, i = divide("nblocks", n, out_features=out_features, in_features=in_features)
        if not self.shuffle:
            return Plan.einsum("g i, g o i -> g o", names=["blocks"], g=n, i=i, o=o)
        if i % n:
            fitting = (d for d in range(1, n) if in_features % d**2 == 0 and out_features % d == 0)
            raise ValueError(
                f"nblocks={n} with shuffle=True: {n}**2 does not divide in_features={in_features}; "
                f"smaller nblocks that fit: {', '.join(map(str, fitting)) or 'none'}"
            )
        return Plan.einsum("c g i, g o i c -> g o", names=["blocks"], c=n, g=n, i=i // n, o=o)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.nblocks, self.nblocks ** (1 + self.shuffle)

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Uniform up to 1 / sqrt(fan-in), the bias up to 1 / sqrt(out_features) (`blockdiag_linear.py`)."""
        return {"blocks": ("uniform", fan(plan, "blocks")[0] ** -0.5), "bias": ("uniform", plan.out_features**-0.5)}

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4), (24, 16)
        yield cls(nblocks=2, shuffle=True), (6, 16)
