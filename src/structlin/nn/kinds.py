"""Which dense layers a structured one stands in for: linear layers, whatever they are called and however they store
their matrix.

``nn.Linear`` and the 1x1 convolutions of torch are here; a package with a linear layer of its own adds it by
`register_kind`, as `structlin.hf` does for GPT-2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import StructuredLinear


class StructuredConv(StructuredLinear):
    """A structured matrix over the channels at every position: a convolution of kernel size 1.

    Shape: input (batch, in_features, positions...) or without the batch, output the same with out_features channels.
    Arguments and parameters are those of `StructuredLinear`; a subclass says how many dimensions the positions have.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a plain 1x1 convolution: of stride 1, without padding and groups."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        ones = (1,) * cls.spatial
        plain = module.groups == 1 and module.padding in ((0,) * cls.spatial, "valid", "same")
        return plain and module.kernel_size == ones and module.stride == ones

    @classmethod
    def shape_of(cls, module: nn.Module) -> tuple[int, int]:
        """Rows and columns, (out_channels, in_channels)."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        return module.out_channels, module.in_channels

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """(out_channels, in_channels, 1...) -> (out_channels, in_channels)."""
        return weight.flatten(1)

    @classmethod
    def as_weight(cls, matrix: Tensor) -> Tensor:
        """(out_channels, in_channels) -> (out_channels, in_channels, 1...)."""
        return matrix.reshape(*matrix.shape, *(1,) * cls.spatial)

    def _dense_like(self, dtype: torch.dtype) -> nn.Module:
        ones = (1,) * self.spatial
        return self.stands_for(
            self.in_features, self.out_features, ones, bias=self.bias is not None, device="meta", dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features, positions...) -> (*, out_features, positions...)."""
        x = input
        if x.dim() - self.spatial not in (1, 2) or x.shape[-1 - self.spatial] != self.in_features:
            raise ValueError(
                f"the input must be (batch, {self.in_features}, {self.spatial} dimensions of positions), "
                f"not {tuple(x.shape)}"
            )
        return super().forward(x.movedim(-1 - self.spatial, -1)).movedim(-1, -1 - self.spatial).contiguous()


class StructuredConv1d(StructuredConv):
    """In place of an ``nn.Conv1d`` of kernel size 1, see `StructuredConv`."""

    spatial, stands_for = 1, nn.Conv1d


class StructuredConv2d(StructuredConv):
    """In place of an ``nn.Conv2d`` of kernel size 1, see `StructuredConv`."""

    spatial, stands_for = 2, nn.Conv2d


KINDS: list[type[StructuredLinear]] = [StructuredLinear, StructuredConv1d, StructuredConv2d]
"""The structured layers that conversion may put in place of dense ones; each names the class it stands for."""


def register_kind(layer: type[StructuredLinear]) -> type[StructuredLinear]:
    """Let conversion put ``layer`` in place of what it ``stands_for``; a class decorator."""
    KINDS.append(layer)
    return layer


def kind_of(module: nn.Module) -> type[StructuredLinear] | None:
    """The structured layer for a dense ``module``; None for what is no linear layer, as a 3x3 convolution."""
    return next((kind for kind in KINDS if isinstance(module, kind.stands_for) and kind.fits(module)), None)


def is_hooked(module: nn.Module) -> bool:
    """Whether something is run before or after ``module``, in its place, or when its state is saved or loaded."""
    calls = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    state = (module._state_dict_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks,
             module._load_state_dict_post_hooks)  # fmt: skip
    return any(calls + state) or "forward" in vars(module)
