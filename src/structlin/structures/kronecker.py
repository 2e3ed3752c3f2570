"""Kronecker product of two matrices: the cheapest structure here, at the price of sharing every weight."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import balanced, digits


@register("kronecker")
class Kronecker(Spec):
    """``W = left (x) right`` (Van Loan and Pitsianis 1993; Qiu et al. 2024, "Kron").

    Factors: ``right`` (d, a), ``left`` (e, b) with out_features = e d and in_features = b a. Both widths are split
    into their two factors nearest the square root, the smaller one left, unless ``out_dims`` (e, d) and ``in_dims``
    (b, a) give them. For products of more matrices see ``tensor_train`` with rank 1.
    """

    in_dims: tuple[int, ...] | None = None
    out_dims: tuple[int, ...] | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        b, a = digits("in_dims", in_features, self.in_dims, balanced(in_features))
        e, d = digits("out_dims", out_features, self.out_dims, balanced(out_features))
        return Plan.einsum("b a, d a, e b -> e d", names=["right", "left"], a=a, b=b, d=d, e=e)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return prod(self.out_dims or (1,)), prod(self.in_dims or (1,))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(), (24, 16)
        yield cls(in_dims=(8, 3)), (16, 24)
