"""The intermediate representation: a structured matrix is a sum of einsum chains over named axes.

A feature index is read as digits, each digit an axis with a name: feature 37 of 64 is (block 4, position 5).
A structure is then a short chain of contractions over those axes, and the order of the axes at both ends *is*
the permutation. Costs, ranks, scales and layouts are all read off this description; it imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

Axes = tuple[str, ...]

TOKENS = "t"  # the axis of all leading dimensions, flattened; no structure may use the letter


@dataclass(frozen=True)
class Step:
    """One contraction ``x, w -> y`` of a chain.

    Every axis occurs in two or three of the operands, which leaves four roles: `group` (x, w, y),
    `contract` (x, w), `free` (x, y) and `out` (w, y). Read as a GEMM these are batch, K, part of M, and N.
    """

    x: Axes
    w: Axes
    y: Axes

    def __post_init__(self) -> None:
        operands = (self.x, self.w, self.y)
        for axis in dict.fromkeys(self.x + self.w + self.y):
            if any(operand.count(axis) > 1 for operand in operands):
                raise ValueError(f"axis {axis!r} occurs twice in one operand of '{self}'; use two names")
            if sum(axis in operand for operand in operands) < 2:
                raise ValueError(f"axis {axis!r} occurs in one operand only of '{self}'; it must link two or three")

    @property
    def group(self) -> Axes:
        """Axes of all three operands: one GEMM for each."""
        return tuple(a for a in self.y if a in self.x and a in self.w)

    @property
    def contract(self) -> Axes:
        """Axes that are summed over: the fan-in."""
        return tuple(a for a in self.x if a in self.w and a not in self.y)

    @property
    def free(self) -> Axes:
        """Axes of the input that wait for a later step: the factor is shared over them."""
        return tuple(a for a in self.x if a in self.y and a not in self.w)

    @property
    def out(self) -> Axes:
        """Axes that the factor brings in: the fan-out."""
        return tuple(a for a in self.w if a in self.y and a not in self.x)

    @property
    def equation(self) -> str:
        """The step over a batch of tokens, as `structlin.ops.contract` takes it: ``"t k i, k r i -> t k r"``."""
        x, w, y = (" ".join(axes) for axes in ((TOKENS, *self.x), self.w, (TOKENS, *self.y)))
        return f"{x}, {w} -> {y}"

    def __str__(self) -> str:
        return self.equation


@dataclass(frozen=True)
class Term:
    """A chain ``x, w1, ..., wk -> y``, contracted from left to right.

    Attributes:
        x: how the index of an input feature is read, slowest axis first.
        weights: the axes of each factor, in the order in which it is stored.
        y: how the index of an output feature is read.
        names: one parameter name for each factor.
    """

    x: Axes
    weights: tuple[Axes, ...]
    y: Axes
    names: tuple[str, ...]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The contractions, each keeping the axes that a later factor or the output needs."""
        steps: list[Step] = []
        z = self.x
        for i, w in enumerate(self.weights, 1):
            needed = {*self.y}.union(*self.weights[i:])
            kept = tuple(a for a in dict.fromkeys(z + w) if a in needed)
            y = self.y if i == len(self.weights) else kept
            steps.append(Step(z, w, y))
            z = y
        return tuple(steps)

    @property
    def T(self) -> Term:
        """The chain of the transposed matrix: ends swapped, factors reversed."""
        return Term(self.y, self.weights[::-1], self.x, self.names[::-1])


