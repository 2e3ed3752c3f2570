"""A mixture together with the router that leads it, as one differentiable operator.

Apart (`ops/mixture.py`), the router and its gradient read the tokens three times and write a gradient that is added to
that of the mixture. Here the tokens are read once more, to choose, and the router's share is added where the gradient
of the input is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.tiles import Sets
from .contract import implement
from .mixture import fake_group, fake_mixture, flops, without_graph
from .moves import aligned
from .rows import by_rows

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "led_mixture(Tensor x, Tensor router, Tensor? bias, Tensor first, Tensor second, int top_k) -> Tensor[]",
    "led_mixture_backward(Tensor dy, Tensor? dlogits, Tensor? dgate, Tensor x, Tensor router, Tensor first,"
    " Tensor second, Tensor gate, Tensor z, Tensor[] sets) -> Tensor[]",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


class Led(NamedTuple):
    """What `led_mixture` returns.

    Attributes:
        y: (tokens, f * o).
        logits: (tokens, experts), float32.
        gate: (tokens, top_k), float32.
        chosen: (tokens, top_k), int64, the experts.
        sets: of ``chosen``.
    """

    y: Tensor
    logits: Tensor
    gate: Tensor
    chosen: Tensor
    sets: Sets


def led_mixture(x: Tensor, router: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, top_k: int) -> Led:
    """`mixture` of the ``top_k`` experts with the largest logits, by the softmax over these, differentiably.

    Args:
        x: (tokens, c * a), half precision.
        router: (experts, c * a), of the same dtype.
        bias: (experts,), float32, added to what is chosen by, or None.
        first: (experts, c, f, a), of the dtype of ``x``.
        second: (experts, f, o, c), of the dtype of ``x``.
        top_k: experts of a token.
    """
    given = x, router, bias, first, second, top_k
    found: Sequence[Tensor]
    if torch.compiler.is_compiling():
        found = torch.ops.structlin.led_mixture.default(*given)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, router, first, second)):
        found = _Led.apply(False, *given)  # type: ignore[no-untyped-call]
    else:
        found = _compute(*given)
    y, logits, gate, chosen, _, *sets = found
    return Led(y, logits, gate, chosen, Sets(*sets))


_below = without_graph("led_mixture")


class _Led(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        opaque: bool,
        x: Tensor,
        router: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        top_k: int,
    ) -> tuple[Tensor, ...]:
        found = (_below if opaque else _compute)(x, router, bias, first, second, top_k)
        _, _, gate, chosen, z, *sets = found
        ctx.opaque = opaque
        ctx.save_for_backward(x, router, first, second, gate, chosen, z, *sets)
        ctx.mark_non_differentiable(chosen, z, *sets)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlogits: Tensor | None, dgate: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, router, first, second, gate, chosen, z, *sets = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[4:6])
        found: list[Tensor | None]
        if torch.is_grad_enabled():
            found = list(_differentiable_backward((dy, dlogits, dgate), (x, router, first, second), chosen, needed))
        else:
            dy = x.new_zeros(x.shape[0], second.shape[1] * second.shape[2]) if dy is None else dy
            run = torch.ops.structlin.led_mixture_backward.default if ctx.opaque else _compute_backward
            every: Sequence[Tensor] = run(dy, dlogits, dgate, x, router, first, second, gate, z, sets)
            found = [gradient if need else None for gradient, need in zip(every, needed, strict=True)]
        dx, drouter, dfirst, dsecond = found
        return None, dx, drouter, None, dfirst, dsecond, None


def _differentiable_backward(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], chosen: Tensor, needed: Sequence[bool]
) -> Iterator[Tensor | None]:

    x, router, first, second = tensors
    (experts, c, f, a), o = first.shape, second.shape[2]
    logits = F.linear(x, router)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gate = logits.gather(1, chosen).softmax(1)
    y = by_rows(x, [first, second], gate, chosen, experts, (c, a, f, o))
    ends = [(end, given) for end, given in zip((y, logits, gate), gradients, strict=True) if given is not None]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [end for end, _ in ends], wanted, [given for _, given in ends], create_graph=True, allow_unused=True
        )
    )
    return (next(found) if need else None for need in needed)


def _compute(x: Tensor, router: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, top_k: int) -> list[Tensor]:
    from ..kernels.route import route
    from ..kernels.routed import forward
    from ..kernels.sets import group

    _register_flops()
    x, router, first, second = (aligned(tensor.contiguous()) for tensor in (x, router, first, second))
    logits, gate, chosen = route(x, router, bias, top_k)
    sets = group(chosen, router.shape[0])
    y, z = forward(x, first, second, gate, sets)
    return [y, logits, gate, chosen, z, *sets]


def _compute_backward(
    dy: Tensor, dlogits: Tensor | None, dgate: Tensor | None, x: Tensor, router: Tensor, first: Tensor, second: Tensor,
    gate: Tensor, z: Tensor, sets: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    from ..kernels.route import unroute
    from ..kernels.routed import backward_first, backward_second

    dy, x, router, first, second = (aligned(tensor.contiguous()) for tensor in (dy, x, router, first, second))
    dgate, dlogits = (given if given is None else given.contiguous() for given in (dgate, dlogits))
    there = Sets(*sets)
    dz, dsecond, parts = backward_second(dy, second, gate, z, there)
    dlogits = unroute(parts, dgate, dlogits, gate, router.shape[0], there)
    dx, dfirst, drouter = backward_first(dz, x, first, there, dlogits, router)
    assert drouter is not None
    return [dx, drouter, dfirst, dsecond]


def _autograd(
    x: Tensor, router: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, top_k: int
) -> list[Tensor]:
    given = x, router, bias, first, second, top_k
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, router, first, second)):
        return list(_Led.apply(True, *given))  # type: ignore[no-untyped-call]
    return _below(*given)


def _fake(x: Tensor, router: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, top_k: int) -> list[Tensor]:
    _register_flops()
    tokens, experts = x.shape[0], router.shape[0]
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    gate, chosen = logits.new_empty(tokens, top_k), logits.new_empty(tokens, top_k, dtype=torch.int64)
    sets = fake_group(chosen, experts)
    y, z = fake_mixture(x, first, second, gate, chosen, sets)
    return [y, logits, gate, chosen, z, *sets]


def _fake_backward(
    dy: Tensor, dlogits: Tensor | None, dgate: Tensor | None, x: Tensor, router: Tensor, first: Tensor, second: Tensor,
    gate: Tensor, z: Tensor, sets: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor in (x, router, first, second)]


for _name, _run, _made, _record in (
    ("led_mixture", _compute, _fake, _autograd),
    ("led_mixture_backward", _compute_backward, _fake_backward, without_graph("led_mixture_backward")),
):
    implement(_library, _name, _run, _record, _made)


@cache
def _register_flops() -> None:
    # on first tracing, as the counter takes long to import
    from torch.utils.flop_counter import register_flop_formula

    def led(x: Sequence[int], router: Sequence[int], first: Sequence[int], second: Sequence[int], top_k: int) -> int:
        return flops(x, first, second, top_k) + 2 * x[0] * router[0] * router[1]

    register_flop_formula(torch.ops.structlin.led_mixture)(
        lambda x, router, _bias, first, second, top_k, **_: led(x, router, first, second, top_k)
    )
    register_flop_formula(torch.ops.structlin.led_mixture_backward)(
        lambda _dy, _dl, _dg, x, router, first, second, gate, *_, **__: 2 * led(x, router, first, second, gate[1])
    )
