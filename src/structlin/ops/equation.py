"""Equations over named axes: ``"t k i, k r i -> t k r"`` contracts two tensors, names separated by spaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from ..plan import Axes

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Have torch.compile call ``function`` once and keep its result, instead of tracing it.

    As ``torch.compiler.assume_constant_result``, which costs two seconds where nothing is compiled: it imports the
    compiler to set this attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def _parse(equation: str) -> tuple[Axes, Axes, Axes]:
    left, arrow, c = equation.partition("->")
    a, comma, b = left.partition(",")
    if not (arrow and comma) or "," in b:
        raise ValueError(f"{equation!r} is not of the form 'a axes, b axes -> result axes'")
    operands = tuple(a.split()), tuple(b.split()), tuple(c.split())
    for axis in dict.fromkeys(sum(operands, ())):
        if any(operand.count(axis) > 1 for operand in operands) or sum(axis in o for o in operands) < 2:
            raise ValueError(f"axis {axis!r} must occur once in two or three of the operands of {equation!r}")
    return operands


@constant_when_traced  # dynamo need not trace string handling, and warns about a cache
def parse(equation: str) -> tuple[Axes, Axes, Axes]:
    """The axes of both operands and of the result.

    Raises:
        ValueError: when an axis does not link two or three of the operands.
    """
    return _parse(equation)
