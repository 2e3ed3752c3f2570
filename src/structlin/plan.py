"""The intermediate representation: a structured matrix is a sum of einsum chains over named axes.

A feature index is read as digits, each digit an axis with a name: feature 37 of 64 is (block 4, position 5).
A structure is then a short chain of contractions over those axes, and the order of the axes at both ends *is*
the permutation. Costs, ranks, scales and layouts are all read off this description; it imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import prod

from .widths import common_digits

Axes = tuple[str, ...]
Table = tuple[tuple[int, ...], ...]

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
        table: if given, the two leading axes of ``x`` look up a block of the input: (row, slot) is block
            ``table[row][slot]``, and the other axes are the position in it.
        out_table: the same for ``y``: what (row, slot) holds is added to block ``out_table[row][slot]`` of the output.
    """

    x: Axes
    weights: tuple[Axes, ...]
    y: Axes
    names: tuple[str, ...]
    table: Table | None = None
    out_table: Table | None = None

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
        return Term(self.y, self.weights[::-1], self.x, self.names[::-1], self.out_table, self.table)


@dataclass(frozen=True)
class Plan:
    """A sum of `Term`s with the size of every axis: one structured matrix of fixed shape.

    Build one with `Plan.einsum` and ``+``. Hashable, printable, and valid by construction: every axis has a size
    and links its operands, all terms agree on the shape of the matrix, every factor has an axis or more and a name
    of its own that a parameter can have.

    Attributes:
        terms: the chains that add up.
        axes: name and size of every axis.
        kept: (out_features, in_features) where the matrix of the terms is wider than the layer: its first rows and
            columns are the layer's, the others padding. None where nothing is padded.

    Raises:
        ValueError: when one of these does not hold, naming the axis or the factor.
    """

    terms: tuple[Term, ...]
    axes: tuple[tuple[str, int], ...]
    kept: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        names = [name for term in self.terms for name in term.names]
        if len(set(names)) < len(names):
            raise ValueError(f"factor names must be unique, not {', '.join(names)}")
        for name in names:
            if not name.isidentifier() or name == "bias":
                raise ValueError(f"{name!r} is no name for a factor; use an identifier other than 'bias'")
        for term in self.terms:
            if not term.weights or () in term.weights:
                raise ValueError(f"'{self}' needs one factor or more in each term, and one axis or more in each factor")
            for step in term.steps:
                for axis in step.x + step.w + step.y:
                    self._check_axis(axis)
            self._check_table(term.table, term.x)
            self._check_table(term.out_table, term.y)
        unused = self.sizes.keys() - {axis for term in self.terms for axes in (term.x, *term.weights) for axis in axes}
        if unused:
            raise ValueError(f"'{self}' has no axis {', '.join(map(repr, sorted(unused)))}, but a size is given")
        shapes = {(self.width(term.y, term.out_table), self.width(term.x, term.table)) for term in self.terms}
        if len(shapes) > 1:
            raise ValueError(f"the terms of a sum must have one shape (out, in), not {sorted(shapes)}")
        if self.kept == self.padded or not all(1 <= k <= n for k, n in zip(self.kept or (), self.padded, strict=False)):
            raise ValueError(f"a plan of {self.padded} can keep fewer rows or columns, not {self.kept}")

    def _check_axis(self, axis: str) -> None:
        if axis == TOKENS:
            raise ValueError(f"axis {TOKENS!r} is reserved for tokens; use another name")
        if axis not in self.sizes:
            raise ValueError(f"axis {axis!r} has no size; give one, as in Plan.einsum(..., {axis}=4)")
        if not isinstance(self.sizes[axis], int) or self.sizes[axis] < 1:
            raise ValueError(f"axis {axis!r} has size {self.sizes[axis]}; sizes are whole numbers from 1")

    def _check_table(self, table: Table | None, axes: Axes) -> None:
        if table is None:
            return
        if (len(table), *{len(row) for row in table}) != self.shape(axes[:2]) or not all(table):
            raise ValueError(
                f"a table of '{self}' must have a row and a slot for each value of {' and '.join(axes[:2])}"
            )
        uses = Counter(block for row in table for block in row)
        if {*uses} != {*range(len(uses))} or len({*uses.values()}) > 1 or any(len({*row}) < len(row) for row in table):
            raise ValueError(
                f"a table of '{self}' must hold all blocks from 0 on equally often, each once in a row at most"
            )

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
        for axis in sorted(self.sizes.keys() & other.sizes.keys()):
            if self.sizes[axis] != other.sizes[axis]:
                raise ValueError(f"axis {axis!r} has sizes {self.sizes[axis]} and {other.sizes[axis]}; rename one")
        if self.kept != other.kept:
            raise ValueError(f"the terms of a sum must be padded alike; pad the sum: ({self}) + ({other})")
        return Plan(self.terms + other.terms, tuple(sorted((self.sizes | other.sizes).items())), self.kept)

    def __matmul__(self, other: Plan) -> Plan:
        """The product of two matrices, ``other`` applied first, as one chain; axes and factors are renamed as needed.

        The width between them is read in digits fine enough for both sides.

        Raises:
            ValueError: for sums, for tables, for padding, for widths that differ, and where no digits serve both sides.
        """
        if self.kept or other.kept:
            raise ValueError(f"a product with a padded matrix is no plan; pad the product: ({self}) @ ({other})")
        if any(term.table or term.out_table for term in self.terms + other.terms):
            raise ValueError(f"a product with looked-up blocks is no plan: ({self}) @ ({other})")
        if len(self.terms) > 1 or len(other.terms) > 1:
            raise ValueError(f"a product of sums uses a factor several times and is no plan: ({self}) @ ({other})")
        left = self.apart(other)
        digits = common_digits(left.shape(left.terms[0].x), other.shape(other.terms[0].y))
        taken, names = {*left.sizes, *other.sizes}, []
        for _ in digits:
            names.append(_free("h", taken))
            taken.add(names[-1])
        left, right = left._read(left.terms[0].x, digits, names), other._read(other.terms[0].y, digits, names)
        (last,), (first,) = left.terms, right.terms
        term = Term(first.x, first.weights + last.weights, last.y, first.names + last.names)
        return Plan((term,), tuple(sorted((left.sizes | right.sizes).items())))

    def apart(self, other: Plan) -> Plan:
        """The same matrix with no axis and no factor named as one of ``other``: clashing names get a number."""
        axes: dict[str, Axes] = {}
        taken = {*self.sizes, *other.sizes, TOKENS}
        for axis in (axis for axis in self.sizes if axis in other.sizes):
            axes[axis] = (_free(axis, taken),)
            taken.add(axes[axis][0])
        taken, names = {*self.factors, *other.factors}, {}
        for name in (name for name in self.factors if name in other.factors):
            names[name] = _free(name, taken)
            taken.add(names[name])
        sizes = {axes.get(axis, (axis,))[0]: size for axis, size in self.axes}
        return self._substitute(axes, sizes, names)

    def _read(self, axes: Axes, digits: Iterable[int], names: Iterable[str]) -> Plan:
        """The same matrix with each of ``axes`` split into the next of ``digits``; an axis of size 1 is left out."""
        parts: dict[str, list[tuple[str, int]]] = {axis: [] for axis in axes}
        fine = iter(zip(names, digits, strict=True))
        for axis, split in parts.items():
            while prod(digit for _, digit in split) < self.sizes[axis]:
                split.append(next(fine))
        sizes = {axis: size for axis, size in self.axes if axis not in parts}
        sizes |= {name: digit for split in parts.values() for name, digit in split}
        return self._substitute({axis: tuple(name for name, _ in split) for axis, split in parts.items()}, sizes, {})

    def _substitute(self, axes: Mapping[str, Axes], sizes: Mapping[str, int], names: Mapping[str, str]) -> Plan:
        def put(operand: Axes) -> Axes:
            return tuple(new for axis in operand for new in axes.get(axis, (axis,)))

        def renamed(t: Term) -> Term:
            names_of = tuple(names.get(name, name) for name in t.names)
            return replace(t, x=put(t.x), weights=tuple(map(put, t.weights)), y=put(t.y), names=names_of)

        return Plan(tuple(map(renamed, self.terms)), tuple(sorted(sizes.items())), self.kept)

    @property
    def T(self) -> Plan:
        """The plan of the transposed matrix, with the same factors."""
        return Plan(tuple(term.T for term in self.terms), self.axes, self.kept and self.kept[::-1])

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        return dict(self.axes)

    def size(self, axes: Iterable[str]) -> int:
        """Product of the sizes of ``axes``."""
        return prod(self.sizes[a] for a in axes)

    def width(self, axes: Axes, table: Table | None) -> int:
        """Features at an end of a term, read as ``axes``: those of all blocks of the table where there is one."""
        return self.size(axes) if table is None else self.size(axes[2:]) * num_blocks(table)

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
        """Whether this is an ordinary weight (out, in): one factor of two axes without structure."""
        term = self.terms[0]
        plain = len(self.factors) == 1 and len(term.x) == len(term.y) == 1 and term.weights[0] == term.y + term.x
        return plain and self.kept is None

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the matrix of the terms, padding included."""
        term = self.terms[0]
        return self.width(term.y, term.out_table), self.width(term.x, term.table)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return (self.kept or self.padded)[1]

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return (self.kept or self.padded)[0]

    def __str__(self) -> str:
        def end(axes: Axes, table: Table | None) -> str:
            return " ".join(axes) if table is None else " ".join((f"table[{' '.join(axes[:2])}]", *axes[2:]))

        inputs = (", ".join([end(t.x, t.table), *map(" ".join, t.weights)]) for t in self.terms)
        return "  +  ".join(f"{x} -> {end(t.y, t.out_table)}" for x, t in zip(inputs, self.terms, strict=True))


def num_blocks(table: Table) -> int:
    """Blocks that a table looks up."""
    return 1 + max(map(max, table))


def _free(name: str, taken: set[str]) -> str:
    stem = name.rstrip("0123456789")
    return next(new for i in count(1) if (new := f"{stem}{i}") not in taken)