@dataclass(frozen=True)
class Plan:
    """A sum of `Term`s with the size of every axis: one structured matrix of fixed shape.

    Build one with `Plan.einsum` and ``+``. Hashable, printable, and valid by construction: every axis has a size
    and links its operands, all terms agree on the shape of the matrix, factor names are unique.

    Raises:
        ValueError: when one of these does not hold, naming the axis or the factor.
    """

    terms: tuple[Term, ...]
    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for term in self.terms for name in term.names]
        if len(set(names)) < len(names):
            raise ValueError(f"factor names must be unique, not {', '.join(names)}")
        for term in self.terms:
            for step in term.steps:
                for axis in step.x + step.w + step.y:
                    self._check_axis(axis)
        shapes = {(self.size(term.y), self.size(term.x)) for term in self.terms}
        if len(shapes) > 1:
            raise ValueError(f"the terms of a sum must have one shape (out, in), not {sorted(shapes)}")

    def _check_axis(self, axis: str) -> None:
        if axis == TOKENS:
            raise ValueError(f"axis {TOKENS!r} is reserved for tokens; use another name")
        if axis not in self.sizes:
            raise ValueError(f"axis {axis!r} has no size; give one, as in Plan.einsum(..., {axis}=4)")
        if self.sizes[axis] < 1:
            raise ValueError(f"axis {axis!r} has size {self.sizes[axis]}; sizes start at 1")

    @classmethod
    def einsum(cls, equation: str, *, names: Iterable[str] | None = None, **sizes: int) -> Plan:
        """One chain as a string, slowest axis first in every operand.

        >>> Plan.einsum("i, r i, o r -> o", names=["down", "up"], i=64, r=8, o=32).shapes
        {'down': (8, 64), 'up': (32, 8)}

        Args:
            equation: ``"x, w1, ..., wk -> y"``, axes separated by spaces. The input comes first.
            names: parameter names of the factors, ``w1 ... wk`` unless given.
            **sizes: the size of every axis.

        Raises:
            ValueError: for a malformed equation, naming what is wrong with it.
        """
        if equation.count("->") != 1 or "," not in equation:
            raise ValueError(f"{equation!r} is not of the form 'x, w1, ..., wk -> y'")
        left, y = equation.split("->")
        operands = [tuple(operand.split()) for operand in (*left.split(","), y)]
        for axis in (axis for operand in operands for axis in operand):
            if not re.fullmatch(r"[A-Za-z]\w*", axis):
                raise ValueError(f"{axis!r} in {equation!r} is not an axis name; use letters, then letters or digits")
        weights = tuple(operands[1:-1])
        names = tuple(names or (f"w{i}" for i, _ in enumerate(weights, 1)))
        if len(names) != len(weights):
            raise ValueError(f"{len(weights)} factors in {equation!r} but {len(names)} names: {', '.join(names)}")
        return cls((Term(operands[0], weights, operands[-1], names),), tuple(sorted(sizes.items())))

    def __add__(self, other: Plan) -> Plan:
        """The sum of two matrices of one shape; axes of one name must have one size."""
        for axis in self.sizes.keys() & other.sizes.keys():
            if self.sizes[axis] != other.sizes[axis]:
                raise ValueError(f"axis {axis!r} has sizes {self.sizes[axis]} and {other.sizes[axis]}; rename one")
        return Plan(self.terms + other.terms, tuple(sorted((self.sizes | other.sizes).items())))

    @property
    def T(self) -> Plan:
        """The plan of the transposed matrix, with the same factors."""
        return Plan(tuple(term.T for term in self.terms), self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        return dict(self.axes)

    def size(self, axes: Iterable[str]) -> int:
        """Product of the sizes of ``axes``."""
        return prod(self.sizes[a] for a in axes)

    def shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        """Sizes of ``axes``, in order."""
        return tuple(self.sizes[a] for a in axes)

    @cached_property
    def factors(self) -> dict[str, tuple[Term, Step]]:
        """Parameter name -> the term it belongs to and the step that uses it."""
        return {name: (term, step) for term in self.terms for name, step in zip(term.names, term.steps, strict=True)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of that factor as it is stored: its axes in the order of the equation."""
        return {name: self.shape(step.w) for name, (_, step) in self.factors.items()}

    @property
    def is_dense(self) -> bool:
        """Whether this is an ordinary weight (out, in): one factor without structure."""
        if len(self.terms) > 1 or len(self.factors) > 1:
            return False
        ((term, step),) = self.factors.values()
        return not (step.group or step.free) and step.w == term.y + term.x

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.size(self.terms[0].x)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.size(self.terms[0].y)

    def __str__(self) -> str:
        chains = (", ".join(" ".join(a) for a in (t.x, *t.weights)) + " -> " + " ".join(t.y) for t in self.terms)
        return "  +  ".join(chains)
