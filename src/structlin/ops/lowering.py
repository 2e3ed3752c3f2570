"""From a plan to what runs: the order of the axes of every intermediate, and the copies between the steps.

Each role of a step (group, contract, free, out) spans one or several axes. A batched GEMM can read a tensor in
place when every role is one stride in it and one of the two matrix roles is innermost. `lower` follows a chain
from left to right, lets each step write in its native order, and inserts a relayout, one explicit copy, only where
the next step could not read what the last one wrote. In that order the gradients of a step read and write in place
too, so a relayout costs one copy forward and one backward, and nothing else in a chain is ever copied.

A lowered plan is a line of text, readable in a profile and hashable for a cache. The axes of the input (where the
first step does not read them as they are), then equations, then the axes of the output (where the last step does not
write them as they shall be); a relayout happens wherever one part writes an order and the next reads another:

    a=8 b=4 c=4 d=8: t b a, b c a -> t b c; t c b, c d b -> t c d; t d c

Where a table looks up the input or adds up the output, it stands before or after these:

    i=2 k=4 n=8 s=2: gather 0 1, 1 0; t i s k, i n s k -> t i n
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from ..plan import TOKENS, Axes, Plan, Step, Table, Term, num_blocks
from .equation import parse
from .gemm import plan_contiguous

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One contraction with the next factor; ``relayout`` reorders the axes of its input first, by a copy."""

    equation: str
    relayout: Permutation | None


@dataclass(frozen=True)
class Chain:
    """What runs for one term: look up blocks of the input by the table ``gather``, split the features into ``view``, go
    through ``stages``, reorder the axes, add up blocks by the table ``collect``. ``x`` and ``y`` are the axes of both
    ends in the order of the features."""

    x: Axes
    y: Axes
    view: tuple[int, ...]
    stages: tuple[Stage, ...]
    relayout: Permutation | None
    gather: Table | None
    collect: Table | None
    in_features: int
    out_features: int


def _revision() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f" # {digest.hexdigest()[:12]}"


REVISION = _revision()
"""What follows a program in compiled code. PyTorch keeps compiled code on disk by what it traced, which is an operator
and this text, not what the operator does; so the text says which source it was."""


@dataclass(frozen=True)
class Program:
    """What runs for a plan: the chains whose results are added, and the size of every axis.

    ``in_place`` says whether every step and its gradients read and write in place. A factor whose own axes are stored
    in an order that no GEMM can read (``"c a, a b c -> b"``) is copied at each use, and only `compose` does that.
    """

    text: str
    chains: tuple[Chain, ...]
    sizes: dict[str, int]
    in_place: bool

    def __hash__(self) -> int:
        return hash(self.text)


def lower(plan: Plan) -> Program:
    """The program of ``plan`` in which every step reads and writes in place, with relayouts where it must."""
    return program(_text(plan, [_lowered(term) for term in plan.terms]))


def literal(plan: Plan) -> Program:
    """The program of ``plan`` as it is written, for backends that bring operands into order themselves."""
    return program(_text(plan, [[step.equation for step in term.steps] for term in plan.terms]))


def plan_of(what: Program, kept: tuple[int, int] | None = None) -> Plan:
    """The plan that a program runs, its factors named in order w1, w2, ...; ``kept`` as in `Plan`."""
    terms: list[Term] = []
    for chain in what.chains:
        weights = tuple(parse(stage.equation)[1] for stage in chain.stages)
        first = 1 + sum(len(term.weights) for term in terms)
        names = tuple(f"w{i}" for i in range(first, first + len(weights)))
        terms.append(Term(chain.x, weights, chain.y, names, chain.gather, chain.collect))
    return Plan(tuple(terms), tuple(what.sizes.items()), kept)


@cache
def program(text: str) -> Program:
    """Read a line that `lower` wrote; `REVISION` after it is left out."""
    text = text.partition(" # ")[0]
    head, _, body = text.partition(": ")
    sizes = {axis: int(size) for axis, _, size in (part.partition("=") for part in head.split())}
    chains = tuple(_read(chain.split("; "), sizes) for chain in body.split(" + "))
    return Program(text, chains, sizes, all(_runs_in_place(s, sizes) for chain in chains for s in chain.stages))


