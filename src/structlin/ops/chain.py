"""A whole layer as one differentiable operator: ``y = x W^T`` for a lowered plan.

`compose` runs a program as a sequence of `contract` calls; everything that autograd, torch.func or export ask of a
layer works there. `multiply` runs the same program as one operator with its gradients written out, because the
sequence costs a layer about 1.5 ms of host time forward and backward, more than the arithmetic of most layers: it
plans each GEMM once, shares every relayout between the two gradients that need it, and lets the terms of a sum
accumulate into one result. It is registered with PyTorch, so that torch.compile does not look inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .contract import autocast, contract, implement, refuse_transforms, seen_through
from .lookup import collect, gather
from .lowering import REVISION, Program, program
from .moves import kernels_on
from .schedule import Product, Steps, add, gradient_widths, multiply_then, saved_widths, schedule
from .traced import apart, check_shapes, fake_backward, fake_forward, fake_input_backward, fake_inputs, fake_last

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "multiply(Tensor x, Tensor[] factors, str program, bool keep=True, bool kernels=True) -> Tensor",
    "multiply_inputs(Tensor x, Tensor[] factors, str program, bool kernels=True) -> Tensor[]",
    "multiply_last(Tensor[] inputs, Tensor[] lasts, SymInt tokens, str program, bool kernels=True) -> Tensor",
    "multiply_backward(Tensor dy, Tensor x, Tensor[] factors, Tensor[] saved, str program, bool[] needed,"
    " bool kernels=True) -> Tensor[]",
    "multiply_input_backward(Tensor[] gradients, Tensor[] firsts, SymInt tokens, str program, bool kernels=True)"
    " -> Tensor",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
_forward_op = torch.ops.structlin.multiply.default
_inputs_op = torch.ops.structlin.multiply_inputs.default
_last_op = torch.ops.structlin.multiply_last.default
_backward_op = torch.ops.structlin.multiply_backward.default
_input_backward_op = torch.ops.structlin.multiply_input_backward.default


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
        result: Tensor = _forward_op(x, factors, what.text + REVISION, keep, kernels)
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


def _terms(
    x: Tensor, factors: Sequence[Tensor], saved: Sequence[Tensor], what: Program, keep: bool, kernels: bool
) -> Iterator[tuple[Steps, Sequence[Tensor], list[Tensor]]]:
    """Of every term its schedule, its factors, and the input of each step: ``saved``, or computed where none are, and
    then without ``keep`` that of the last step alone."""
    first, kept = 0, iter(saved)
    for chain in schedule(what.text, x.shape[0], kernels_on(x.device, x.dtype, kernels)):
        own = factors[first : first + len(chain.steps)]
        first += len(own)
        if saved:
            inputs = [x if i == 0 and chain.before is None else next(kept) for i in range(len(own))]
        else:
            inputs = [x if chain.before is None else chain.before.run(x)]
            for step, weight in zip(chain.steps[:-1], own, strict=False):
                z = multiply_then(step.forward, step.after, inputs[-1], weight.contiguous())
                inputs = [*inputs, z] if keep else [z]
                del z  # held by the inputs alone, so that who takes it from them frees it
        yield chain, own, inputs


def _forward(x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool, kernels: bool) -> list[Tensor]:
    """The result, and if ``keep`` what the gradients need besides the input: each step's input that is a new tensor."""
    x = x.contiguous()
    products: list[Product] = []
    new: list[Tensor] = []
    for chain, own, inputs in _terms(x, factors, (), what, keep, kernels):
        last = chain.steps[-1]
        products.append(Product(last.forward, last.after, inputs[-1], own[-1].contiguous()))
        new += [z.view(-1) for z in inputs if keep and z is not x]  # in what order is the schedule's affair
    y = add(products)
    return [y.view(x.shape[0], prod(y.shape[1:])), *new]


