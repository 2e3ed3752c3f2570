"""What the linear layers of any model cost, structured ones by their plan: the one count that every report uses."""

from __future__ import annotations

from torch import nn

from .. import analysis
from ..nn import MoEFFN, RoutedLinear, StructuredLinear


def linear_flops(model: nn.Module) -> int:
    """Forward FLOPs per token of all linear layers, a multiply-add counted as two; of mixtures what a token visits,
    of guides nothing."""
    flops = 0
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            flops += analysis.flops(module.plan)
        elif isinstance(module, RoutedLinear):
            flops += module.spec.costs(module.out_features, module.in_features)[1]
        elif isinstance(module, MoEFFN):
            flops += module.flops()
        elif isinstance(module, nn.Linear):
            flops += 2 * module.in_features * module.out_features
    return flops
