"""The layer, its initialisation, and the projection of dense weights onto it."""

from .linear import StructuredLinear
from .projection import project

__all__ = ["StructuredLinear", "project"]
