"""The step of a block-sparse term whose kernels read the table themselves: no block of the input is copied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..plan import Table, num_blocks
from .equation import parse
from .lookup import uses
from .lowering import Chain
from .moves import aligned, has_triton


@dataclass(frozen=True)
class Blocks:
    """One of the three products of ``t i s k, i n s k -> t i n`` whose ``i s`` looks up a block of the input.

    ``which`` is "forward" (input by factor), "dgrad" (gradient by factor) or "wgrad" (input by gradient); ``a`` and
    ``b`` are the shapes of its operands.
    """

    which: str
    table: Table
    a: tuple[int, ...]
    b: tuple[int, ...]

    def run(
        self, a: Tensor, b: Tensor, into: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Multiply, or add the product to ``into``; with ``pair`` also the product of these matrices, in one pass."""
        if self.which == "wgrad":
            assert into is None
            assert pair is None
            return self.gradients(a, b)[0]
        from ..kernels.blocks import sum_of_blocks

        a, b = aligned(a).view(self.a), aligned(b).view(self.b)
        transposed = self.which == "dgrad"
        if pair is not None:
            pair = aligned(pair[0]), aligned(pair[1] if transposed else pair[1].mT)
        return sum_of_blocks(a, b, self.table, transposed, into, pair)

    def gradients(self, a: Tensor, b: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The product of "wgrad", and that of ``beside``, (tokens, rank), with ``b``, in one pass."""
        from ..kernels.blocks import gradient_of_blocks

        beside = None if beside is None else aligned(beside).view(self.a[0], -1)
        return gradient_of_blocks(aligned(a).view(self.a), aligned(b).view(self.b), self.table, beside)


def blocks(chain: Chain, sizes: dict[str, int]) -> tuple[Blocks, Blocks, Blocks] | None:
    """Forward and both gradients of a chain, if it is one block-sparse product of blocks that fill the kernels' tiles.

    Tokens are those of ``sizes``, or unknown where it has none.
    """
    if chain.gather is None or chain.collect is not None or len(chain.stages) > 1 or not has_triton():
        return None
    x, w, y = parse(chain.stages[0].equation)
    if len(x) != 4 or w != (x[1], y[-1], x[2], x[3]) or y != (x[0], x[1], y[-1]):
        return None
    if chain.stages[0].relayout is not None or chain.relayout is not None:
        return None
    from ..kernels.blocks import fits

    rows, slots, k, n = (sizes[axis] for axis in (x[1], x[2], x[3], y[-1]))
    count, tokens = num_blocks(chain.gather), sizes.get("t", 0)
    if not fits(rows, count, slots, rows * slots // count, n, k):
        return None
    places = uses(chain.gather)
    per = len(places) // count
    used = tuple(
        tuple(at // slots + 4096 * (at % slots) for at in places[per * block : per * (block + 1)])
        for block in range(count)
    )
    into, out = (tokens, count, k), (tokens, rows, n)
    factor = (rows, n, slots, k)
    return (
        Blocks("forward", chain.gather, into, factor),
        Blocks("dgrad", used, out, factor),
        Blocks("wgrad", chain.gather, into, out),
    )
