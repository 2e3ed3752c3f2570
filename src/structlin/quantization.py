"""Weights in 8 bits: the factors of structured layers stored as int8 or float8, and computed with as they were.

Quantization packages, as torchao, replace the ``weight`` of an ``nn.Linear``; a structured layer has none and is passed
over by them. So both are used side by side: theirs for the dense layers of a model, this for the structured ones. It
saves memory, not time: a factor is turned back into its dtype each time that it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .nn import StructuredLinear

DTYPES = (torch.int8, torch.float8_e4m3fn)


class LowBit(nn.Module):
    """A factor as numbers of 8 bits times a scale for each row, the entries that are summed over being a row."""

    def __init__(self, dtype: torch.dtype, contracted: int) -> None:
        super().__init__()
        self.dtype, self.contracted = dtype, contracted

    def forward(self, values: Tensor, scales: Tensor) -> Tensor:
        """The factor in the dtype of ``scales``."""
        return values.to(scales.dtype) * scales

    def right_inverse(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales of ``factor``; the largest entry of every row is exact up to rounding of the scale."""
        rows = factor.float().abs().amax(tuple(range(-self.contracted, 0)), keepdim=True)
        largest = float(torch.iinfo(torch.int8).max if self.dtype == torch.int8 else torch.finfo(self.dtype).max)
        kept = torch.finfo(factor.dtype)
        scales = (rows / largest).clamp(min=kept.tiny * kept.eps).to(factor.dtype)  # the least subnormal number
        values = (factor.float() / scales.float()).clamp(-largest, largest)
        return (values.round() if self.dtype == torch.int8 else values).to(self.dtype), scales


@torch.no_grad()
def quantize_factors_(model: nn.Module, dtype: torch.dtype = torch.int8) -> list[str]:
    """Store the factors of every `StructuredLinear` of ``model`` in 8 bits, in place, for inference.

    Each row of a factor, the entries that its step sums over, gets a scale of its own: int8 from -127 to 127, float8 as
    ``torch.float8_e4m3fn``. Biases, dense layers and structures that are one dense weight stay as they are. Factors are
    frozen. Quantize after loading: a quantized model can be saved as a ``state_dict``, but not by `structlin.save`.

    >>> model = nn.Sequential(StructuredLinear(64, 64, Monarch(nblocks=4)), nn.Linear(64, 8))
    >>> quantize_factors_(model)
    ['0']

    Returns:
        The names of the layers.

    Raises:
        ValueError: one message for another dtype, a model without structured layers, and factors that are normalised,
            masked, quantized already, or complex. The model is unchanged then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is given; allowed: {', '.join(map(str, DTYPES))}")
    found = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear) and not m.plan.is_dense}
    if not found:
        raise ValueError("there is no structured layer to quantize; see structlin.to_structured_")
    problems = []
    for name, layer in found.items():
        if parametrize.is_parametrized(layer):
            problems.append(f"{name}: its factors are normalised, masked or quantized, and cannot be stored otherwise")
        elif any(p.is_complex() for p in layer.parameters()):
            problems.append(f"{name}: is complex, for which there are no 8 bits")
    if problems:
        raise ValueError("cannot quantize the model:\n  " + "\n  ".join(problems))
    for layer in found.values():
        layer.requires_grad_(False)
        for factor, (_, step) in layer.plan.factors.items():
            parametrize.register_parametrization(layer, factor, LowBit(dtype, len(step.contract)), unsafe=True)
        layer.train(layer.training)  # forgets a dense weight that was kept
    return list(found)
