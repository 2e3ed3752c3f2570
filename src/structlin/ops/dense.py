"""The dense weight of a plan, multiplied out of its factors: differentiable, and what the dense backend runs.

Nothing is pushed through the layer: the factors of a term are multiplied with each other, an axis that input and output
share becomes a diagonal of blocks, and looked-up blocks are put where the table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .. import analysis
from ..plan import Axes, Plan, Term
from . import reference
from .contract import contract
from .lookup import collect, scatter


def weight(plan: Plan, factors: Sequence[Tensor]) -> Tensor:
    """The matrix (out_features, in_features) of a plan, from its factors in order.

    On any device, in any float or complex type; under torch.func and export as plain PyTorch.
    """
    remaining = iter(factors)
    total: Tensor | None = None
    for term in plan.terms:
        own = _matrix(plan, term, [next(remaining) for _ in term.weights])
        total = own if total is None else total + own
    assert total is not None
    return total if plan.kept is None else total[: plan.kept[0], : plan.kept[1]].contiguous()


def _matrix(plan: Plan, term: Term, factors: Sequence[Tensor]) -> Tensor:
    core, have = factors[0], term.weights[0]
    place = {axis: i for i, axis in enumerate(term.y + term.x)}
    for (_, w, both), factor in zip(analysis.factor_products(term), factors[1:], strict=True):
        # as the weight lies, so that there is nothing to reorder afterwards
        ordered = tuple(sorted(both, key=lambda axis: place.get(axis, len(place))))
        equation = f"{' '.join(have)}, {' '.join(w)} -> {' '.join(ordered)}"
        on_gpu = core.is_cuda  # elsewhere plain PyTorch, which torch.compile sees through
        core = contract(core, factor, equation, "triton") if on_gpu else reference.contract(core, factor, equation)
        have = ordered
    # where a row of the table is an axis of the other end too, each row has a place for every block, most of them zero
    by_row = term.table is not None and term.x[0] in term.y
    by_column = term.out_table is not None and term.y[0] in term.x and not (by_row and term.x[0] == term.y[0])
    x, y = term.x[by_row:], term.y[by_column:]
    core = _on_diagonals(plan, core, have, y, x)
    if by_row:
        assert term.table is not None
        core = scatter(core, term.table, y.index(term.x[0]), len(y))
    if by_column:
        assert term.out_table is not None
        core = scatter(core, term.out_table, len(y) + x.index(term.y[0]), 0)
    shape = core.shape
    core = core.reshape(prod(shape[: len(y)]), prod(shape[len(y) :]))
    if term.table is not None and not by_row:
        core = collect(core, term.table)
    if term.out_table is not None and not by_column:
        core = collect(core.mT, term.out_table).mT
    return core.contiguous()


def _on_diagonals(plan: Plan, core: Tensor, have: Axes, y: Axes, x: Axes) -> Tensor:
    """``core``, which has the axes ``have``, as a tensor with those of ``y``, then ``x``: zero off the diagonal of an
    axis that is in both, constant along one that ``core`` does not have."""
    shared = [axis for axis in y if axis in x]
    order = [axis for axis in y + x if axis not in shared] + shared[::-1]
    missing = [axis for axis in order if axis not in have]
    core = core.reshape((*core.shape, *([1] * len(missing)))).expand((*core.shape, *plan.shape(missing)))
    present = [*have, *missing]
    core = core.permute([present.index(axis) for axis in order])
    ends = [("y", axis) for axis in y] + [("x", axis) for axis in x]
    done = [end for end in ends if end[1] not in shared]
    for axis in shared:
        done = [end for end in ends if end in done or end[1] == axis]
        core = torch.diag_embed(core, 0, done.index(("y", axis)), done.index(("x", axis)))
    return core
