"""Monarch (Dao et al., 2022): two block-diagonal factors around a transpose of the blocks.

With as many blocks as the square root of the width this is the paper's order-2 Monarch matrix; with fewer, as in
the paper's experiments, each (output block, input block) pair is a matrix of low rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Literal, Self

from ..plan import Plan
from ..spec import Spec, register


def fits(nblocks: int, out_features: int, in_features: int) -> bool:
    """Whether ``nblocks`` divides both widths and leaves a whole rank for each pair of blocks."""
    return not (out_features % nblocks or in_features % nblocks or min(out_features, in_features) % nblocks**2)


@register("monarch")
class Monarch(Spec):
    """``nblocks`` blocks in both factors, rank ``min(out, in) / nblocks**2`` per pair of blocks.

    Factors: ``first`` (nblocks, nblocks, rank, in/nblocks), ``second`` (nblocks, out/nblocks, nblocks, rank).
    ``order="paper"`` writes the outputs as the paper does, the block index fastest; ``"blocked"`` leaves each output
    block together, which is the same matrix with its rows permuted.
    """

    nblocks: int = 4
    order: Literal["paper", "blocked"] = "paper"

    def plan(self, out_features: int, in_features: int) -> Plan:
        n, small = self.nblocks, min(out_features, in_features)
        if not fits(n, out_features, in_features):
            allowed = (d for d in range(1, isqrt(small) + 1) if fits(d, out_features, in_features))
            raise ValueError(
                f"nblocks={n} does not fit {out_features}x{in_features}: it must divide both widths and its square "
                f"the smaller one; nblocks may be {', '.join(map(str, allowed))}"
            )
        y = "o j" if self.order == "paper" else "j o"
        sizes = {"k": n, "j": n, "i": in_features // n, "o": out_features // n, "r": small // n**2}
        return Plan.einsum(f"k i, k j r i, j o k r -> {y}", names=["first", "second"], **sizes)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4), (16, 16)
        yield cls(nblocks=2), (24, 16)
        yield cls(nblocks=2, order="blocked"), (16, 24)
