"""The contract that every structure keeps, as functions: shipped, so that one defined elsewhere is held to it too.

Each function in `CONTRACT`, and for mixtures of experts in `MIXTURE_CONTRACT`, takes
``(spec, (out_features, in_features), device)`` and raises AssertionError when the promise is broken. A contract accepts
any self-consistent matrix, so a structure also needs a test against the dense form that its paper writes down.
"""

from ..accuracy import assert_as_accurate, assert_close, error
from .layers import Layer, Shape, examples, inputs, make, mixture_examples, padded_examples, plain
from .promises import (
    CONTRACT,
    MIXTURE_CONTRACT,
    Promise,
    casts_as_linear_does,
    check,
    compiles_whole,
    costs_what_it_says,
    exports,
    has_right_gradients,
    has_the_rank_it_says,
    is_accurate,
    is_the_matrix_it_says,
    is_the_mixture_it_says,
    keeps_its_state,
    passes_opcheck,
    refuses_a_wrong_width,
    starts_at_spectral_scale,
    survives_json,
    takes_any_batch,
    works_under_transforms,
)

__all__ = [
    "CONTRACT",
    "MIXTURE_CONTRACT",
    "Layer",
    "Promise",
    "Shape",
    "assert_as_accurate",
    "assert_close",
    "casts_as_linear_does",
    "check",
    "compiles_whole",
    "costs_what_it_says",
    "error",
    "examples",
    "exports",
    "has_right_gradients",
    "has_the_rank_it_says",
    "inputs",
    "is_accurate",
    "is_the_matrix_it_says",
    "is_the_mixture_it_says",
    "keeps_its_state",
    "make",
    "mixture_examples",
    "padded_examples",
    "passes_opcheck",
    "plain",
    "refuses_a_wrong_width",
    "starts_at_spectral_scale",
    "survives_json",
    "takes_any_batch",
    "works_under_transforms",
]
