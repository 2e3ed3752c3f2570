"""Structure-aware learning rates: every factor at the rate that its fan-in asks for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from . import analysis
from .nn import StructuredLinear


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for Adam or AdamW in which ``lr`` means the same for dense and structured layers.

    A factor gets ``lr * in_features / fan_in / number of factors`` (Qiu et al. 2024); everything else gets ``lr``.
    Weight decay applies to parameters of two or more dimensions. Frozen parameters are left out, shared ones
    occur once.

    Args:
        model: any module.
        lr: learning rate of a dense layer.
        weight_decay: of matrices.

    Returns:
        A list of dictionaries with the keys "params", "lr" and "weight_decay", as every torch optimizer takes it.

    Raises:
        ValueError: for a negative ``lr`` or ``weight_decay``, or a model without trainable parameters.
    """
    if lr < 0 or weight_decay < 0:
        raise ValueError(f"lr={lr} and weight_decay={weight_decay} must not be negative")
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            groups[lr * _scale(module, name), weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _scale(module: nn.Module, name: str) -> float:
    if isinstance(module, StructuredLinear) and name in module.plan.factors:
        return analysis.lr_scale(module.plan, name)
    return 1.0
