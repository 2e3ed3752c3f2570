"""Sums, products and transposes of structures, which are structures again.

They are made by ``A + B``, ``A @ B`` and ``A.T``; everything else follows from the plan. A sum adds a low-rank part
to a sparse one; a product of two Monarch matrices is the class that holds convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import matmul
from typing import Self

from ..plan import Plan
from ..spec import Boxcar, Spec, register
from .block_diagonal import BlockDiagonal
from .dyad import Dyad
from .kronecker import Kronecker
from .low_rank import LowRank
from .monarch import Monarch


@register("sum")
class Sum(Spec):
    """``A + B + ...``: each term with factors of its own, named as in the term, with a number where names clash."""

    terms: tuple[Spec, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = (inner for term in self.terms for inner in (term.terms if isinstance(term, Sum) else (term,)))
        object.__setattr__(self, "terms", tuple(flat))

    def plan(self, out_features: int, in_features: int) -> Plan:
        plans = [term.plan(out_features, in_features) for term in self.terms]
        return reduce(lambda total, plan: total + plan.apart(total), plans)

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Those of the terms, whose factors stand in their order."""
        names, masks = iter(plan.factors), dict[str, Boxcar]()
        for term in self.terms:
            own = term.plan(plan.out_features, plan.in_features)
            found = term.masks(own)
            masks |= {new: found[name] for name, new in zip(own.factors, names, strict=False) if name in found}
        return masks

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls((BlockDiagonal(4), LowRank(2))), (24, 16)


@register("product")
class Product(Spec):
    """``A @ B @ ...``, the last applied first; ``width`` is the width between them, min(out, in) unless given.

    Factors are named as in the structures, with a number where names clash; where two structures read the width
    between them in different digits, an axis of a factor is split in two.
    """

    factors: tuple[Spec, ...]
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = (
            inner
            for factor in self.factors
            for inner in (factor.factors if isinstance(factor, Product) and factor.width == self.width else (factor,))
        )
        object.__setattr__(self, "factors", tuple(flat))

    def plan(self, out_features: int, in_features: int) -> Plan:
        inner = [self.width or min(out_features, in_features)] * (len(self.factors) - 1)
        shapes = zip((out_features, *inner), (*inner, in_features), strict=True)
        plans = [factor.plan(*shape) for factor, shape in zip(self.factors, shapes, strict=True)]
        for factor, plan in zip(self.factors, plans, strict=True):
            if factor.masks(plan):
                raise ValueError(f"{factor} has trained masks, which a product cannot keep: {self}; use it by itself")
        return reduce(matmul, plans)

    def __str__(self) -> str:
        shown = (f"({f})" if isinstance(f, Sum | Product) else str(f) for f in self.factors)
        return (f"@{self.width}@" if self.width else "@").join(shown)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls((Monarch(nblocks=2), BlockDiagonal(4))), (12, 16)
        yield cls((Kronecker(), LowRank(3)), width=8), (16, 12)


@register("transpose")
class Transpose(Spec):
    """``A.T``: the structure of the transposed shape, its factors used in the opposite order."""

    of: Spec

    def plan(self, out_features: int, in_features: int) -> Plan:
        return self.of.plan(in_features, out_features).T

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Those of the structure, whose factors are stored alike."""
        return self.of.masks(plan.T)

    @property
    def T(self) -> Spec:
        """The structure itself."""
        return self.of

    def __str__(self) -> str:
        return f"({self.of}).T" if isinstance(self.of, Sum | Product) else f"{self.of}.T"

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(Monarch(nblocks=2)), (16, 24)
        yield cls(Dyad(nblocks=4) + LowRank(2)), (24, 16)
