"""Block sparse: some cells of a grid are dense and the others zero, by a mask that is random or written out.

It is what pixelfly is compared with: its cells stand anywhere, and the same kernels run it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Self

from ..plan import Plan, Table, Term
from ..spec import Spec, register
from ..widths import divide


@register("block_sparse")
class BlockSparse(Spec):
    """A grid of ``nblocks`` x ``nblocks`` cells with ``slots`` dense cells in every row and every column.

    Factor ``sparse`` is (nblocks, rows of a cell, slots, columns of a cell), the cells of a row in ascending order; its
    density is slots / nblocks. ``mask`` is a seed, or the mask itself as ``0x`` and hexadecimal digits, four cells in
    each, row by row from the left; bits that are missing in the last digit are zero. `magnitude_mask` makes one from a
    dense weight. A seed gives the same mask on every machine: what is random about it is in this file. A mask of
    another size, or with another number of cells in a row or column, has no plan.
    """

    nblocks: int = 16
    slots: int = 4
    mask: int | str = 1

    def _table(self) -> Table:
        if self.slots > self.nblocks:
            raise ValueError(f"slots={self.slots} exceeds nblocks={self.nblocks}; slots may be 1 to {self.nblocks}")
        if isinstance(self.mask, str):
            return read_mask(self.mask, self.nblocks, self.slots)
        return random_table(self.nblocks, self.slots, self.mask)

    def plan(self, out_features: int, in_features: int) -> Plan:
        n, k = divide("nblocks", self.nblocks, out_features=out_features, in_features=in_features)
        term = Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("i", "n"), ("sparse",), self._table())
        return Plan((term,), (("i", self.nblocks), ("k", k), ("n", n), ("s", self.slots)))

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.nblocks, self.nblocks

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4, slots=2), (16, 24)
        yield cls(nblocks=6, slots=3, mask=7), (24, 12)
        yield cls(nblocks=3, slots=2, mask="0x770"), (9, 15)


@cache
def random_table(nblocks: int, slots: int, seed: int) -> Table:
    """``slots`` of ``nblocks`` columns for each row, every column equally often: uniform in the limit of many moves.

    Cells start on diagonals. A move takes two cells and swaps their columns, where neither row has both.
    """
    rows = [{(row + slot) % nblocks for slot in range(slots)} for row in range(nblocks)]
    random = Random(seed).random  # of the generator only this is promised never to change
    for _ in range(16 * nblocks * slots):
        one, other = rows[int(random() * nblocks)], rows[int(random() * nblocks)]
        mine, theirs = sorted(one - other), sorted(other - one)
        if mine:
            give, take = mine[int(random() * len(mine))], theirs[int(random() * len(theirs))]
            one ^= {give, take}
            other ^= {give, take}
    return tuple(tuple(sorted(row)) for row in rows)


@cache
def read_mask(mask: str, nblocks: int, slots: int) -> Table:
    """The table of a mask that `write_mask` wrote.

    Raises:
        ValueError: for text of another form or length, and for another number of cells than ``slots`` somewhere.
    """
    digits = -(-nblocks * nblocks // 4)
    if not re.fullmatch(f"0x[0-9a-f]{{{digits}}}", mask):
        raise ValueError(
            f"mask={mask!r} is no mask of {nblocks}x{nblocks} cells; a seed is a whole number from 1, a mask 0x and "
            f"{digits} hexadecimal digits"
        )
    bits = f"{int(mask, 16):0{4 * digits}b}"
    lines = [bits[row * nblocks : (row + 1) * nblocks] for row in range(nblocks)]
    counts = {line.count("1") for line in [*lines, *map("".join, zip(*lines, strict=True))]}
    if counts != {slots} or "1" in bits[nblocks * nblocks :]:
        raise ValueError(
            f"mask={mask!r} has {', '.join(map(str, sorted(counts)))} cells in its rows and columns; every row "
            f"and every column must have slots={slots}"
        )
    return tuple(tuple(column for column, bit in enumerate(line) if bit == "1") for line in lines)


def write_mask(table: Table) -> str:
    """A square table as `BlockSparse` takes it.

    >>> write_mask(((1, 2), (0, 2), (0, 1)))
    '0x770'
    """
    bits = "".join("1" if column in row else "0" for row in table for column in range(len(table)))
    return "0x" + "".join(f"{int(bits[at : at + 4].ljust(4, '0'), 2):x}" for at in range(0, len(bits), 4))
