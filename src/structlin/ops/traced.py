"""What PyTorch is told of the operators of `structlin.ops.chain`, which it cannot see into, and what it asks of them:
shapes, FLOPs, and results that share no memory with an input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .equation import parse
from .lowering import program
from .moves import kernels_on
from .schedule import gradient_widths, saved_widths


def fake_forward(x: Tensor, factors: Sequence[Tensor], text: str, keep: bool = True, kernels: bool = True) -> Tensor:
    """The result of ``multiply``: (tokens, out_features)."""
    _register_flops()
    return x.new_empty(x.shape[0], program(text).chains[0].out_features)


def fake_inputs(x: Tensor, factors: Sequence[Tensor], text: str, kernels: bool = True) -> list[Tensor]:
    """Those of ``multiply_inputs``: the input of each step that is a new tensor, flat."""
    widths = saved_widths(text, kernels_on(x.device, x.dtype, kernels))
    return [x.new_empty(x.shape[0] * n) for own in widths for n in own]


def fake_last(
    inputs: Sequence[Tensor], lasts: Sequence[Tensor], tokens: int, text: str, kernels: bool = True
) -> Tensor:
    """The result of ``multiply_last``: (tokens, out_features)."""
    return inputs[0].new_empty(tokens, program(text).chains[0].out_features)


def fake_backward(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needed: Sequence[bool],
    kernels: bool = True,
) -> list[Tensor]:
    """Those of ``multiply_backward``: the gradient of each factor, and of each term's first product, flat."""
    found = [x.new_empty(t.shape if need else (0,)) for t, need in zip(factors, needed[1:], strict=True)]
    return found + [x.new_empty(x.shape[0] * width) for width in gradient_widths(text) if needed[0]]


def fake_input_backward(
    gradients: Sequence[Tensor], firsts: Sequence[Tensor], tokens: int, text: str, kernels: bool = True
) -> Tensor:
    """The result of ``multiply_input_backward``: the gradient of the input."""
    return gradients[0].new_empty(tokens, program(text).chains[0].in_features)


def check_shapes(x: Tensor, factors: Sequence[Tensor], text: str) -> None:
    """Raise a ValueError when the program takes an input or factors of other shapes."""
    features, *shapes = _taken(text)
    wanted = [(x.shape[0], *features), *shapes]
    given = [tuple(tensor.shape) for tensor in (x, *factors)]
    if given != wanted:
        raise ValueError(f"{text!r} takes an input and factors of shapes {wanted}, not {given}")


@cache
def _taken(text: str) -> list[tuple[int, ...]]:
    what = program(text)
    shapes = [tuple(what.sizes[a] for a in parse(s.equation)[1]) for chain in what.chains for s in chain.stages]
    return [(what.chains[0].in_features,), *shapes]


def apart(results: Sequence[Tensor], given: Tensor) -> list[Tensor]:
    """The results, copied where they lie in the memory of ``given`` or of each other."""
    # a relayout that only moves axes of size 1 is a view, which an operator may not return
    found, memory = [], {given.untyped_storage().data_ptr()}
    for tensor in results:
        pointer = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone() if pointer in memory else tensor)
        memory.add(pointer)
    return found


@cache
def _register_flops() -> None:
    # on first tracing, as the counter takes long to import; outside compiled code it counts plain PyTorch
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in (
        (torch.ops.structlin.multiply, _forward),
        (torch.ops.structlin.multiply_inputs, _inputs),
        (torch.ops.structlin.multiply_last, _last),
        (torch.ops.structlin.multiply_backward, _backward),
        (torch.ops.structlin.multiply_input_backward, _input_backward),
    ):
        register_flop_formula(operator)(formula)


def _stages(text: str, tokens: int) -> list[list[int]]:
    """Of every stage of every chain."""
    sizes = {"t": tokens, **program(text).sizes}
    return [
        [2 * prod(sizes[axis] for axis in {*parse(s.equation)[0], *parse(s.equation)[1]}) for s in chain.stages]
        for chain in program(text).chains
    ]


def _forward(x: Sequence[int], _factors: object, text: str, *_: Any, **__: Any) -> int:
    return sum(sum(stages) for stages in _stages(text, x[0]))


def _last(_inputs: object, _lasts: object, tokens: int, text: str, *_: Any, **__: Any) -> int:
    return sum(stages[-1] for stages in _stages(text, tokens))


def _inputs(x: Sequence[int], _factors: object, text: str, *_: Any, **__: Any) -> int:
    return sum(sum(stages[:-1]) for stages in _stages(text, x[0]))


def _backward(
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
    for stages in _stages(text, x[0]):
        for i, flops in enumerate(stages):
            factor += 1
            total += flops * (bool(needed[factor]) + (i > 0))
    return total


def _input_backward(_gradients: object, _firsts: object, tokens: int, text: str, *_: Any, **__: Any) -> int:
    return sum(stages[0] for stages in _stages(text, tokens))