def _runs_in_place(stage: Stage, sizes: dict[str, int]) -> bool:
    x, w, y = parse(stage.equation)
    return not any(plan_contiguous(*axes, {"t": 2, **sizes}).copies for axes in ((x, w, y), (y, w, x), (x, y, w)))


def in_place(axes: Axes, roles: tuple[Axes, ...], innermost: Axes) -> bool:
    """Whether a contiguous tensor with these axes has one stride per role and ends in an axis of ``innermost``."""
    for role in roles:
        start = axes.index(role[0]) if role else 0
        if axes[start : start + len(role)] != role:
            return False
    return not innermost or axes[-1] in innermost


def _text(plan: Plan, chains: list[list[str]]) -> str:
    parts = []
    for term, chain in zip(plan.terms, chains, strict=True):
        gather = [] if term.table is None else [f"gather {_spelled(term.table)}"]
        collect = [] if term.out_table is None else [f"collect {_spelled(term.out_table)}"]
        parts.append("; ".join([*gather, *chain, *collect]))
    return " ".join(f"{axis}={size}" for axis, size in plan.axes) + ": " + " + ".join(parts)


def _spelled(table: Table) -> str:
    return ", ".join(" ".join(map(str, row)) for row in table)


def _table(part: str, word: str) -> Table | None:
    if not part.startswith(word):
        return None
    return tuple(tuple(map(int, row.split())) for row in part.removeprefix(word).split(","))


def _read(parts: list[str], sizes: dict[str, int]) -> Chain:
    gather, collect = _table(parts[0], "gather "), _table(parts[-1], "collect ")
    parts = parts[gather is not None : len(parts) - (collect is not None)]
    # every part is an order of axes or an equation; the first says how the input is read, the last how the output is
    stages: list[Stage] = []
    have = tuple(parts[0].split()) if "->" not in parts[0] else parse(parts[0])[0]
    start = have[1:]
    view = tuple(sizes[axis] for axis in start)
    for part in parts:
        if "->" in part:
            x, _, y = parse(part)
            stages.append(Stage(part, _permutation(have, x)))
            have = y
    end = have if "->" in parts[-1] else tuple(parts[-1].split())
    ends = prod(view), prod(sizes[axis] for axis in end[1:])
    widths = (_width(size, table) for size, table in zip(ends, (gather, collect), strict=True))
    return Chain(start, end[1:], view, tuple(stages), _permutation(have, end), gather, collect, *widths)


def _width(size: int, table: Table | None) -> int:
    return size if table is None else size // sum(map(len, table)) * num_blocks(table)


def _lowered(term: Term) -> list[str]:
    parts, have, target = [], (TOKENS, *term.x), (TOKENS, *term.y)
    for step in term.steps:
        contract = tuple(a for a in step.w if a in step.contract)
        if not in_place(have, ((TOKENS, *step.free), step.group, contract), contract):
            have = (TOKENS, *step.free, *step.group, *contract)
        wrote = _native(have, step)
        if step is term.steps[-1] and in_place(target, ((TOKENS, *step.free), step.group, step.out), step.out):
            wrote = target
        parts.append(f"{' '.join(have)}, {' '.join(step.w)} -> {' '.join(wrote)}")
        have = wrote
    if have != target:
        parts.append(" ".join(target))
    first = parse(parts[0])[0]
    return parts if first == (TOKENS, *term.x) else [" ".join((TOKENS, *term.x)), *parts]


def _native(have: Axes, step: Step) -> Axes:
    free = tuple(a for a in have if a in step.free)
    group = tuple(a for a in have if a in step.group)
    return (TOKENS, *free, *group, *step.out)


def _permutation(have: Axes, want: Axes) -> Permutation | None:
    return None if have == want else tuple(have.index(axis) for axis in want)
