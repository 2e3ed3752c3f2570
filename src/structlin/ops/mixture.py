"""Experts of two steps as one differentiable operator over tokens sorted by their set of experts, by kernels of ours.

Where few sets are possible this moves a third of the bytes of sorting by expert (`ops/rows.py`): a token is one row,
its input is read once and its output written once. It is registered with PyTorch, so that torch.compile does not look
inside; the gradient of a gradient runs as rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.tiles import TILE, Sets, few_sets, fits, limits
from .contract import autocast_dtype, implement, seen_through
from .equation import constant_when_traced
from .moves import aligned, kernels_on
from .rows import Digits, by_rows

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "group_by_set(Tensor chosen, int experts) -> Tensor[]",
    "mixture(Tensor x, Tensor first, Tensor second, Tensor gate, Tensor chosen, Tensor[] sets) -> Tensor[]",
    "mixture_backward(Tensor dy, Tensor x, Tensor first, Tensor second, Tensor gate, Tensor z, Tensor[] sets)"
    " -> Tensor[]",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


@constant_when_traced
def _on(device: torch.device, dtype: torch.dtype) -> bool:
    return kernels_on(device, dtype).tensor_memory


def set_size(x: Tensor, experts: int, top_k: int, digits: Sequence[Digits | None]) -> int:
    """How many experts the sets have by which `mixture` runs all chains of these ``digits`` on the tokens ``x``, in
    half precision on Hopper: ``top_k`` where there are few sets for so many tokens; 1, so that a token is a row for
    each of its experts, where there are few experts for so many rows; 0 where it does not run them."""
    if seen_through() or not _on(x.device, autocast_dtype(x)):
        return 0
    for size in (top_k, 1):
        few = few_sets(x.shape[0] * top_k // size, experts, size)
        if few and all(chain is not None and fits(chain, size) for chain in digits):
            return size
    return 0


def group_by_set(chosen: Tensor, experts: int) -> Sets:
    """The places of the tokens by ``chosen`` (tokens, top_k), int64, different experts in each row."""
    return Sets(*torch.ops.structlin.group_by_set.default(chosen, experts))


def mixture(x: Tensor, first: Tensor, second: Tensor, gate: Tensor, chosen: Tensor, sets: Sets) -> Tensor:
    """``y = sum_e gate_e W_e x`` over the experts that each token chose, differentiably.

    Args:
        x: (tokens, c * a), half precision.
        first: (experts, c, f, a), of the same dtype.
        second: (experts, f, o, c), of the same dtype.
        gate: (tokens, top_k), any float dtype.
        chosen: (tokens, top_k), the experts.
        sets: of ``chosen``.

    Returns:
        (tokens, f * o).
    """
    tensors = x, first, second, gate
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.structlin.mixture.default(*tensors, chosen, sets)[0]
        return compiled
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y: Tensor = _Mixture.apply(False, *tensors, chosen, *sets)[0]  # type: ignore[no-untyped-call]
        return y
    return _compute(*tensors, chosen, sets)[0]


def without_graph(name: str) -> Callable[..., list[Tensor]]:
    """The operator of ours ``name``, of which autograd records nothing."""

    def run(*given: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            found: list[Tensor] = getattr(torch.ops.structlin, name).default(*given)
        return found

    return run


_below = without_graph("mixture")


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, opaque: bool, x: Tensor, first: Tensor, second: Tensor, gate: Tensor, chosen: Tensor, *sets: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, z = (_below if opaque else _compute)(x, first, second, gate, chosen, sets)
        ctx.opaque = opaque
        ctx.save_for_backward(x, first, second, gate, chosen, z, *sets)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _z: None) -> tuple[Tensor | None, ...]:
        x, first, second, gate, chosen, z, *sets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:5]
        found: list[Tensor | None]
        if dy is None:
            found = [None] * 4
        elif torch.is_grad_enabled():
            found = list(_differentiable_backward(dy, (x, first, second, gate), chosen, needed))
        else:
            run = torch.ops.structlin.mixture_backward.default if ctx.opaque else _compute_backward
            every: Sequence[Tensor] = run(dy, x, first, second, gate, z, sets)
            found = [gradient if need else None for gradient, need in zip(every, needed, strict=True)]
        return (None, *found, *(None for _ in range(1 + len(sets))))


def _differentiable_backward(
    dy: Tensor, tensors: Sequence[Tensor], chosen: Tensor, needed: Sequence[bool]
) -> Iterator[Tensor | None]:

    tensors = [tensor.view_as(tensor) for tensor in tensors]  # the gate is made of the input, which is no matter here
    x, first, second, gate = tensors
    (experts, c, f, a), o = first.shape, second.shape[2]
    y = by_rows(x, [first, second], gate, chosen, experts, (c, a, f, o))
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return (next(found) if need else None for need in needed)


def _compute(
    x: Tensor, first: Tensor, second: Tensor, gate: Tensor, chosen: Tensor, sets: Sequence[Tensor]
) -> list[Tensor]:
    from ..kernels.routed import forward

    _register_flops()
    x, first, second = (aligned(tensor.contiguous()) for tensor in (x, first, second))
    return list(forward(x, first, second, gate.contiguous(), Sets(*sets)))


def _compute_backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, gate: Tensor, z: Tensor, sets: Sequence[Tensor]
) -> list[Tensor]:
    from ..kernels.routed import backward_first, backward_second

    dy, x, first, second = (aligned(tensor.contiguous()) for tensor in (dy, x, first, second))
    there = Sets(*sets)
    dz, dsecond, parts = backward_second(dy, second, gate.contiguous(), z, there)
    dx, dfirst, _ = backward_first(dz, x, first, there)
    return [dx, dfirst, dsecond, parts.sum(1).transpose(0, 1).flatten()[there.place].to(gate.dtype)]


def _group(chosen: Tensor, experts: int) -> list[Tensor]:
    from ..kernels.sets import group

    return list(group(chosen, experts))


def _autograd(
    x: Tensor, first: Tensor, second: Tensor, gate: Tensor, chosen: Tensor, sets: Sequence[Tensor]
) -> list[Tensor]:
    tensors = x, first, second, gate
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Mixture.apply(True, *tensors, chosen, *sets))  # type: ignore[no-untyped-call]
    return _below(*tensors, chosen, sets)


def fake_group(chosen: Tensor, experts: int) -> list[Tensor]:
    """What `group_by_set` gives for tensors without values."""
    tokens, top_k = chosen.shape
    tiles, units = limits(tokens, experts, top_k)
    places = tiles * TILE
    shapes = (places,), (top_k, places), (tokens, top_k), (tiles, top_k), (units,), (units,), (units, top_k)
    return [chosen.new_empty(shape, dtype=torch.int32) for shape in shapes]


def fake_mixture(
    x: Tensor, first: Tensor, second: Tensor, gate: Tensor, chosen: Tensor, sets: Sequence[Tensor]
) -> list[Tensor]:
    """What the operator of `mixture` gives for tensors without values."""
    _register_flops()
    _, c, f, _ = first.shape
    o, (tiles, top_k) = second.shape[2], sets[3].shape
    return [x.new_empty(x.shape[0], f * o), x.new_empty(tiles, top_k, c, f, TILE)]


def _fake_backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, gate: Tensor, z: Tensor, sets: Sequence[Tensor]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, first, second, gate)]


for _name, _run, _fake, _record in (
    ("group_by_set", _group, fake_group, without_graph("group_by_set")),
    ("mixture", _compute, fake_mixture, _autograd),
    ("mixture_backward", _compute_backward, _fake_backward, without_graph("mixture_backward")),
):
    implement(_library, _name, _run, _record, _fake)


@cache
def _register_flops() -> None:
    # on first tracing, as the counter takes long to import
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.structlin
    register_flop_formula(ops.mixture)(lambda x, first, second, gate, *_, **__: flops(x, first, second, gate[1]))
    register_flop_formula(ops.mixture_backward)(
        lambda _dy, x, first, second, gate, *_, **__: 2 * flops(x, first, second, gate[1])
    )


def flops(x: Sequence[int], first: Sequence[int], second: Sequence[int], top_k: int) -> int:
    """Those of `mixture`, by the sizes of its arguments."""
    c, f, a = first[1:]
    return 2 * x[0] * top_k * c * f * (a + second[2])
