"""Structured linear layers for PyTorch that make their saved FLOPs pay."""

from . import analysis, shrinkage, spec, structures, testing
from .checkpoint import load, save
from .nn import StructuredLinear, explain, project
from .optim import param_groups
from .plan import Plan
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
    "explain",
    "load",
    "param_groups",
    "project",
    "register",
    "save",
    "shrinkage",
    "spec",
    "testing",
    "to_dense_",
    "to_structured_",
    *structures.__all__,
]
