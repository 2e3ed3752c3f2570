"""The layer, its initialisation, and the projection of dense weights onto it."""

from .explain import explain
from .kinds import StructuredConv1d, StructuredConv2d
from .linear import StructuredLinear
from .normalised import normalise_
from .projection import project
from .shared_bases import recover

__all__ = [
    "StructuredConv1d",
    "StructuredConv2d",
    "StructuredLinear",
    "explain",
    "normalise_",
    "project",
    "recover",
]
