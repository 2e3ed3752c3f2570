"""BLAST (Lee et al., 2024): a grid of blocks whose bases are shared along rows and columns of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import divide, share


@register("blast")
class Blast(Spec):
    """Block (i, j) is ``left[i] @ diag(middle[:, i, j]) @ right[j]`` (Lee et al. 2024: B_i diag(d_ij) C_j
    in `modeling_blast.py`).

    Factors: ``right`` (nblocks, rank, in/nblocks), ``middle`` (rank, nblocks, nblocks), ``left``
    (nblocks, out/nblocks, rank). Low rank is the case of equal ``middle``; block diagonal and block low rank are
    those in which ``middle`` selects. Rank is a whole number or a fraction of min(out_features, in_features).
    """

    nblocks: int = 4
    rank: int | float = 0.25

    def plan(self, out_features: int, in_features: int) -> Plan:
        p, q = divide("nblocks", self.nblocks, out_features=out_features, in_features=in_features)
        limit = min(out_features, in_features)
        rank = share(self.rank, limit)
        if rank > limit:
            raise ValueError(f"rank={rank} exceeds min(out_features, in_features); rank may be 1 to {limit}")
        return Plan.einsum(
            "j q, j r q, r i j, i p r -> i p", names=["right", "middle", "left"],
            i=self.nblocks, j=self.nblocks, p=p, q=q, r=rank,
        )  # fmt: skip

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.nblocks, self.nblocks

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=2, rank=5), (16, 16)
        yield cls(nblocks=4, rank=0.5), (24, 16)
