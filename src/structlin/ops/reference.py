"""The oracle: every equation as one ``torch.einsum``, on any device, in any dtype, under any transform."""

from __future__ import annotations

import re
import string
from functools import cache

import torch
from torch import Tensor

from .equation import constant_when_traced


@cache
def _letters(equation: str) -> str:
    names = dict.fromkeys(re.findall(r"\w+", equation))
    letter = dict(zip(names, string.ascii_letters, strict=False))
    if len(names) > len(letter):
        raise ValueError(f"an equation may have {len(string.ascii_letters)} axes, not {len(names)}: {equation!r}")
    return re.sub(r"\w+", lambda axis: letter[axis[0]], equation).replace(" ", "")


@constant_when_traced  # dynamo neither traces regular expressions nor likes a cache
def letters(equation: str) -> str:
    """The equation with one letter per axis, as einsum wants it: ``"t k i, k r i -> t k r"`` is ``"abc,bdc->abd"``."""
    return _letters(equation)


def contract(a: Tensor, b: Tensor, equation: str) -> Tensor:
    """``a`` and ``b`` contracted as ``equation`` says, in plain PyTorch."""
    return torch.einsum(letters(equation), a, b)
