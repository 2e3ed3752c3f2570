"""From a plan to what runs: the order of the axes of every intermediate, and the copies between the steps.

Each role of a step (group, contract, free, out) spans one or several axes. A batched GEMM can read a tensor in
place when every role is one stride in it and one of the two matrix roles is innermost. `lower` follows a chain
from left to right, lets each step write in its native order, and inserts a relayout, one explicit copy, only where
the next step could not read what the last one wrote. In that order the gradients of a step read and write in place
too, so a relayout costs one copy forward and one backward, and nothing else in a chain is ever copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import TOKENS, Axes, Plan, Step, Term

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One contraction with the factor ``name``; ``relayout`` reorders the axes of its input first, by a copy."""

    name: str
    equation: str
    relayout: Permutation | None


@dataclass(frozen=True)
class Chain:
    """What runs for one term: split the features into ``view``, go through ``stages``, reorder the axes at the end."""

    view: tuple[int, ...]
    stages: tuple[Stage, ...]
    relayout: Permutation | None


def lower(plan: Plan) -> tuple[Chain, ...]:
    """The chains of ``plan``, each step reading and writing in place except at its explicit relayouts."""
    return tuple(_lower_term(plan, term) for term in plan.terms)


def literal(plan: Plan) -> tuple[Chain, ...]:
    """The chains of ``plan`` as they are written, for backends that bring operands into order themselves."""
    return tuple(
        Chain(
            plan.shape(term.x),
            tuple(Stage(name, step.equation, None) for name, step in zip(term.names, term.steps, strict=True)),
            None,
        )
        for term in plan.terms
    )


def in_place(axes: Axes, roles: tuple[Axes, ...], innermost: Axes) -> bool:
    """Whether a contiguous tensor with these axes has one stride per role and ends in an axis of ``innermost``."""
    for role in roles:
        start = axes.index(role[0]) if role else 0
        if axes[start : start + len(role)] != role:
            return False
    return not innermost or axes[-1] in innermost


def _lower_term(plan: Plan, term: Term) -> Chain:
    stages, have = [], (TOKENS, *term.x)
    for name, step in zip(term.names, term.steps, strict=True):
        contract = tuple(a for a in step.w if a in step.contract)
        want = (TOKENS, *step.free, *step.group, *contract)
        relayout = None
        if not in_place(have, ((TOKENS, *step.free), step.group, contract), contract):
            relayout, have = _permutation(have, want), want
        native = _native(have, step)
        target = (TOKENS, *term.y)
        if step is term.steps[-1] and in_place(target, ((TOKENS, *step.free), step.group, step.out), step.out):
            native = target
        stages.append(Stage(name, f"{' '.join(have)}, {' '.join(step.w)} -> {' '.join(native)}", relayout))
        have = native
    return Chain(plan.shape(term.x), tuple(stages), _permutation(have, (TOKENS, *term.y)))


def _native(have: Axes, step: Step) -> Axes:
    free = tuple(a for a in have if a in step.free)
    group = tuple(a for a in have if a in step.group)
    return (TOKENS, *free, *group, *step.out)


def _permutation(have: Axes, want: Axes) -> Permutation | None:
    return None if have == want else tuple(have.index(axis) for axis in want)
