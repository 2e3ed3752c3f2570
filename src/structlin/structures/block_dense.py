"""Block dense (Wei et al., 2024): a low-rank matrix whose wide half is block diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import divide, share


@register("block_dense")
class BlockDense(Spec):
    """``W = up @ blockdiag(blocks)`` (Wei et al. 2024, "BlockDense"; `blockdense.py` of their code).

    Factors: ``blocks`` (nblocks, rank/nblocks, in/nblocks), ``up`` (out, nblocks, rank/nblocks), which is their
    (out, rank). Rank is the width between the two, a whole number or a fraction of min(out, in).
    """

    nblocks: int = 4
    rank: int | float = 0.25

    def plan(self, out_features: int, in_features: int) -> Plan:
        rank = share(self.rank, min(out_features, in_features))
        i, r = divide("nblocks", self.nblocks, in_features=in_features, rank=rank)
        limit = min(i, out_features)
        if r > limit:
            raise ValueError(
                f"rank={self.rank} gives each of {self.nblocks} blocks a rank of {r}, more than {limit}; "
                f"rank may be up to {self.nblocks * limit}"
            )
        return Plan.einsum(
            "g i, g r i, o g r -> o", names=["blocks", "up"], g=self.nblocks, i=i, r=r, o=out_features
        )  # fmt: skip

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 1, self.nblocks

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Orthonormal blocks (`blockdense.py`, "ortho"); ``up`` counts as one."""
        return dict.fromkeys(plan.factors, ("orthogonal", 1.0))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4, rank=8), (24, 16)
        yield cls(nblocks=2, rank=0.5), (16, 24)
