"""The operator that runs every structure, and its plain-PyTorch reference."""

import torch

from .chain import compose, multiply
from .contract import STEP_BACKENDS, contract
from .equation import constant_when_traced
from .moves import has_triton

BACKENDS = ("auto", "dense", *STEP_BACKENDS, "joined")
"""What can run a layer: `auto` chooses, `dense` multiplies the factors into one weight, the others run each step,
`triton` by kernels of ours where they fit and as `bmm` elsewhere, `joined` a sum as one product where that is possible,
and everything else as `triton` or, on a CPU, as `bmm`."""


@constant_when_traced
def backends_on(device: torch.device) -> tuple[str, ...]:
    """Those of `BACKENDS` that run on ``device``: `triton` needs Triton and a GPU."""
    kernels = device.type == "meta" or (device.type == "cuda" and has_triton())
    return BACKENDS if kernels else tuple(name for name in BACKENDS if name != "triton")


__all__ = ["BACKENDS", "STEP_BACKENDS", "backends_on", "compose", "contract", "multiply"]
