"""Layers on nested tensors: batches of sequences of several lengths, ``torch.nested`` with ``layout=torch.jagged``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_values(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer`` on every token of a nested tensor (batch, lengths, in_features), without padding.

    Raises:
        ValueError: for another layout, or lengths in another dimension.
    """
    if x.layout != torch.jagged or getattr(x, "_ragged_idx", None) != 1:
        raise ValueError(
            f"a nested tensor of layout {x.layout} is given; allowed: torch.jagged, with lengths in dimension 1"
        )
    lengths = getattr(x, "_lengths", None)
    offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(layer(x.values()), offsets, lengths)
