"""A structure of one's own, as the einsum that defines it: no class to write for an idea of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Self

from ..plan import Plan
from ..spec import Spec, register


@register("chain")
class Chain(Spec):
    """``Chain("k i, k r j i, j o k r -> o j", "k=4 j=4 r=8")``: the equation of `Plan.einsum` and the sizes it needs.

    Operands are separated by a comma, or by a semicolon where commas separate specs. One axis at each end may be
    left without a size: it is what remains of the width. Factors are ``w1``, ``w2``, ..., stored with the axes of
    the equation; each should list the axes that its step contracts last.
    """

    equation: str
    sizes: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        # one spelling for both, so that a spec equals the one that its text gives
        spaced = re.sub(r"\s+", " ", self.equation.replace(",", ";")).strip()
        object.__setattr__(self, "equation", re.sub(r" ?; ?", "; ", spaced))
        object.__setattr__(self, "sizes", " ".join(self.sizes.split()))
        self._sizes()

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for part in self.sizes.split():
            axis, _, size = part.partition("=")
            if not size.isdecimal():
                raise ValueError(f"chain: {part!r} in sizes={self.sizes!r} is not of the form axis=size")
            sizes[axis] = int(size)
        return sizes

    def plan(self, out_features: int, in_features: int) -> Plan:
        left, _, right = self.equation.partition("->")
        sizes, ends = self._sizes(), (("in", in_features, left.split(";")[0]), ("out", out_features, right))
        for _ in ends:  # twice: what one end settles may settle the other
            for end, width, axes in ends:
                unknown = [axis for axis in axes.split() if axis not in sizes]
                known = prod(sizes[axis] for axis in axes.split() if axis in sizes)
                if len(unknown) == 1 and width % known == 0:
                    sizes[unknown[0]] = width // known
                elif (not unknown and width != known) or len(unknown) == 1:
                    raise ValueError(f"{end}_features={width} is not {' x '.join(axes.split())} with sizes {sizes}")
        return Plan.einsum(self.equation.replace(";", ","), names=None, **sizes)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        sizes, (left, _, right) = self._sizes(), self.equation.partition("->")
        out, into = (prod(sizes.get(axis, 1) for axis in axes.split()) for axes in (right, left.split(";")[0]))
        return out, into

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls("g b a, d a, g e b -> e g d", "b=2 e=2 g=4"), (24, 16)
