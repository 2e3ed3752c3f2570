"""Chains in which every token visits the experts that it chose, as rows sorted by expert.

Tokens are copied to rows, each step is one grouped GEMM over those rows, and the rows of a token are added up again.
Both moves are a gather in either direction, so nothing is added by atomic operations and every result is the same bits
each time. Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import TOKENS, Axes, Plan, Table, Term
from .lookup import collect, gather
from .ragged import ragged_mm

Digits = tuple[int, int, int, int]
"""(c, a, f, o) of an expert ``[t, c, a] x [c, f, a] -> [t, c, f]``, ``[t, c, f] x [f, o, c] -> [t, f, o]``."""


class Routes(NamedTuple):
    """Which rows the tokens become: one for each token and chosen expert, sorted by expert, tokens in order within one.

    Attributes:
        token: (rows,) int64, the token of each row.
        row: (tokens, top_k) int64, the row of each token and choice.
        ends: (experts,) int32, where the rows of each expert end.
        choice: (rows,) int64, the place of each row in the flattened (tokens, top_k).
    """

    token: Tensor
    row: Tensor
    ends: Tensor
    choice: Tensor


def sort(chosen: Tensor, experts: int) -> Routes:
    """The routes of ``chosen`` (tokens, top_k), the experts of each token, int64 below ``experts``."""
    top_k = chosen.shape[1]
    # few bits make the sort fast
    sorted_, choice = torch.sort(chosen.flatten().to(torch.int16), stable=True)
    every = torch.arange(experts, device=chosen.device, dtype=torch.int16)
    ends = torch.searchsorted(sorted_, every, right=True, out_int32=True)
    row = torch.empty_like(choice).scatter_(0, choice, torch.arange(choice.shape[0], device=choice.device))
    return Routes(choice // top_k, row.view(-1, top_k), ends, choice)


class _Dispatch(torch.autograd.Function):
    """(tokens, *axes) -> permuted by ``order``, with the rows of all tokens in place of the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: tuple[int, ...], token: Tensor, row: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(token, row)
        return x.permute(order).index_select(order.index(0), token)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None, None]:
        token, row = ctx.saved_tensors
        return _Combine.apply(dz, ctx.order, token, row), None, None, None  # type: ignore[no-untyped-call]


