"""Sums, products and transposes of structures, which are structures again.

They are made by ``A + B``, ``A @ B`` and ``A.T``; everything else follows from the plan. A sum adds a low-rank part
to a sparse one; a product of two Monarch matrices is the class that holds convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from math import lcm
from operator import matmul
from typing import Self

from ..masks import Boxcar
from ..plan import Plan
from ..spec import Spec, register
from .block_diagonal import BlockDiagonal
from .dyad import Dyad
from .kronecker import Kronecker
from .low_rank import LowRank
from .monarch import Monarch

Draws = dict[str, tuple[str, float]]


def _passed_on(plan: Plan, parts: Sequence[tuple[Spec, Plan]]) -> tuple[Draws, list[Draws]]:
    """What the parts of ``plan``, in the order of its factors, draw: under its names, and part by part."""
    names, each = iter(plan.factors), [spec.reference_init(part) for spec, part in parts]
    renamed = [dict(zip(part.factors, names, strict=False)) for _, part in parts]
    return {new[n]: draw for new, own in zip(renamed, each, strict=True) for n, draw in own.items() if n in new}, each


@register("sum")
class Sum(Spec):
    """``A + B + ...``: each term with factors of its own, named as in the term, with a number where names clash.

    With ``pad`` all terms are padded to the same widths.
    """

    terms: tuple[Spec, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = (inner for term in self.terms for inner in (term.terms if isinstance(term, Sum) else (term,)))
        object.__setattr__(self, "terms", tuple(flat))

    def plan(self, out_features: int, in_features: int) -> Plan:
        plans = [term.plan(out_features, in_features) for term in self.terms]
        return reduce(lambda total, plan: total + plan.apart(total), plans)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        outs, ins = zip(*(term.multiples(out_features, in_features) for term in self.terms), strict=True)
        return lcm(*outs), lcm(*ins)

    def reference_init(self, plan: Plan) -> Draws:
        """Every term as it is drawn alone; the bias as the first term that draws one."""
        parts = [(term, term.plan(*plan.padded)) for term in self.terms]
        factors, each = _passed_on(plan, parts)
        return factors | next(({"bias": own["bias"]} for own in each if "bias" in own), {})

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Those of the terms, whose factors stand in their order."""
        names, masks = iter(plan.factors), dict[str, Boxcar]()
        for term in self.terms:
            own = term.plan(*plan.padded)
            found = term.masks(own)
            masks |= {new: found[name] for name, new in zip(own.factors, names, strict=False) if name in found}
        return masks

    def __str__(self) -> str:
        return _with_padding("+".join(map(str, self.terms)), self.pad)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls((BlockDiagonal(4), LowRank(2))), (24, 16)


@register("product")
class Product(Spec):
    """``A @ B @ ...``, the last applied first; ``width`` is the width between them, min(out, in) unless given.

    Factors are named as in the structures, with a number where names clash; where two structures read the width
    between them in different digits, an axis of a factor is split in two. With ``pad`` the outer widths are padded; the
    width between is as given, or the smaller of the padded ones.
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
        return reduce(matmul, self._plans(out_features, in_features))

    def _plans(self, out_features: int, in_features: int) -> list[Plan]:
        inner = [self.width or min(out_features, in_features)] * (len(self.factors) - 1)
        shapes = zip((out_features, *inner), (*inner, in_features), strict=True)
        plans = [factor.plan(*shape) for factor, shape in zip(self.factors, shapes, strict=True)]
        for factor, plan in zip(self.factors, plans, strict=True):
            if factor.masks(plan):
                raise ValueError(f"{factor} has trained masks, which a product cannot keep: {self}; use it by itself")
        return plans

    def reference_init(self, plan: Plan) -> Draws:
        """Every structure as it is drawn alone; the bias as by the one that is applied last."""
        plans = self._plans(*plan.padded)
        factors, each = _passed_on(plan, list(zip(self.factors, plans, strict=True))[::-1])
        return factors | ({"bias": each[-1]["bias"]} if "bias" in each[-1] else {})

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        inner = self.width or 1
        first, last = self.factors[0], self.factors[-1]
        return first.multiples(out_features, inner)[0], last.multiples(inner, in_features)[1]

    def __str__(self) -> str:
        shown = (f"({f})" if isinstance(f, Sum | Product) else str(f) for f in self.factors)
        return _with_padding((f"@{self.width}@" if self.width else "@").join(shown), self.pad)

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

    def reference_init(self, plan: Plan) -> Draws:
        """The matrix that is transposed as it is drawn; the bias at zero, as it adds to the other side."""
        return {name: draw for name, draw in self.of.reference_init(plan.T).items() if name != "bias"}

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Those of the structure, whose factors are stored alike."""
        return self.of.masks(plan.T)

    @property
    def T(self) -> Spec:
        """The structure itself."""
        return replace(self.of, pad=self.pad)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.of.multiples(in_features, out_features)[::-1]

    def __str__(self) -> str:
        return _with_padding(f"({self.of}).T" if isinstance(self.of, Sum | Product) else f"{self.of}.T", self.pad)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(Monarch(nblocks=2)), (16, 24)
        yield cls(Dyad(nblocks=4) + LowRank(2)), (24, 16)


def _with_padding(text: str, pad: bool) -> str:
    return f"({text}):pad=true" if pad else text
