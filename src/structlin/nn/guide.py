"""The dense guide of a structured layer: what self-guided training (Wei et al. 2024) adds to it and later removes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import StructuredLinear


class Guide(nn.Module):
    """``y -> alpha * (x W^T + bias) + (1 - alpha) * y`` with a dense ``W``, for a layer whose own output is ``y``.

    Attributes:
        weight: (out_features, in_features), learnable; the matrix of the layer at first.
        alpha: buffer of one element, the share of the guide, from 1 to 0.
        active: whether the guide takes part in training steps; in evaluation it always does.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        self.register_buffer("alpha", torch.ones((), device=weight.device))
        self.active = True

    alpha: Tensor

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Input, own output and bias of the layer -> (*, out_features), the mixed output in the dtype of ``y``."""
        if self.training and not self.active:
            return y
        alpha = self.alpha.to(y.dtype)
        return alpha * F.linear(x, self.weight, bias) + (1 - alpha) * y

    def mixed(self, weight: Tensor) -> Tensor:
        """The matrix of the mixed layer, where ``weight`` is that of the layer without its guide."""
        return self.alpha * self.weight.to(weight.dtype) + (1 - self.alpha) * weight

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


def attach(layer: StructuredLinear) -> Guide:
    """Give ``layer`` a guide that computes what the layer does, or return the one it has."""
    if "guide" not in layer._modules:
        layer.add_module("guide", Guide(layer.to_dense().weight).train(layer.training))
    guide = layer._modules["guide"]
    assert isinstance(guide, Guide)
    return guide
