"""The layer, its initialisation, and the projection of dense weights onto it."""

from .explain import explain
from .linear import StructuredLinear
from .projection import project
from .shared_bases import recover

__all__ = ["StructuredLinear", "explain", "project", "recover"]
