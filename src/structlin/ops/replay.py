"""A schedule run: the result of a layer, and its gradients.

Between two steps a tensor is a run of memory that each step reads by sizes and strides of its own, so an input may have
any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from .blocks import Blocks
from .lowering import Program
from .moves import kernels_on
from .products import Multiply, Product, add, factor_gradients, multiply_then
from .schedule import Steps, schedule


def forward(
    x: Tensor, factors: Sequence[Tensor], what: Program, keep: bool, kernels: bool, bias: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The result, and if ``keep`` what the gradients need besides the input: each step's input that is a new tensor."""
    x = x.contiguous()
    products: list[Product] = []
    new: list[Tensor] = []
    for chain, own in _terms(x, factors, what, kernels):
        inputs = _inputs(x, chain, own, keep)
        last = chain.steps[-1]
        products.append(Product(last.forward, last.after, inputs[-1], own[-1]))
        if keep:
            new += _new(chain, inputs)
    y = as_shape(add(products), (*x.shape[:-1], what.chains[0].out_features))
    return y if bias is None else y.add_(as_dtype(bias, y.dtype)), new


def inputs(x: Tensor, factors: Sequence[Tensor], what: Program, kernels: bool) -> list[Tensor]:
    """What `forward` keeps, without the result."""
    x = x.contiguous()
    return [z for chain, own in _terms(x, factors, what, kernels) for z in _new(chain, _inputs(x, chain, own, True))]


def gradients(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    what: Program,
    needed: Sequence[bool],
    kernels: bool,
) -> tuple[list[Tensor | None], list[Product]]:
    """Gradients of every factor, None where one is not needed; and the products, still to be run, whose sum
    is that of the input, none where it is not needed. What was not ``saved`` is computed again."""
    x, dy = x.contiguous(), dy.contiguous()
    kept = iter(saved)
    products: list[Product] = []
    found: list[Tensor | None] = []
    terms = list(_terms(x, factors, what, kernels))
    sparse = any(isinstance(chain.steps[-1].wgrad, Blocks) for chain, _ in terms)
    shared: dict[int, tuple[Multiply, Tensor, Tensor]] = {}  # beside a block-sparse kernel, which may do them too
    for chain, own in terms:
        if saved:
            inputs = [x if i == 0 and chain.before is None else next(kept) for i in range(len(own))]
        else:
            inputs = _inputs(x, chain, own, True)
        steps, first = chain.steps, len(found)
        *undos, last = [chain.undo, *(step.undo for step in steps)]
        d = dy if last is None else last.run(dy)
        backwards: list[Tensor | None] = []
        for i in reversed(range(len(steps))):
            z, weight, both = inputs.pop(), own[i], steps[i].both
            if both is not None and needed[1 + first + i]:
                d, dw = both.run(d, z, weight)
                backwards.append(dw)
                continue
            wgrad = steps[i].wgrad
            if not needed[1 + first + i]:
                backwards.append(None)
            elif sparse and d is dy:
                shared[first + i] = wgrad, z, weight
                backwards.append(None)
            else:
                backwards.append(as_shape(wgrad.run(z, d), weight.shape))
            del z  # what was computed again makes room for the next gradient
            if i:
                d = multiply_then(steps[i].dgrad, undos[i], d, weight)
            elif needed[0]:
                products.append(Product(steps[0].dgrad, undos[0], d, weight))
        found += reversed(backwards)
    for place, dw in factor_gradients({at: (wgrad, z) for at, (wgrad, z, _) in shared.items()}, dy).items():
        found[place] = as_shape(dw, shared[place][2].shape)
    return found, products


def backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    what: Program,
    needed: Sequence[bool],
    kernels: bool,
) -> list[Tensor | None]:
    """Gradients of the input and of every factor; None where one is not needed."""
    found, products = gradients(dy, x, factors, saved, what, needed, kernels)
    return [as_shape(add(products), x.shape) if products else None, *found]


def as_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.view(shape)`` where that is another shape; a view costs as much host time as a product."""
    return x if x.shape == shape else x.view(shape)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, alike."""
    return x if x.dtype == dtype else x.to(dtype)


def _terms(
    x: Tensor, factors: Sequence[Tensor], what: Program, kernels: bool
) -> Iterator[tuple[Steps, Sequence[Tensor]]]:
    """Of every term its schedule and its factors."""
    first = 0
    for chain in schedule(what.text, prod(x.shape[:-1]), kernels_on(x.device, x.dtype, kernels)):
        own = [factor.contiguous() for factor in factors[first : first + len(chain.steps)]]
        first += len(own)
        yield chain, own


def _inputs(x: Tensor, chain: Steps, factors: Sequence[Tensor], keep: bool) -> list[Tensor]:
    """What each step of a term reads, or without ``keep`` what the last one does."""
    inputs = [x if chain.before is None else chain.before.run(x)]
    for step, weight in zip(chain.steps[:-1], factors, strict=False):
        z = multiply_then(step.forward, step.after, inputs[-1], weight)
        inputs = [*inputs, z] if keep else [z]
        del z  # held by the inputs alone, so that who takes it from them frees it
    return inputs


def _new(chain: Steps, inputs: list[Tensor]) -> list[Tensor]:
    """Of the inputs of all steps those that are new tensors; in what order they are is the schedule's affair."""
    return inputs if chain.before is not None else inputs[1:]
