"""A whole layer as one differentiable operator: ``y = x W^T`` for a lowered plan.

`compose` runs a program as a sequence of `contract` calls; everything that autograd, torch.func or export ask of a
layer works there. `multiply` runs the same program as one operator with its gradients written out, because the
sequence costs a layer about 1.5 ms of host time forward and backward, more than the arithmetic of most layers: it
plans each GEMM once, shares every relayout between the two gradients that need it, and lets the terms of a sum
accumulate into one result. It is registered with PyTorch, so that torch.compile does not look inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .contract import autocast, contract, refuse_transforms, seen_through
from .equation import parse
from .lookup import collect, gather
from .lowering import Program, program
from .moves import kernels_on
from .schedule import Product, add, multiply_then, saved_widths, schedule

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "multiply(Tensor x, Tensor[] factors, str program, bool keep=True, bool kernels=True) -> Tensor[]",
    "multiply_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor[] saved, str program, bool[] needed,"
    " bool kernels=True) -> Tensor[]",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
_forward_op = torch.ops.structlin.multiply.default
_backward_op = torch.ops.structlin.multiply_backward.default


def multiply(x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool = True, kernels: bool = True) -> Tensor:
    """(tokens, in_features) -> (tokens, out_features), by the program of a plan and its factors in order.

    Differentiable any number of times, under autocast, torch.compile, torch.func and export. Between forward and
    backward it keeps its intermediates, or with ``keep=False`` computes them again. With ``kernels`` those of ours run
    where they fit, without them batched GEMMs and PyTorch's copies alone.

    Raises:
        ValueError: when the input and a factor differ in dtype.
    """
    x, factors = autocast(x), [autocast(factor) for factor in factors]
    for factor in factors:
        check_dtype(x.dtype, factor.dtype)
    if x.is_complex() or not what.in_place or seen_through():
        return compose(x, factors, what)
    if torch.compiler.is_compiling():
        result: Tensor = _forward_op(x, factors, what.text, keep, kernels)[0]
        return result
    if torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors)):
        y: Tensor = _Multiply.apply(what, False, keep, kernels, x, *factors)[0]  # type: ignore[no-untyped-call]
        return y
    return _forward(x, factors, what, False, kernels)[0]


def check_dtype(given: torch.dtype, stored: torch.dtype) -> None:
    """Raise the ValueError of `multiply` where the dtypes of an input and of a layer differ."""
    if given != stored:
        raise ValueError(f"the input is {given}, the layer {stored}; cast one of them, or run under torch.autocast")


def compose(x: Tensor, factors: Sequence[Tensor], what: Program, backend: str = "bmm") -> Tensor:
    """The same as `multiply`, as a sequence of `contract` calls on ``backend``."""
    remaining = iter(factors)
    y: Tensor | None = None
    for chain in what.chains:
        z = x if chain.gather is None else gather(x, chain.gather)
        z = z.reshape(-1, *chain.view)
        for stage in chain.stages:
            if stage.relayout is not None:
                z = z.permute(stage.relayout).contiguous()
            z = contract(z, next(remaining), stage.equation, backend)
        if chain.relayout is not None:
            z = z.permute(chain.relayout)
        z = z.reshape(-1, prod(z.shape[1:]))
        z = z if chain.collect is None else collect(z, chain.collect)
        y = z if y is None else y + z
    assert y is not None
    return y


def _run(x: Tensor, factors: Sequence[Tensor], what: Program, kernels: bool) -> tuple[list[Product], list[Tensor]]:
    """The last product of each term, still to be run, and what the gradients need besides the input: each step's input
    where that is a new tensor."""
    x, remaining = x.contiguous(), iter(factors)
    saved: list[Tensor] = []
    products: list[Product] = []
    for chain in schedule(what.text, x.shape[0], kernels_on(x.device, x.dtype, kernels)):
        z = x if chain.before is None else chain.before.run(x)
        for step in chain.steps:
            if z is not x:
                saved.append(z.view(-1))  # in what order is the schedule's affair
            weight = next(remaining).contiguous()
            if step is chain.steps[-1]:
                products.append(Product(step.forward, step.after, z, weight))
            else:
                z = multiply_then(step.forward, step.after, z, weight)
    return products, saved


def _forward(x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool, kernels: bool) -> list[Tensor]:
    """The result, and what `_run` saved if ``keep``."""
    products, saved = _run(x, factors, what, kernels)
    y = add(products)
    return [y.view(x.shape[0], prod(y.shape[1:])), *(saved if keep else ())]


def _backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    what: Program,
    needed: Sequence[bool],
    kernels: bool,
) -> list[Tensor]:
    """Gradients of the input and of every factor; an empty tensor where one is not needed."""
    x, dy, kept = x.contiguous(), dy.contiguous(), iter(saved or _run(x, factors, what, kernels)[1])
    empty = dy.new_empty(0)
    products: list[Product] = []
    gradients: list[Tensor] = []
    for chain in schedule(what.text, x.shape[0], kernels_on(x.device, x.dtype, kernels)):
        steps, first = chain.steps, len(gradients)
        inputs = [x if i == 0 and chain.before is None else next(kept) for i in range(len(steps))]
        *undos, last = [chain.undo, *(step.undo for step in steps)]
        d = dy if last is None else last.run(dy)
        found: list[Tensor] = []
        for i in reversed(range(len(steps))):
            found.append(steps[i].wgrad.run(inputs[i], d) if needed[1 + first + i] else empty)
            weight = factors[first + i].contiguous()
            if i:
                d = multiply_then(steps[i].dgrad, undos[i], d, weight)
            elif needed[0]:
                products.append(Product(steps[0].dgrad, undos[0], d, weight))
        gradients += reversed(found)
    return [add(products).view_as(x) if products else empty, *gradients]


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, what: Program, opaque: bool, keep: bool, kernels: bool, x: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.what, ctx.opaque, ctx.kernels = what, opaque, kernels
        run = _below_autograd if opaque else _forward
        y, *saved = run(x, factors, what, keep, kernels)
        ctx.factors = len(factors)
        ctx.save_for_backward(x, *factors, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_saved: None) -> tuple[Tensor | None, ...]:
        count: int = ctx.factors
        if dy is None:
            return (None,) * (5 + count)
        x, *rest = ctx.saved_tensors
        factors, saved = rest[:count], rest[count:]
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            return (None, None, None, None, *_differentiable_backward(dy, x, factors, ctx.what, needed))
        if ctx.opaque:
            found: list[Tensor] = _backward_op(dy, x, factors, saved, ctx.what.text, needed, ctx.kernels)
        else:
            found = _backward(dy, x, factors, saved, ctx.what, needed, ctx.kernels)
        gradients: list[Tensor | None] = [
            gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)
        ]
        return None, None, None, None, *gradients


def _differentiable_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], what: Program, needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    wanted = [tensor for tensor, need in zip((x, *factors), needed, strict=True) if need]
    found = iter(torch.autograd.grad(compose(x, factors, what), wanted, dy, create_graph=True))
    return (next(found) if need else None for need in needed)


def _below_autograd(x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool, kernels: bool) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        result: list[Tensor] = _forward_op(x, factors, what.text, keep, kernels)
    return result


def _autograd(x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True) -> list[Tensor]:
    refuse_transforms("multiply")
    if torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors)):
        return list(_Multiply.apply(program(text), True, keep, kernels, x, *factors))  # type: ignore[no-untyped-call]
    return _below_autograd(x, factors, program(text), keep, kernels)


def _fake_forward(
    x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True
) -> list[Tensor]:
    _register_flops()
    widths = saved_widths(text, kernels_on(x.device, x.dtype, kernels)) if keep else []
    y = x.new_empty(x.shape[0], program(text).chains[0].out_features)
    return [y, *(x.new_empty(x.shape[0] * width) for width in widths)]


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needed: Sequence[bool],
    kernels: bool = True,
) -> list[Tensor]:
    return [x.new_empty(t.shape if need else (0,)) for t, need in zip((x, *factors), needed, strict=True)]


def _compute(x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True) -> list[Tensor]:
    what = program(text)
    wanted: list[tuple[int, ...]] = [(x.shape[0], what.chains[0].in_features)]
    wanted += [tuple(what.sizes[a] for a in parse(s.equation)[1]) for chain in what.chains for s in chain.stages]
    given = [tuple(tensor.shape) for tensor in (x, *factors)]
    if given != wanted:
        raise ValueError(f"{text!r} takes an input and factors of shapes {wanted}, not {given}")
    found, memory = [], {x.untyped_storage().data_ptr()}
    for tensor in _forward(x, factors, what, keep, kernels):
        # a relayout that only moves axes of size 1 is a view, which an operator may not return
        pointer = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone() if pointer in memory else tensor)
        memory.add(pointer)
    return found


def _compute_backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needed: Sequence[bool],
    kernels: bool = True,
) -> list[Tensor]:
    return _backward(dy, x, factors, saved, program(text), needed, kernels)


def _autograd_backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needed: Sequence[bool],
    kernels: bool = True,
) -> list[Tensor]:
    refuse_transforms("multiply_backward")
    with torch._C._AutoDispatchBelowAutograd():
        result: list[Tensor] = _backward_op(dy, x, factors, saved, text, needed, kernels)
    return result


_library.impl("multiply", _compute, "CompositeExplicitAutograd")
_library.impl("multiply", _autograd, "Autograd")
_library.impl("multiply_backward", _compute_backward, "CompositeExplicitAutograd")
_library.impl("multiply_backward", _autograd_backward, "Autograd")
torch.library.register_fake("structlin::multiply", _fake_forward, lib=_library)
torch.library.register_fake("structlin::multiply_backward", _fake_backward, lib=_library)


def _stage_flops(text: str, tokens: int) -> list[list[int]]:
    """Of every stage of every chain."""
    sizes = {"t": tokens, **program(text).sizes}
    return [
        [2 * prod(sizes[axis] for axis in {*parse(s.equation)[0], *parse(s.equation)[1]}) for s in chain.stages]
        for chain in program(text).chains
    ]


@cache
def _register_flops() -> None:
    # on first tracing, as the counter takes long to import; outside compiled code it counts plain PyTorch
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.structlin.multiply)(_flops)
    register_flop_formula(torch.ops.structlin.multiply_backward)(_backward_flops)


def _flops(x: Sequence[int], _factors: object, text: str, *_: Any, **__: Any) -> int:
    return sum(map(sum, _stage_flops(text, x[0])))


def _backward_flops(
    _dy: object,
    x: Sequence[int],
    _factors: object,
    _saved: object,
    text: str,
    needed: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    total, factor = 0, 0
    for chain in _stage_flops(text, x[0]):
        for i, flops in enumerate(chain):
            factor += 1
            total += flops * (bool(needed[factor]) + (i > 0 or needed[0]))
    return total
