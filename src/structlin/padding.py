"""Widths that a structure does not have: the smallest wider matrix that it has, of which a layer keeps the first rows
and columns.

Nothing here knows a structure. A wider matrix is looked for among the multiples that the structure asks for, in the
order of its size, and taken only if it serves: every feature of the layer is linked to some feature of the other end.
Where blocks are many and widths small the last blocks can lie in the padding altogether, and an output of theirs would
be constant zero; such a matrix is passed over for a wider one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import lru_cache, partial, wraps
from heapq import heappop, heappush
from itertools import chain, islice, product
from operator import itemgetter
from typing import Any

from .plan import Axes, Plan, Table, Term

MOST = 4096  # shapes that are tried
Digits = list[tuple[Hashable, ...]]


class MisfitError(ValueError):
    """A shape that a structure does not have. What padding would do is worked out only if the message is read.

    Args:
        reason: what does not fit, and what does.
        hint: more to say, as a function.
    """

    def __init__(self, reason: str, hint: Callable[[], str]) -> None:
        super().__init__(reason)
        self.hint = hint

    @property
    def reason(self) -> str:
        """The message without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return self.reason + self.hint()

    def __reduce__(self) -> tuple[type[ValueError], tuple[str]]:
        return ValueError, (str(self),)  # a hint cannot go to another process, its text can


def fit(
    exact: Callable[[int, int], Plan],
    out_features: int,
    in_features: int,
    multiples: Callable[[int, int], tuple[int, int]],
    pad: bool,
) -> Plan:
    """The plan that ``exact`` makes for these widths, or with ``pad`` the one for the smallest wider matrix.

    Args:
        exact: (out_features, in_features) -> plan; ValueError where the structure has no such matrix.
        out_features: rows to keep.
        in_features: columns to keep.
        multiples: `Spec.multiples`: of what wider rows and columns must be multiples at least.
        pad: whether to pad.

    Raises:
        ValueError: when nothing fits; it says whether padding would help.
    """
    try:
        return exact(out_features, in_features)
    except ValueError as error:
        reason = error.reason if isinstance(error, MisfitError) else str(error)

    def search() -> Plan | None:
        return _search(exact, out_features, in_features, multiples(out_features, in_features))

    def hint() -> str:
        wider = None if pad else search()
        if wider is not None:
            return f"; or pad=True, which pads {described(wider)}"
        return "; padding does not help: of the wider matrices, up to twice as wide, none fits" if pad else ""

    found = search() if pad else None
    if found is None:
        raise MisfitError(reason, hint)
    return found


def with_padding(exact: Callable[[Any, int, int], Plan]) -> Callable[[Any, int, int], Plan]:
    """The method `Spec.plan` that pads, for a method ``exact`` that does not."""

    def found(spec: Any, out_features: int, in_features: int) -> Plan:
        return fit(partial(exact, spec), out_features, in_features, spec.multiples, spec.pad)

    searched = lru_cache(maxsize=256)(found)  # a model has many layers of one shape

    @wraps(exact)
    def plan(self: Any, out_features: int, in_features: int) -> Plan:
        return (searched if self.pad else found)(self, out_features, in_features)

    return plan


def described(plan: Plan) -> str:
    """What the padding of a plan costs, in words; empty where nothing is padded.

    >>> described(replace(Plan.einsum("i, o i -> o", i=5, o=4), kept=(4, 4)))
    '4x4 to 4x5, +25.0% entries'
    """
    if plan.kept is None:
        return ""
    (rows, columns), (out_features, in_features) = plan.padded, plan.kept
    more = rows * columns / (out_features * in_features) - 1
    return f"{out_features}x{in_features} to {rows}x{columns}, +{more:.1%} entries"


def unlinked(plan: Plan) -> tuple[int, int]:
    """How many outputs and how many inputs have no weight between them and any feature of the other end."""
    if any(set(term.x).isdisjoint(term.y) for term in plan.terms):
        return 0, 0
    outs, ins = set(range(plan.out_features)), set(range(plan.in_features))
    for term in plan.terms:
        columns, rows = digits(plan, term)
        read, written = set(chain.from_iterable(columns)), set(chain.from_iterable(rows))
        outs -= {o for o, values in enumerate(rows) if not read.isdisjoint(values)}
        ins -= {i for i, values in enumerate(columns) if not written.isdisjoint(values)}
    return len(outs), len(ins)


def digits(plan: Plan, term: Term) -> tuple[Digits, Digits]:
    """For every input and every output of a layer its digits on the axes that both ends of a term have.

    An input and an output are linked when they have digits in common. There are several where a table looks a feature
    up several times; padding is left out.
    """
    shared = [axis for axis in term.x if axis in term.y]
    assert shared, "a term whose ends share no axis links everything"

    def read(axes: Axes, table: Table | None, kept: int) -> Digits:
        # no loop in Python where no table is: features are many, and a search reads them again and again
        values = map(itemgetter(*map(axes.index, shared)), product(*map(range, plan.shape(axes))))
        if table is None:
            return list(zip(islice(values, kept), strict=False))
        features: list[list[Hashable]] = [[] for _ in range(plan.width(axes, table))]
        width = plan.size(axes[2:])
        for block in chain.from_iterable(table):
            for feature in features[block * width : (block + 1) * width]:
                feature.append(next(values))
        return list(map(tuple, features[:kept]))

    return read(term.x, term.table, plan.in_features), read(term.y, term.out_table, plan.out_features)


def _search(
    exact: Callable[[int, int], Plan], out_features: int, in_features: int, multiples: tuple[int, int]
) -> Plan | None:
    if min(out_features, in_features) < 1:
        return None
    for rows, columns in islice(_wider((out_features, in_features), multiples), MOST):
        if (rows, columns) == (out_features, in_features):
            continue
        try:
            plan = replace(exact(rows, columns), kept=(out_features, in_features))
        except ValueError:
            continue
        if unlinked(plan) == (0, 0):
            return plan
    return None


def _wider(widths: tuple[int, int], multiples: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs of multiples from ``widths`` on, up to twice as wide, by the size of the matrix."""
    choices = [
        range(first := -(-width // step) * step, max(first, 2 * width) + 1, step)
        for width, step in zip(widths, multiples, strict=True)
    ]
    heap, seen = [(0, 0, 0)], {(0, 0)}
    while heap:
        _, i, j = heappop(heap)
        yield choices[0][i], choices[1][j]
        for new in ((i + 1, j), (i, j + 1)):
            if new not in seen and new[0] < len(choices[0]) and new[1] < len(choices[1]):
                seen.add(new)
                heappush(heap, (choices[0][new[0]] * choices[1][new[1]], *new))
