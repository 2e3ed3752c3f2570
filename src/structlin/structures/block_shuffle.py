"""Block shuffle (Wei et al., 2024): Monarch with its factors laid out as the published code stores them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from .monarch import Monarch


@register("block_shuffle")
class BlockShuffle(Spec):
    """The matrices of ``Monarch(nblocks)`` (Wei et al. 2024, "BlockShuffle"; `blockshuffle.py`).

    Factors: ``first`` (nblocks, rank, nblocks, in/nblocks), which is their (nblocks, min(out, in)/nblocks, in/nblocks)
    with the index of the second factor's block fastest among the rows, and ``second``
    (nblocks, out/nblocks, nblocks, rank). Outputs are written with the block index fastest.
    """

    nblocks: int = 4

    def plan(self, out_features: int, in_features: int) -> Plan:
        sizes = Monarch(nblocks=self.nblocks).plan(out_features, in_features).sizes
        return Plan.einsum("i1 i0, i1 r1 o0 i0, o0 o1 i1 r1 -> o1 o0", names=["first", "second"], **sizes)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return Monarch(nblocks=self.nblocks).multiples(out_features, in_features)

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Orthonormal blocks (`blockshuffle.py`, "ortho")."""
        return dict.fromkeys(plan.factors, ("orthogonal", 1.0))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=2), (24, 16)
