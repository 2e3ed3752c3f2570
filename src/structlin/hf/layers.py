"""GPT-2's linear layer, which is called ``Conv1D`` and stores its matrix transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn.kinds import register_kind
from ..nn.linear import StructuredLinear


@register_kind
class StructuredConv1D(StructuredLinear):
    """In place of a ``transformers.pytorch_utils.Conv1D``; it computes and stores what `StructuredLinear` does."""

    stands_for = Conv1D

    @classmethod
    def shape_of(cls, module: nn.Module) -> tuple[int, int]:
        """Rows and columns of the matrix, (out_features, in_features)."""
        assert isinstance(module, Conv1D)
        return int(module.nf), int(module.nx)

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """(in_features, out_features) -> (out_features, in_features)."""
        return weight.T

    @classmethod
    def as_weight(cls, matrix: Tensor) -> Tensor:
        """(out_features, in_features) -> (in_features, out_features), contiguous."""
        return matrix.T.contiguous()

    def _dense_like(self, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            layer: nn.Module = Conv1D(self.out_features, self.in_features)
        return layer.to(dtype)
