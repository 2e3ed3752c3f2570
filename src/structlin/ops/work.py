"""What a program runs, counted for `structlin.costs`: its products and copies, and the memory they hold.

Read off the schedule, so that the model knows of every copy that a kernel saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ..costs import Product, Work
from ..plan import Plan, Step, Term
from .blocks import Blocks
from .joined import Joined
from .lowering import Program, plan_of
from .moves import Kernels, Move, Relayout
from .schedule import Steps, schedule


def work(what: Program, kept: tuple[int, int] | None, tokens: int, kernels: Kernels, training: bool = False) -> Work:
    """What a layer runs step by step for ``tokens`` tokens: forward, or in training forward and all gradients.

    Args:
        what: the program of the layer's plan.
        kept: as in `structlin.plan.Plan`.
        tokens: rows of the input.
        kernels: which kernels of ours run.
        training: whether gradients are counted.
    """
    plan = plan_of(what, kept)
    if not what.in_place:  # such a program copies every operand
        return _copied(plan, tokens, training)
    total = Work()
    for index, (term, steps) in enumerate(zip(plan.terms, schedule(what.text, tokens, kernels), strict=True)):
        total += _forward(plan, term, steps, tokens, index > 0)
        if training:
            total += _backward(plan, term, steps, tokens, index > 0)
    return total + _padding(plan, kept, tokens, training)


def joined_work(
    how: Joined, kept: tuple[int, int] | None, tokens: int, kernels: Kernels, training: bool = False
) -> Work:
    """As `work`, for a sum that runs as one product: its operands are joined by one copy, and added up by one."""
    passes = 2 if training else 1
    moved = float(passes * tokens * how.rows * how.width * (1 + len(how.parts)))
    fast = how.swap is not None and kernels.exchange
    total = work(how.inner, None, tokens, kernels, training) + _padding(plan_of(how.whole), kept, tokens, training)
    return total + Work((), moved if fast else 0.0, 0.0 if fast else moved, passes)


def _padding(plan: Plan, kept: tuple[int, int] | None, tokens: int, training: bool) -> Work:
    """What is added to the input by a copy, and cut off the output by another."""
    total, passes = Work(), 2 if training else 1
    for whole, part in zip(plan.padded, kept or plan.padded, strict=True):
        if whole != part:
            total += Work((), passes * tokens * (whole + part), 0.0, passes)
    return total


def peak_numbers(what: Program, tokens: int, kernels: Kernels, training: bool = False) -> int:
    """Numbers that a layer holds at most beyond its input and factors, results and gradients included.

    In training from the forward pass to the end of the backward pass, with the gradient of the output not counted.
    """
    plan, chains = plan_of(what), schedule(what.text, tokens, kernels)
    rows, columns = (tokens * width for width in plan.padded)
    saved = sum(sum(_saved(plan, term, steps, tokens)) for term, steps in zip(plan.terms, chains, strict=True))
    copied = [step.after for steps in chains for step in steps.steps[:-1]]
    inner = max((prod(move.shape) for move in copied if isinstance(move, Relayout) and _copies(move)), default=0)
    last = [_copies(steps.steps[-1].after) for steps in chains]
    most = saved + max(rows * (1 + any(last)), inner)  # the last products run when all intermediates are there
    if not training:
        return most
    held, kept = saved + rows, 0
    for term, steps in zip(plan.terms, chains, strict=True):
        *undos, end = [steps.undo, *(step.undo for step in steps.steps)]
        d = rows if _copies(end) else 0
        for i in reversed(range(len(steps.steps))):
            held += plan.size(term.weights[i])
            if i:
                z = tokens * plan.size(term.steps[i].x)
                most = max(most, held + kept + d + z * (1 + _copies(undos[i])))
                d = z
        kept += d
    return max(most, held + kept + columns * (1 + any(_copies(steps.undo) for steps in chains)))


def _copied(plan: Plan, tokens: int, training: bool) -> Work:
    total = Work()
    for term, step in plan.factors.values():
        x, y, flops = _sizes(plan, term, step, tokens, False)
        product = Product(flops, x + y + plan.size(step.w), _inner(plan, step))
        total += Work((product,) * (3 if training else 1), 0.0, 2.0 * (x + y) * (3 if training else 1), 2)
    return total


def _forward(plan: Plan, term: Term, steps: Steps, tokens: int, adds: bool) -> Work:
    total = _moved(steps.before)
    for run, step in zip(steps.steps, term.steps, strict=True):
        x, y, flops = _sizes(plan, term, step, tokens, isinstance(run.forward, Blocks))
        again = y if adds and run is steps.steps[-1] else 0  # a sum is read to be added to
        numbers = x + y + again + plan.size(step.w)
        total += Work((Product(flops, numbers, _inner(plan, step)),)) + _moved(run.after)
    return total


def _backward(plan: Plan, term: Term, steps: Steps, tokens: int, adds: bool) -> Work:
    total = _moved(steps.undo)
    for run, step in zip(steps.steps, term.steps, strict=True):
        x, y, flops = _sizes(plan, term, step, tokens, isinstance(run.forward, Blocks))
        again = x if adds and run is steps.steps[0] else 0
        numbers, inner = x + y + plan.size(step.w), _inner(plan, step)
        total += Work((Product(flops, numbers + again, inner), Product(flops, numbers, inner))) + _moved(run.undo)
    return total


def _sizes(plan: Plan, term: Term, step: Step, tokens: int, sparse: bool) -> tuple[int, int, float]:
    """Numbers of the input and of the result of a step, and its FLOPs."""
    x, y = plan.size(step.x), plan.size(step.y)
    if sparse:  # blocks are read where they stand
        x, y = plan.width(term.x, term.table), plan.width(term.y, term.out_table)
    return tokens * x, tokens * y, 2.0 * tokens * plan.size({*step.x, *step.w})


def _inner(plan: Plan, step: Step) -> int:
    return min(plan.size(step.contract), plan.size(step.out))


def _copies(move: Move | None) -> bool:
    """Whether the result is written again in another order, which a product with the tokens last does itself."""
    return move is not None and not (isinstance(move, Relayout) and move.tokens_last)


def _moved(move: Move | None) -> Work:
    if move is None or not _copies(move):
        return Work()
    if isinstance(move, Relayout):
        numbers = 2.0 * prod(move.shape)
        return Work((), numbers, 0.0, 1) if move.kernel else Work((), 0.0, numbers, 1)
    tokens, blocks, width = move.shape
    return Work((), 2.0 * tokens * max(blocks, len(move.index)) * width, 0.0, 1) + _moved(move.relayout)


def _saved(plan: Plan, term: Term, steps: Steps, tokens: int) -> Iterator[int]:
    """Numbers of each intermediate of a term that the backward pass needs."""
    for run, step in zip(steps.steps, term.steps, strict=True):
        if run is not steps.steps[0] or steps.before is not None:
            yield tokens * plan.size(step.x)
