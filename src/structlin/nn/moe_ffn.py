"""The standard mixture of experts: several copies of a whole MLP, of which every token visits a few. The baseline that
mixtures inside each linear layer are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.contract import autocast
from ..ops.ragged import ragged_mm
from ..ops.rows import Routes, combine, dispatch
from .router import Router


class MoEFFN(nn.Module):
    """``y = sum_e g_e(x) down_e(activation(up_e(x)))`` over the experts that a router picks for each token.

    Args:
        width: size of the last dimension of input and output.
        hidden: width between both layers of one expert.
        experts: their number.
        top_k: how many of them a token visits.
        balance: "loss" or "bias", as in `Router`.
        activation: between both layers, on any number of rows.
        device: of the parameters.
        dtype: of the parameters.

    Shape: (*, width) to the same. Weights: ``up`` (experts, width, hidden), ``down`` (experts, hidden, width), drawn at
    spectral scale; no bias. The router and its losses are those of `RoutedLinear`.

    Raises:
        ValueError: when top_k exceeds experts, a size is below 1, or the input does not fit.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int = 8,
        top_k: int = 2,
        balance: str = "loss",
        activation: Callable[[Tensor], Tensor] = F.gelu,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts or width < 1 or hidden < 1:
            raise ValueError(
                f"width={width}, hidden={hidden}, experts={experts}, top_k={top_k} is given; sizes start at 1, and "
                "top_k is at most experts"
            )
        self.width, self.hidden, self.activation = width, hidden, activation
        self.up = nn.Parameter(torch.empty(experts, width, hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, hidden, width, device=device, dtype=dtype))
        self.router = Router(width, experts, top_k, balance, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both layers of every expert at spectral scale; the router becomes zero."""
        for weight in (self.up, self.down):
            _, fan_in, fan_out = weight.shape
            if not weight.is_meta:
                weight.normal_(std=(min(1.0, fan_out / fan_in) / fan_in) ** 0.5)
        self.router.reset_parameters()

    def flops(self) -> int:
        """Forward FLOPs of one token: of the experts that it visits, and of the router."""
        return self.router.top_k * 4 * self.width * self.hidden + 2 * self.router.experts * self.width

    def forward(self, x: Tensor) -> Tensor:
        """(*, width) -> (*, width)."""
        if x.dim() == 0 or x.shape[-1] != self.width:
            raise ValueError(
                f"the last dimension of the input must be width={self.width}, not that of {tuple(x.shape)}"
            )
        tokens = x.reshape(-1, self.width)
        _, gate, _, routes = self.router(tokens)
        assert isinstance(routes, Routes)
        rows = dispatch(autocast(tokens), routes)[None]
        # autocast on a GPU takes powers in float32, and so the hyperbolic GELU of GPT-2
        hidden = autocast(self.activation(ragged_mm(rows, autocast(self.up)[None], routes.ends)))
        by_row = gate.flatten().index_select(0, routes.choice).to(hidden.dtype)
        y = ragged_mm(hidden * by_row[:, None], autocast(self.down)[None], routes.ends)
        return combine(y[0], routes).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"width={self.width}, hidden={self.hidden}"
