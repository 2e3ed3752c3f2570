"""The contract that every structure keeps, as functions: shipped, so that one defined elsewhere is held to it too.

Each function in `CONTRACT`, and for mixtures of experts in `MIXTURE_CONTRACT`, takes
``(spec, (out_features, in_features), device)`` and raises AssertionError when the promise is broken. A contract accepts
any self-consistent matrix, so a structure also needs a test against the dense form that its paper writes down.
"""

from ..accuracy import assert_as_accurate, assert_close, error
from .layers import Layer, Shape, examples, inputs, make, mixture_examples, padded_examples, plain
from .promises import CONTRACT, MIXTURE_CONTRACT, Promise, check

__all__ = [
    "CONTRACT",
    "MIXTURE_CONTRACT",
    "Layer",
    "Promise",
    "Shape",
    "assert_as_accurate",
    "assert_close",
    "check",
    "error",
    "examples",
    "inputs",
    "make",
    "mixture_examples",
    "padded_examples",
    "plain",
]
