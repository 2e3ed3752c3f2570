"""Kronecker product of two matrices: the cheapest structure here, at the price of sharing every weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from ..plan import Plan
from ..spec import Spec, balanced, register


@register("kronecker")
class Kronecker(Spec):
    """``W = left (x) right``, both widths split into their two factors nearest the square root, smaller one left."""

    def plan(self, out_features: int, in_features: int) -> Plan:
        (e, d), (b, a) = balanced(out_features), balanced(in_features)
        return Plan.einsum("b a, d a, e b -> e d", names=["right", "left"], a=a, b=b, d=d, e=e)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(), (24, 16)
        yield cls(), (16, 24)
