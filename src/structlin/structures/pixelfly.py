"""Pixelfly: a fixed block-sparse matrix that sums the supports of butterfly factors, plus a low-rank one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Self

from ..plan import Plan, Table, Term
from ..spec import Spec, register
from ..widths import butterfly, divide
from .low_rank import LowRank


@register("pixelfly")
class Pixelfly(Spec):
    """Flat block butterfly plus low rank (Dao et al. 2022b, "Pixelated Butterfly").

    The matrix is a grid of ``butterfly_size`` x ``butterfly_size`` cells, each (out_features / butterfly_size,
    in_features / butterfly_size); row i of the grid holds the cells i, i xor 1, i xor 2, ..., i xor 2**(nfactors - 1).
    Factor ``sparse`` is (butterfly_size, rows of a cell, nfactors + 1, columns of a cell), its density exactly
    (nfactors + 1) / butterfly_size.

    The paper has powers of two. Other sizes, as the 12 blocks of 64 in a width of 768, are butterflies of mixed radix
    (`structlin.widths.butterfly`): a factor of radix p links p cells, so a row has one cell and p - 1 more for each
    factor.

    The matrix is made of whole blocks of ``block_size``. Cells that are not are stretched to the blocks that they
    touch, as in the published code, and ``sparse`` is (out_features / block_size, block_size, blocks in a row,
    block_size) then, the blocks of a row in ascending order; the density is that of these blocks. All rows must have
    equally many, and all columns: so it is where a block is made of whole cells, and rarely elsewhere.
    With ``rank``, a number or a fraction of min(out_features, in_features), factors ``down`` and ``up`` are added as in
    `LowRank`.

    The learnable mix ``gamma sparse + (1 - gamma) up down`` of the paper is left out: both parts are again block-sparse
    and of low rank, so it reaches no other matrix, and as one scalar in two terms it is no factor of a chain.
    """

    block_size: int = 32
    butterfly_size: int = 16
    nfactors: int = 2
    rank: int | float | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        size = self.butterfly_size
        levels = butterfly(size, self.nfactors, out_features=out_features, in_features=in_features)
        n, k = out_features // size, in_features // size
        table = tuple((i, *(at for level in levels for at in _linked(i, *level))) for i in range(size))
        if n % self.block_size or k % self.block_size:
            n, k, table = self._stretched(table, n, k)
        term = Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("i", "n"), ("sparse",), table)
        sparse = Plan((term,), (("i", len(table)), ("k", k), ("n", n), ("s", len(table[0]))))
        if self.rank is None:
            return sparse
        return sparse + LowRank(self.rank).plan(out_features, in_features).apart(sparse)

    def _stretched(self, cells: Table, rows: int, columns: int) -> tuple[int, int, Table]:
        """Rows and columns of a block, and the blocks of each row that hold a part of one of ``cells``."""
        size, found = self.block_size, defaultdict[int, set[int]](set)
        for row, held in enumerate(cells):
            for block in range(row * rows // size, ((row + 1) * rows - 1) // size + 1):
                for cell in held:
                    found[block].update(range(cell * columns // size, ((cell + 1) * columns - 1) // size + 1))
        table = tuple(tuple(sorted(found[block])) for block in range(len(found)))
        uses = Counter(block for row in table for block in row)
        whole = len(cells) * rows % size == len(cells) * columns % size == 0
        if not whole or len({*map(len, table)}) > 1 or len({*uses.values()}) > 1:
            divide("block_size", size, **{"out_features/butterfly_size": rows, "in_features/butterfly_size": columns})
        return size, size, table

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        size, block = self.butterfly_size, self.block_size
        # where cells are whole blocks, or blocks whole cells
        shares = [size * (block >> n) for n in range(size.bit_length()) if block % (1 << n) == 0]
        narrow, wide = (
            min((m for m in shares if m >= width), default=size * block) for width in (out_features, in_features)
        )
        return narrow, wide

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(block_size=2, butterfly_size=4, nfactors=1), (16, 24)
        yield cls(block_size=1, butterfly_size=8, nfactors=3), (24, 16)
        yield cls(block_size=2, butterfly_size=8, nfactors=2, rank=3), (32, 16)
        yield cls(block_size=4, butterfly_size=8, nfactors=2), (16, 32)
        yield cls(block_size=2, butterfly_size=6, nfactors=2), (24, 12)


def _linked(cell: int, stride: int, radix: int) -> list[int]:
    """The other cells that differ from ``cell`` in the digit of this stride, from the next value of the digit on."""
    digit = cell // stride % radix
    return [cell + ((digit + shift) % radix - digit) * stride for shift in range(1, radix)]
