"""Pixelfly: a fixed block-sparse matrix that sums the supports of butterfly factors, plus a low-rank one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan, Term
from ..spec import Spec, register
from ..widths import divide, power_of_two
from .low_rank import LowRank


@register("pixelfly")
class Pixelfly(Spec):
    """Flat block butterfly plus low rank (Dao et al. 2022b, "Pixelated Butterfly").

    The matrix is a grid of ``butterfly_size`` x ``butterfly_size`` cells, each (out_features / butterfly_size,
    in_features / butterfly_size); row i of the grid holds the cells i, i xor 1, i xor 2, ..., i xor 2**(nfactors - 1).
    Factor ``sparse`` is (butterfly_size, rows of a cell, nfactors + 1, columns of a cell), its density exactly
    (nfactors + 1) / butterfly_size. A cell must be made of whole blocks of ``block_size``: the published code covers
    other cells with more blocks than this density says. With ``rank``, a number or a fraction of
    min(out_features, in_features), factors ``down`` and ``up`` are added as in `LowRank`.

    The learnable mix ``gamma sparse + (1 - gamma) up down`` of the paper is left out: it changes the scale of the two
    terms, which their factors already hold, and no matrix that can be reached.
    """

    block_size: int = 32
    butterfly_size: int = 16
    nfactors: int = 2
    rank: int | float | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        size, most = self.butterfly_size, self.butterfly_size.bit_length() - 1
        power_of_two("butterfly_size", size, out_features=out_features, in_features=in_features)
        if self.nfactors > most:
            raise ValueError(f"nfactors={self.nfactors} exceeds log2(butterfly_size); nfactors may be 1 to {most}")
        n, k = out_features // size, in_features // size
        divide("block_size", self.block_size, **{"out_features/butterfly_size": n, "in_features/butterfly_size": k})
        table = tuple((i, *(i ^ 1 << level for level in range(self.nfactors))) for i in range(size))
        term = Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("i", "n"), ("sparse",), table)
        sparse = Plan((term,), (("i", size), ("k", k), ("n", n), ("s", self.nfactors + 1)))
        if self.rank is None:
            return sparse
        return sparse + LowRank(self.rank).plan(out_features, in_features).apart(sparse)

    def multiples(self) -> tuple[int, int]:
        cell = self.butterfly_size * self.block_size
        return cell, cell

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(block_size=2, butterfly_size=4, nfactors=1), (16, 24)
        yield cls(block_size=1, butterfly_size=8, nfactors=3), (24, 16)
        yield cls(block_size=2, butterfly_size=8, nfactors=2, rank=3), (32, 16)
