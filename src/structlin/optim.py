"""Structure-aware learning rates: every factor at the rate that its fan-in asks for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from . import analysis
from .nn import StructuredLinear
from .nn.boxcar import masks_of


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, structure_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for Adam or AdamW in which ``lr`` means the same for dense and structured layers.

    A factor gets ``lr * in_features / fan_in / number of factors`` (Qiu et al. 2024), and so do the parameters of its
    parametrization if it has one, but for the widths and locations of a trained mask; everything else gets ``lr``.
    Weight decay applies to parameters of two or more dimensions. Frozen parameters are left out, shared ones occur
    once.

    Args:
        model: any module.
        lr: learning rate of a dense layer.
        weight_decay: of matrices.
        structure_lr: learning rate of the widths and locations of trained masks; ``lr`` unless given.

    Returns:
        A list of dictionaries with the keys "params", "lr" and "weight_decay", as every torch optimizer takes it.

    Raises:
        ValueError: for an ``lr``, ``weight_decay`` or ``structure_lr`` that is negative or not finite, or a model
            without trainable parameters.
    """
    if not (0 <= lr < float("inf") and 0 <= weight_decay < float("inf")):
        raise ValueError(f"lr={lr} and weight_decay={weight_decay} must be finite and not negative")
    if structure_lr is not None and not 0 <= structure_lr < float("inf"):
        raise ValueError(f"structure_lr={structure_lr} must be finite and not negative")
    scales = _scales(model)
    structural = {parameter for mask in masks_of(model) for parameter in mask.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            rate = lr * scales.get(parameter, 1.0)
            if parameter in structural:
                rate = lr if structure_lr is None else structure_lr
            groups[rate, decay].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _scales(model: nn.Module) -> dict[nn.Parameter, float]:
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            for path, parameter in module.named_parameters():
                name = path.removeprefix("parametrizations.").split(".")[0]
                if name in module.plan.factors:
                    scales.setdefault(parameter, analysis.lr_scale(module.plan, name))
    return scales
