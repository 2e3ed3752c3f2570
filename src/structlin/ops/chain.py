"""A whole layer as one differentiable operator: ``y = x W^T`` for a lowered plan.

`compose` runs a program as a sequence of `contract` calls; everything that autograd, torch.func or export ask of a
layer works there. `multiply` runs the same program as one operator with its gradients written out, because the
sequence costs a layer about 1.5 ms of host time forward and backward, more than the arithmetic of most layers: it
plans each GEMM once, shares every relayout between the two gradients that need it, and lets the terms of a sum
accumulate into one result. It is registered with PyTorch, so that torch.compile does not look inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import replay
from .contract import autocast, contract, implement, refuse_transforms, seen_through
from .lookup import collect, gather
from .lowering import REVISION, Program, program
from .moves import kernels_on
from .products import Product, add
from .schedule import gradient_widths, saved_widths, schedule
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


def multiply(
    x: Tensor,
    factors: Sequence[Tensor],
    what: Program,
    keep: bool = True,
    kernels: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """(*, in_features) -> (*, out_features), by the program of a plan and its factors in order; then adds ``bias``.

    Differentiable any number of times, under autocast, torch.compile, torch.func and export. Between forward and
    backward it keeps its intermediates, or with ``keep=False`` computes them again. With ``kernels`` those of ours run
    where they fit, without them batched GEMMs and PyTorch's copies alone.

    Raises:
        ValueError: when the input and a factor differ in dtype.
    """
    x, factors = cast_alike(x, factors)
    if x.is_complex() or not what.in_place or seen_through():
        return compose(x, factors, what, bias=bias)
    if torch.compiler.is_compiling():
        return as_given(_forward_op(rows(x), factors, what.text + REVISION, keep, kernels), bias, x)
    operands = (x, *factors) if bias is None else (x, bias, *factors)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        result: Tensor = _Multiply.apply(what, False, keep, kernels, x, bias, *factors)  # type: ignore[no-untyped-call]
        return result
    return replay.forward(x, factors, what, False, kernels, bias)[0]


def cast_alike(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The input and the factors of a layer as autocast would hand them to ``nn.Linear``.

    Raises:
        ValueError: where their dtypes differ then.
    """
    x = autocast(x)
    alike = [factor if factor.dtype == x.dtype else autocast(factor) for factor in factors]
    for factor in alike:
        check_dtype(x.dtype, factor.dtype)
    return x, alike


def check_dtype(given: torch.dtype, stored: torch.dtype) -> None:
    """Raise the ValueError of `multiply` where the dtypes of an input and of a layer differ."""
    if given != stored:
        raise ValueError(f"the input is {given}, the layer {stored}; cast one of them, or run under torch.autocast")


def compose(
    x: Tensor, factors: Sequence[Tensor], what: Program, backend: str = "bmm", bias: Tensor | None = None
) -> Tensor:
    """The same as `multiply`, as a sequence of `contract` calls on ``backend``."""
    remaining, tokens = iter(factors), rows(x)
    y: Tensor | None = None
    for chain in what.chains:
        z = tokens if chain.gather is None else gather(tokens, chain.gather)
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
    return as_given(y, bias, x)


def rows(x: Tensor) -> Tensor:
    """(*, features) -> (tokens, features)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_given(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """(tokens, out_features), the bias added, with the leading dimensions of ``x``."""
    y = y if bias is None else y + bias.to(y.dtype)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


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
    """As `replay.backward`, by two operators, so compiled code lets go of the input before its gradient is made."""
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
    """The result of `multiply`; ``opaque`` where PyTorch traces for torch.compile, which gives no bias."""

    @staticmethod
    def forward(
        ctx: Any, what: Program, opaque: bool, keep: bool, kernels: bool, x: Tensor, bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.how = what, opaque, keep, kernels, len(factors), None if bias is None else bias.dtype
        if opaque:
            y, saved = _forward_by_operators(x, factors, what, keep, kernels)
        else:
            with torch._C._AutoDispatchBelowADInplaceOrView():  # what is returned may be changed in place
                y, saved = replay.forward(x, factors, what, keep, kernels, bias)
        ctx.save_for_backward(x, *factors, *saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        what, opaque, keep, kernels, count, bias_dtype = ctx.how
        if dy is None:
            return (None, None, None, None, None, None, *[None] * count)
        x, *rest = ctx.saved_tensors
        factors, saved = rest[:count], rest[count:]
        _, _, _, _, at_x, at_bias, *at_factors = ctx.needs_input_grad
        needed = at_x, *at_factors
        # with its dtype, or autocast would make it float32
        dbias = replay.as_dtype(rows(dy).sum(0, dtype=dy.dtype), bias_dtype) if at_bias else None
        found: Iterable[Tensor | None]
        if not any(needed):
            found = [None] * len(needed)
        elif torch.is_grad_enabled():
            found = _differentiable_backward(dy, x, factors, what, needed)
        elif opaque:
            found = _backward_by_operators(dy, x, factors, saved, what, needed, keep, kernels)
        else:
            found = replay.backward(dy, x, factors, saved, what, needed, kernels)
        dx, *wanted = (gradient if need else None for gradient, need in zip(found, needed, strict=True))
        return None, None, None, None, dx, dbias, *wanted


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
        y: Tensor = _Multiply.apply(program(text), True, keep, kernels, x, None, *factors)  # type: ignore[no-untyped-call]
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
    return apart([replay.forward(x, factors, program(text), False, kernels)[0]], x)[0]


def _compute_inputs(x: Tensor, factors: Sequence[Tensor], text: str, kernels: bool = True) -> list[Tensor]:
    check_shapes(x, factors, text)
    return apart([z.view(-1) for z in replay.inputs(x, factors, program(text), kernels)], x)


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
    found, products = replay.gradients(dy, x, factors, saved, program(text), needed, kernels)
    shared = [width == 0 for width in gradient_widths(text)]
    first = [dy.new_empty(0) if at_dy else p.a.view(-1) for p, at_dy in zip(products, shared, strict=False)]
    return [*(dy.new_empty(0) if dw is None else dw for dw in found), *apart(first, dy)]


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
