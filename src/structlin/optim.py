"""Structure-aware learning rates: every factor at the rate that its fan-in asks for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from . import analysis
from .nn import StructuredLinear


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for Adam or AdamW in which ``lr`` means the same for dense and structured layers.

    A factor gets ``lr * in_features / fan_in / number of factors`` (Qiu et al. 2024), and so does what a
    parametrization stores of it; everything else, as the gain of a normalised factor, gets ``lr``. Weight decay applies
    to parameters of two or more dimensions. Frozen parameters are left out, shared ones occur once.

    Args:
        model: any module.
        lr: learning rate of a dense layer.
        weight_decay: of matrices.

    Returns:
        A list of dictionaries with the keys "params", "lr" and "weight_decay", as every torch optimizer takes it.

    Raises:
        ValueError: for an ``lr`` or ``weight_decay`` that is negative or not finite, or a model without trainable
            parameters.
    """
    if not (0 <= lr < float("inf") and 0 <= weight_decay < float("inf")):
        raise ValueError(f"lr={lr} and weight_decay={weight_decay} must be finite and not negative")
    scales = _scales(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups[lr * scales.get(parameter, 1.0), decay].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _scales(model: nn.Module) -> dict[nn.Parameter, float]:
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            for path, parameter in module.named_parameters():
                name, _, part = path.removeprefix("parametrizations.").partition(".")
                if name in module.plan.factors and (not part or part.startswith("original")):
                    scales.setdefault(parameter, analysis.lr_scale(module.plan, name))
    return scales
