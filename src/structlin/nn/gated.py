"""Two structured layers mixed by a gate that each token sets for itself: a layer without a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..spec import Spec
from .linear import StructuredLinear


class GatedSum(nn.Module):
    """``y = (1 - g) A x + g B x + bias`` with ``g = sigmoid(gate(x))``, one number for each token.

    The released code of Pixelated Butterfly (Dao et al. 2022b, `SparseLRLinear`) mixes its block-sparse and its
    low-rank part so, where the paper has one learnable scalar; that scalar is absorbed by the factors of
    ``Pixelfly(rank=...)`` or any sum of specs.

    Args:
        in_features, out_features: widths.
        first, second: the structures of A and B.
        bias: whether there is one, starting at zero.
        device, dtype: of the parameters.

    Shape: input (*, in_features), output (*, out_features).

    Raises:
        ValueError: when the shape does not fit one of the structures.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        first: Spec,
        second: Spec,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = StructuredLinear(in_features, out_features, first, False, device, dtype)
        self.second = StructuredLinear(in_features, out_features, second, False, device, dtype)
        self.gate = nn.Linear(in_features, 1, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        a, b = self.first(x), self.second(x)
        y = torch.lerp(a, b, torch.sigmoid(self.gate(x)).to(a.dtype).expand_as(a))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self) -> nn.Linear:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError("a gated sum has another matrix for every token; use the sum of both specs to have one")
