"""Products of block butterfly factors: what pixelfly flattens into a sum, at the price of a product for each factor."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import butterfly


@register("block_butterfly")
class BlockButterfly(Spec):
    """``... B_4 B_2 B_1``, block butterfly factors of ascending stride (Dao et al. 2022b, "Pixelated Butterfly").

    Features are ``butterfly_size`` cells; factor ``stride<s>`` links the cells that differ in the digit of stride s, as
    in `Pixelfly`, whose support is the union of the supports of these factors. Of ``nfactors`` factors, all unless
    given, the cells in between have min(out_features, in_features) / butterfly_size features. A factor is stored as
    (cells of the other digits, digit of the output, its rows, digit of the input, its columns). The matrix is of full
    rank, and its density is the product of the radices over ``butterfly_size``.
    """

    butterfly_size: int = 16
    nfactors: int | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        levels = butterfly(self.butterfly_size, self.nfactors, out_features=out_features, in_features=in_features)
        n, rest = len(levels), self.butterfly_size // prod(radix for _, radix in levels)
        g = ["g"] * (rest > 1)
        cells = [width // self.butterfly_size for width in (in_features, out_features)]
        sizes = {f"p{s}": min(cells) for s in range(1, n)} | {"p0": cells[0], f"p{n}": cells[1]}
        sizes |= {f"{end}{s}": radix for s, (_, radix) in enumerate(levels) for end in "io"} | dict.fromkeys(g, rest)
        ins, outs = ([f"{end}{s}" for s in range(n)][::-1] for end in "io")
        # digits that wait, digits that are done, then rows and columns
        factors = [[*g, *ins[: n - 1 - s], *outs[n - s :], f"o{s}", f"p{s + 1}", f"i{s}", f"p{s}"] for s in range(n)]
        chain = ", ".join(" ".join(axes) for axes in [[*g, *ins, "p0"], *factors])
        names = [f"stride{stride}" for stride, _ in levels]
        return Plan.einsum(f"{chain} -> {' '.join([*g, *outs, f'p{n}'])}", names=names, **sizes)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.butterfly_size, self.butterfly_size

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(butterfly_size=4), (24, 16)
        yield cls(butterfly_size=8, nfactors=2), (16, 24)
        yield cls(butterfly_size=6), (12, 24)
