"""The operator that runs every structure, and its plain-PyTorch reference."""

from .chain import compose, multiply
from .contract import STEP_BACKENDS, contract

BACKENDS = ("auto", "dense", *STEP_BACKENDS)
"""What can run a layer: `auto` chooses, `dense` multiplies the factors into one weight, the others run each step."""

__all__ = ["BACKENDS", "STEP_BACKENDS", "compose", "contract", "multiply"]
