"""A plain perceptron for regression and classification, whose square hidden layers are what a structure replaces."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """``depth`` square layers (``hidden.*``) between a first and a last layer that stay dense, with ReLU between."""

    def __init__(self, in_features: int, width: int, depth: int, out_features: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(in_features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_features]`` to ``[batch, out_features]``."""
        x = F.relu(self.inputs(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out