def _gradients(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    what: Program,
    needed: Sequence[bool],
    kernels: bool,
) -> tuple[list[Tensor], list[Product]]:
    """Gradients of every factor, an empty tensor where one is not needed; and the products, still to be run, whose sum
    is that of the input, none where it is not needed."""
    x, dy = x.contiguous(), dy.contiguous()
    empty = dy.new_empty(0)
    products: list[Product] = []
    gradients: list[Tensor] = []
    for chain, own, inputs in _terms(x, factors, saved, what, True, kernels):
        steps, first = chain.steps, len(gradients)
        *undos, last = [chain.undo, *(step.undo for step in steps)]
        d = dy if last is None else last.run(dy)
        found: list[Tensor] = []
        for i in reversed(range(len(steps))):
            z, weight, both = inputs.pop(), own[i].contiguous(), steps[i].both
            if both is not None and needed[1 + first + i]:
                d, dw = both.run(d, z, weight)
                found.append(dw)
                continue
            found.append(steps[i].wgrad.run(z, d) if needed[1 + first + i] else empty)
            del z  # what was computed again makes room for the next gradient
            if i:
                d = multiply_then(steps[i].dgrad, undos[i], d, weight)
            elif needed[0]:
                products.append(Product(steps[0].dgrad, undos[0], d, weight))
        gradients += reversed(found)
    return gradients, products


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
    gradients, products = _gradients(dy, x, factors, saved, what, needed, kernels)
    return [add(products).view_as(x) if products else dy.new_empty(0), *gradients]


def _backward_by_operators(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    what: Program,
    needed: Sequence[bool],
    keep: bool,
    kernels: bool,
) -> list[Tensor]:
    """As `_backward`, by two operators, so that compiled code lets go of the input before its gradient is allocated."""
    dy, wide = dy.contiguous(), what.chains[0].in_features >= what.chains[0].out_features
    if torch._C._len_torch_dispatch_stack() and not (keep and wide):
        # PyTorch keeps what an operator of ours reads, and may compute again what this view stands for: a norm, an
        # activation or a cast before the layer, at the cost of writing the input once more.
        x = x.split(x.shape[1], 1)[0]
    gradients = _backward_op(dy, x, factors, saved, what.text, needed, kernels)
    count, first = len(factors), 0
    if not needed[0]:
        return [dy.new_empty(0), *gradients]
    firsts = []
    for chain in what.chains:
        firsts.append(factors[first])
        first += len(chain.stages)
    ends = [d if width else dy for d, width in zip(gradients[count:], gradient_widths(what.text), strict=True)]
    return [_input_backward_op(ends, firsts, x.shape[0], what.text, kernels), *gradients[:count]]


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, what: Program, opaque: bool, keep: bool, kernels: bool, x: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.what, ctx.opaque, ctx.keep, ctx.kernels = what, opaque, keep, kernels
        if opaque:
            y, saved = _forward_by_operators(x, factors, what, keep, kernels)
        else:
            y, *saved = _forward(x, factors, what, keep, kernels)
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
            found = _backward_by_operators(dy, x, factors, saved, ctx.what, needed, ctx.keep, ctx.kernels)
        else:
            found = _backward(dy, x, factors, saved, ctx.what, needed, ctx.kernels)
        wanted = (gradient if need else None for gradient, need in zip(found, needed, strict=True))
        return None, None, None, None, *wanted


def _differentiable_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], what: Program, needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    wanted = [tensor for tensor, need in zip((x, *factors), needed, strict=True) if need]
    found = iter(torch.autograd.grad(compose(x, factors, what), wanted, dy, create_graph=True))
    return (next(found) if need else None for need in needed)


