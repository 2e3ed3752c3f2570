"""Block diagonal: independent dense blocks, each seeing its own slice of the input (a grouped linear layer)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, divide, register


@register("block_diagonal")
class BlockDiagonal(Spec):
    """``nblocks`` dense blocks on the diagonal; factor ``blocks`` (nblocks, out/nblocks, in/nblocks)."""

    nblocks: int = 4

    def plan(self, out_features: int, in_features: int) -> Plan:
        o, i = divide("nblocks", self.nblocks, out_features=out_features, in_features=in_features)
        return Plan.einsum("g i, g o i -> g o", names=["blocks"], g=self.nblocks, i=i, o=o)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(nblocks=4), (24, 16)
