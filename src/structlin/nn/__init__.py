"""The layers, their initialisation, and the projection of dense weights onto them."""

from .attention import pixelated_attention
from .explain import explain
from .fourier import MonarchFourier
from .gated import GatedSum
from .kinds import StructuredConv1d, StructuredConv2d
from .linear import StructuredLinear
from .moe_ffn import MoEFFN
from .normalised import normalise_
from .pixelated import PixelatedAttention
from .projection import project
from .routed import RoutedLinear, layer_of, share_router_
from .router import Load, Router, routing_load, routing_loss, update_balance_
from .shared_bases import recover
from .tuning import tune

__all__ = [
    "GatedSum",
    "Load",
    "MoEFFN",
    "MonarchFourier",
    "PixelatedAttention",
    "RoutedLinear",
    "Router",
    "StructuredConv1d",
    "StructuredConv2d",
    "StructuredLinear",
    "explain",
    "layer_of",
    "normalise_",
    "pixelated_attention",
    "project",
    "recover",
    "routing_load",
    "routing_loss",
    "share_router_",
    "tune",
    "update_balance_",
]