def _forward_by_operators(
    x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool, kernels: bool
) -> tuple[Tensor, list[Tensor]]:
    """The result and what is saved, each by an operator: of one that returned both PyTorch would rather save what is
    computed from the result, however wide, than the result. The second reads the input only where a term has one step:
    what two operators read Inductor may write for each of them."""
    with torch._C._AutoDispatchBelowAutograd():
        widths = saved_widths(what.text, kernels_on(x.device, x.dtype, kernels)) if keep else []
        if not any(widths):
            return _forward_op(x, factors, what.text, False, kernels), []
        saved = _inputs_op(x, factors, what.text, kernels)
        inputs, lasts, taken, last = [], [], 0, -1
        for chain, own in zip(what.chains, widths, strict=True):
            taken, last = taken + len(own), last + len(chain.stages)
            inputs.append(saved[taken - 1] if own else x)
            lasts.append(factors[last])
        return _last_op(inputs, lasts, x.shape[0], what.text, kernels), saved


def _autograd(x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True) -> Tensor:
    refuse_transforms("multiply")
    if torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors)):
        y: Tensor = _Multiply.apply(program(text), True, keep, kernels, x, *factors)[0]  # type: ignore[no-untyped-call]
        return y
    return _forward_by_operators(x, factors, program(text), False, kernels)[0]


def _undifferentiated(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """What an operator does that is called inside of another's derivative: it has none of its own."""

    def run(*given: Any) -> Any:
        refuse_transforms(operator._opname)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*given)

    return run


def _compute(x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True) -> Tensor:
    check_shapes(x, factors, text)
    return apart(_forward(x, factors, program(text), False, kernels), x)[0]


def _compute_inputs(x: Tensor, factors: Sequence[Tensor], text: str, kernels: bool = True) -> list[Tensor]:
    check_shapes(x, factors, text)
    given = x.contiguous()
    terms = _terms(given, factors, (), program(text), True, kernels)
    return apart([z.view(-1) for _, _, inputs in terms for z in inputs if z is not given], x)


def _compute_last(
    inputs: Sequence[Tensor], lasts: Sequence[Tensor], tokens: int, text: str, kernels: bool = True
) -> Tensor:
    chains = schedule(text, tokens, kernels_on(inputs[0].device, inputs[0].dtype, kernels))
    steps = [chain.steps[-1] for chain in chains]
    y = add(
        [
            Product(step.forward, step.after, z.contiguous(), weight.contiguous())
            for step, z, weight in zip(steps, inputs, lasts, strict=True)
        ]
    )
    return y.view(tokens, program(text).chains[0].out_features)


def _compute_backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needed: Sequence[bool],
    kernels: bool = True,
) -> list[Tensor]:
    gradients, products = _gradients(dy, x, factors, saved, program(text), needed, kernels)
    shared = [width == 0 for width in gradient_widths(text)]
    first = [dy.new_empty(0) if at_dy else p.a.view(-1) for p, at_dy in zip(products, shared, strict=False)]
    return [*gradients, *apart(first, dy)]


def _compute_input_backward(
    gradients: Sequence[Tensor], firsts: Sequence[Tensor], tokens: int, text: str, kernels: bool = True
) -> Tensor:
    chains = schedule(text, tokens, kernels_on(gradients[0].device, gradients[0].dtype, kernels))
    products = [
        Product(chain.steps[0].dgrad, chain.undo, d.contiguous(), weight.contiguous())
        for chain, d, weight in zip(chains, gradients, firsts, strict=True)
    ]
    return add(products).view(tokens, program(text).chains[0].in_features)


for _name, _run, _differentiate, _fake in (
    ("multiply", _compute, _autograd, fake_forward),
    ("multiply_inputs", _compute_inputs, _undifferentiated(_inputs_op), fake_inputs),
    ("multiply_last", _compute_last, _undifferentiated(_last_op), fake_last),
    ("multiply_backward", _compute_backward, _undifferentiated(_backward_op), fake_backward),
    ("multiply_input_backward", _compute_input_backward, _undifferentiated(_input_backward_op), fake_input_backward),
):
    implement(_library, _name, _run, _differentiate, _fake)
