"""Structured linear layers for PyTorch that make their saved FLOPs pay."""

from . import analysis, shrinkage, spec, structures, testing
from .checkpoint import load, save
from .densify import densify_
from .guide import guide_
from .nn import StructuredLinear, explain, normalise_, project, tune
from .ops.choice import choices, restore_choices
from .optim import param_groups
from .plan import Plan
from .sparsity import magnitude_mask, sparsify
from .spec import STRUCTURES, Spec, register
from .structures import *  # noqa: F403, each structure is named once, there
from .surgery import to_dense_, to_structured_
from .version import __version__

__all__ = [
    "STRUCTURES",
    "Plan",
    "Spec",
    "StructuredLinear",
    "__version__",
    "analysis",
    "choices",
    "densify_",
    "explain",
    "guide_",
    "load",
    "magnitude_mask",
    "normalise_",
    "param_groups",
    "project",
    "register",
    "restore_choices",
    "save",
    "shrinkage",
    "sparsify",
    "spec",
    "testing",
    "to_dense_",
    "to_structured_",
    "tune",
    *structures.__all__,
]