class _Combine(torch.autograd.Function):
    """The adjoint of `_Dispatch`: the rows of each token added up."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: tuple[int, ...], token: Tensor, row: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(token, row)
        rows = z.permute([order.index(i) for i in range(len(order))])
        return rows.index_select(0, row.flatten()).view(*row.shape, *rows.shape[1:]).sum(1, dtype=z.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        token, row = ctx.saved_tensors
        return _Dispatch.apply(dy, ctx.order, token, row), None, None, None  # type: ignore[no-untyped-call]


def dispatch(x: Tensor, routes: Routes, order: tuple[int, ...] | None = None) -> Tensor:
    """(tokens, *axes) -> (rows, *axes), or those axes in another ``order``, of which 0 stands for the rows."""
    order = tuple(range(x.dim())) if order is None else order
    result: Tensor = _Dispatch.apply(x, order, routes.token, routes.row)  # type: ignore[no-untyped-call]
    return result


def combine(z: Tensor, routes: Routes, order: tuple[int, ...] | None = None) -> Tensor:
    """(rows, *axes), or these in ``order``, -> (tokens, *axes), contiguous: the sum over the rows of each token."""
    order = tuple(range(z.dim())) if order is None else order
    result: Tensor = _Combine.apply(z, order, routes.token, routes.row)  # type: ignore[no-untyped-call]
    return result


class Stage(NamedTuple):
    """One step of a chain as one grouped GEMM.

    Attributes:
        order: what permutes (rows, *axes) to (*group, rows, *free, *contract).
        weight_order: what permutes the factor of all experts to (*group, experts, *contract, *out).
        sizes: of all group, free, contract and out axes.
        group: size of each group axis.
        rest: size of each free axis and out axis.
    """

    order: tuple[int, ...]
    weight_order: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    group: tuple[int, ...]
    rest: tuple[int, ...]


class Chain(NamedTuple):
    """A term of a plan: ``view`` is how a token is read, ``order`` what the last stage yields of (tokens, *axes).

    ``digits`` are those that `mixture` takes, if the term is of that form.
    """

    table: Table | None
    view: tuple[int, ...]
    stages: tuple[Stage, ...]
    order: tuple[int, ...]
    out_table: Table | None
    digits: Digits | None


class Program(NamedTuple):
    """What runs for the plan of an expert, worked out once, in plain numbers that torch.compile can replay.

    Attributes:
        pad: features to add to the input.
        keep: features to keep of the output, or None for all.
        chains: the terms.
    """

    pad: int
    keep: int | None
    chains: tuple[Chain, ...]


def program(plan: Plan) -> Program:
    """The program of a plan."""
    rows, columns = plan.padded
    keep = plan.out_features if rows > plan.out_features else None
    return Program(columns - plan.in_features, keep, tuple(_chain(plan, term) for term in plan.terms))


def _chain(plan: Plan, term: Term) -> Chain:
    axes: Axes = (TOKENS, *term.x)
    stages = []
    for step in term.steps:
        into, stored = (*step.group, TOKENS, *step.free, *step.contract), ("", *step.w)
        stages.append(
            Stage(
                tuple(axes.index(axis) for axis in into),
                tuple(stored.index(axis) for axis in (*step.group, "", *step.contract, *step.out)),
                (plan.size(step.group), plan.size(step.free), plan.size(step.contract), plan.size(step.out)),
                plan.shape(step.group),
                plan.shape((*step.free, *step.out)),
            )
        )
        axes = (*step.group, TOKENS, *step.free, *step.out)
    home = (TOKENS, *term.y)
    order = tuple(home.index(axis) for axis in axes)
    return Chain(term.table, plan.shape(term.x), tuple(stages), order, term.out_table, _digits(plan, term))


def _digits(plan: Plan, term: Term) -> Digits | None:
    """Those of a term of two steps that reads, stores and writes everything in the order that `mixture` takes."""
    if len(term.steps) != 2 or term.table is not None or term.out_table is not None:
        return None
    (one, two), (first, second) = term.steps, term.weights
    given = term.x, first, second, term.y, one.free, two.free, two.group, two.contract
    c, a, f, o = one.group, one.contract, two.group, two.out
    taken: tuple[Axes, ...] = (*c, *a), (*c, *f, *a), (*f, *o, *c), (*f, *o), (), (), one.out, c
    sizes = plan.sizes
    for axes, wanted in zip(given, taken, strict=True):
        if [axis for axis in axes if sizes[axis] > 1] != [axis for axis in wanted if sizes[axis] > 1]:
            return None
    return plan.size(c), plan.size(a), plan.size(f), plan.size(o)


@cache
def _of_digits(digits: Digits) -> Program:
    c, a, f, o = digits
    return program(Plan.einsum("c a, c f a, f o c -> f o", c=c, a=a, f=f, o=o))


def by_rows(x: Tensor, factors: Sequence[Tensor], gate: Tensor, chosen: Tensor, experts: int, digits: Digits) -> Tensor:
    """`mixture` as rows sorted by expert, differentiable any number of times."""
    (chain,) = _of_digits(digits).chains
    return run_rows(x, factors, gate, sort(chosen, experts), chain)


def run_rows(x: Tensor, factors: Sequence[Tensor], gate: Tensor, routes: Routes, chain: Chain) -> Tensor:
    """``sum_e gate_e W_e x`` for one term: x (tokens, in_features), gate (tokens, top_k) -> (tokens, out_features)."""
    gates = gate.flatten().index_select(0, routes.choice).to(x.dtype)
    x = x if chain.table is None else gather(x, chain.table)
    z = x.reshape(-1, *chain.view)
    for i, (stage, w) in enumerate(zip(chain.stages, factors, strict=True)):
        group, free, k, n = stage.sizes
        rows = routes.token.shape[0]
        z = z.permute(stage.order) if i else dispatch(z, routes, stage.order)
        weight = w.permute(stage.weight_order).reshape(group, -1, k, n)
        z = ragged_mm(z.reshape(group, rows * free, k), weight, routes.ends * free)
        if i == 0:
            z = z.view(group, rows, free * n) * gates[:, None]
        z = z.view(*stage.group, rows, *stage.rest)
    y = combine(z, routes, chain.order).flatten(1)
    return y if chain.out_table is None else collect(y, chain.out_table)
