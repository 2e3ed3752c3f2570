"""The layer, its initialisation, and the projection of dense weights onto it."""

from .explain import explain
from .gated import GatedSum
from .linear import StructuredLinear
from .normalised import normalise_
from .projection import project
from .shared_bases import recover
from .tuning import tune

__all__ = ["GatedSum", "StructuredLinear", "explain", "normalise_", "project", "recover", "tune"]
