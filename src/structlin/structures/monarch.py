"""Monarch (Dao et al., 2022): block-diagonal factors with a transpose of the blocks between them.

With as many blocks as the square root of the width this is the paper's order-2 Monarch matrix; with fewer, as in
the paper's experiments, each (output block, input block) pair is a matrix of low rank. More than two factors give
the order-p matrices of Monarch Mixer (Fu et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Literal, Self

from ..analysis import fan
from ..plan import Plan
from ..spec import Spec, register
from .btt import block_chain, count


@register("monarch")
class Monarch(Spec):
    """``nblocks`` blocks in each of two factors; rank ``min(out, in) / nblocks**2`` per pair of blocks, or ``rank``.

    Factors: ``first`` (nblocks, nblocks, rank, in/nblocks), ``second`` (nblocks, out/nblocks, nblocks, rank)
    (Dao et al. 2022, section 3; their (nblocks, min/nblocks, in/nblocks) and (nblocks, out/nblocks, min/nblocks)).
    ``order="paper"`` writes the outputs as the paper does, the block index fastest; ``"blocked"`` leaves each output
    block together, which is the same matrix with its rows permuted.

    With ``factors=p`` the index is read as p digits, p - 1 of them of size nblocks, and each factor is block diagonal
    with ``nblocks**(p-1)`` blocks (Fu et al. 2023, "order-p"); rank is ``min(out, in) / nblocks**p`` then, or
    ``rank``. See `structlin.structures.btt.block_chain` for their shapes.
    """

    nblocks: int = 4
    order: Literal["paper", "blocked"] = "paper"
    rank: int | None = None
    factors: int = 2

    def plan(self, out_features: int, in_features: int) -> Plan:
        n, p, small = self.nblocks, count("factors", self.factors), min(out_features, in_features)
        if not self._fits(n, out_features, in_features):
            allowed = [str(d) for d in range(1, isqrt(small) + 1) if self._fits(d, out_features, in_features)]
            power, square = ("", "its square") if p == 2 else (f"**{p - 1}", f"nblocks**{p}")
            limit = "" if self.rank else f" and {square} the smaller one"
            raise ValueError(
                f"nblocks={n} does not fit {out_features}x{in_features}: {'it' if p == 2 else 'nblocks'}{power} must "
                f"divide both widths{limit}; nblocks may be {', '.join(allowed)}"
            )
        outer = n ** (p - 1)
        ins, outs = (*[n] * (p - 1), in_features // outer), (*[n] * (p - 1), out_features // outer)
        return block_chain(ins, outs, self.rank or small // n**p, self.order)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        outer = self.nblocks ** (self.factors - 1)
        return outer, outer

    def _fits(self, nblocks: int, out_features: int, in_features: int) -> bool:
        outer = nblocks ** (self.factors - 1)
        whole_rank = self.rank or min(out_features, in_features) % (outer * nblocks) == 0
        return bool(out_features % outer == in_features % outer == 0 and whole_rank)

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """Uniform up to 1 / sqrt(fan-in), the bias up to 1 / sqrt(out_features) (`monarch_linear.py`)."""
        factors = {name: ("uniform", fan(plan, name)[0] ** -0.5) for name in plan.factors}
        return {**factors, "bias": ("uniform", plan.out_features**-0.5)}

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4), (16, 16)
        yield cls(nblocks=2, rank=3), (24, 16)
        yield cls(nblocks=2, order="blocked"), (16, 24)
        yield cls(nblocks=2, factors=3), (16, 24)
