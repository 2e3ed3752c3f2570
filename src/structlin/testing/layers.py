"""The layers that the contract is checked on, and what each of them has to equal."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import RoutedLinear, StructuredLinear, layer_of
from ..ops import backends_on, reference
from ..plan import Plan, Table, num_blocks
from ..spec import MIXTURES, STRUCTURES, Spec

Shape = tuple[int, int]
Layer = StructuredLinear | RoutedLinear
"""What a spec builds."""


def examples() -> list[tuple[Spec, Shape]]:
    """The example specs of every registered structure, each with a small (out_features, in_features)."""
    return [(spec, shape) for cls in STRUCTURES.values() for spec, shape in cls.examples()]


def mixture_examples() -> list[tuple[Spec, Shape]]:
    """The example specs of every mixture of experts, each with a small (out_features, in_features)."""
    return [(spec, shape) for cls in MIXTURES.values() for spec, shape in cls.examples()]


def padded_examples() -> list[tuple[Spec, Shape]]:
    """For every structure that does not have all widths an example with ``pad=True``, at a shape that needs it."""
    found: dict[str, tuple[Spec, Shape]] = {}
    for spec, (out_features, in_features) in examples():
        for i, j in ((1, 1), (0, 1), (1, 0)):
            padded, shape = replace(spec, pad=True), (out_features - i, in_features - j)
            if spec.name not in found and _is_padded(padded, shape):
                found[spec.name] = padded, shape
    return list(found.values())


def _is_padded(spec: Spec, shape: Shape) -> bool:
    try:
        return spec.plan(*shape).kept is not None
    except ValueError:
        return False


def make(spec: Spec, shape: Shape, device: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> Layer:
    """A seeded layer with a bias that is not zero, and for a mixture with a router that tells experts apart.

    On a GPU its backend is not "auto", which would measure.
    """
    torch.manual_seed(0)
    layer = layer_of(spec, shape[1], shape[0], bias, dtype=dtype).to(device)
    if isinstance(layer, StructuredLinear) and device != "cpu":
        layer.backend = "triton" if "triton" in backends_on(torch.device(device)) else "bmm"
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    if isinstance(layer, RoutedLinear):
        nn.init.normal_(layer.router.weight)
    return layer


def inputs(layer: Layer, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
    """Seeded random input of shape (*leading, in_features)."""
    factor = next(layer.parameters())
    torch.manual_seed(1)
    return torch.randn(*leading, layer.in_features, dtype=dtype or factor.dtype).to(factor.device)


def plain(layer: Layer, x: Tensor) -> Tensor:
    """The layer straight from its plan, by einsum: what it has to equal, with nothing of how it runs.

    For a mixture every expert is computed for every token, and multiplied by a gate that is zero where the token did
    not choose it.
    """
    tokens = x.reshape(-1, layer.in_features)
    if isinstance(layer, StructuredLinear):
        y = _by_plan(layer.plan, tokens, [getattr(layer, name) for name in layer.plan.factors])
    else:
        logits = F.linear(tokens, layer.router.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        kept, chosen = logits.topk(layer.spec.top_k, 1)
        gate = torch.zeros_like(logits).scatter(1, chosen, kept.softmax(1)).to(x.dtype)
        factors = [[getattr(layer, name)[e] for name in layer.plan.factors] for e in range(layer.spec.experts)]
        y = sum(gate[:, e, None] * _by_plan(layer.plan, tokens, own) for e, own in enumerate(factors))  # type: ignore[assignment]
    return (y if layer.bias is None else y + layer.bias).reshape(*x.shape[:-1], layer.out_features)


def _by_plan(plan: Plan, tokens: Tensor, factors: list[Tensor]) -> Tensor:
    tokens = F.pad(tokens, (0, plan.padded[1] - plan.in_features))
    total, remaining = tokens.new_zeros(()), iter(factors)
    for term in plan.terms:
        z = tokens if term.table is None else _looked_up(tokens, term.table)
        z = z.reshape(-1, *plan.shape(term.x))
        for step in term.steps:
            z = reference.contract(z, next(remaining), step.equation)
        z = z.reshape(-1, plan.size(term.y))
        total = total + (z if term.out_table is None else _added_up(z, term.out_table))
    return total[:, : plan.out_features]


def _looked_up(tokens: Tensor, table: Table) -> Tensor:
    blocks = tokens.chunk(num_blocks(table), -1)
    return torch.cat([blocks[block] for row in table for block in row], -1)


def _added_up(z: Tensor, table: Table) -> Tensor:
    parts = list(zip((block for row in table for block in row), z.chunk(sum(map(len, table)), -1), strict=True))
    return torch.cat([sum(part for of, part in parts if of == block) for block in range(num_blocks(table))], -1)  # type: ignore[misc]
