"""How the factors of a layer are drawn. Each way is a rule from the plan to a scale per factor, so that a structure
needs none of its own; where a paper has one, it is data on the spec (`Spec.reference_init`)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .. import analysis
from ..plan import Plan
from ..spec import Spec

Draw = tuple[str, float]
"""A distribution and its scale: ("normal", standard deviation), ("uniform", bound), ("orthogonal", singular value)."""

ZERO: Draw = ("normal", 0.0)


def draws(spec: Spec, plan: Plan, init: str = "spectral") -> dict[str, Draw]:
    """What every factor, and the bias where it is not zero, is drawn from under the rule ``init``.

    Args:
        spec: the structure.
        plan: its matrix.
        init: one of `INITS`.

    Raises:
        ValueError: for an unknown rule.
    """
    return INITS[check(init)](spec, plan)


def check(init: str) -> str:
    """``init`` itself.

    Raises:
        ValueError: unless it is one of `INITS`.
    """
    if init not in INITS:
        near = difflib.get_close_matches(str(init), INITS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"init={init!r} is unknown; {hint}allowed: {', '.join(INITS)}")
    return init


def _spectral(spec: Spec, plan: Plan) -> dict[str, Draw]:
    return {name: ("normal", analysis.init_std(plan, name)) for name in plan.factors}


def _variance_matched(spec: Spec, plan: Plan) -> dict[str, Draw]:
    scales: dict[str, Draw] = {}
    for term in plan.terms:
        stds = {name: analysis.init_std(plan, name) for name in term.names}
        # an output sums over all contracted axes products of independent weights, so variances multiply
        variance = prod(std**2 * analysis.fan(plan, name)[0] for name, std in stds.items())
        scale = (1 / (3 * len(plan.terms) * variance)) ** (0.5 / len(stds))
        scales |= {name: ("normal", scale * std) for name, std in stds.items()}
    return scales


def _reference(spec: Spec, plan: Plan) -> dict[str, Draw]:
    return _spectral(spec, plan) | spec.reference_init(plan)


def _orthogonal(spec: Spec, plan: Plan) -> dict[str, Draw]:
    fans = {name: analysis.fan(plan, name) for name in plan.factors}
    return {name: ("orthogonal", (out / into / len(plan.terms)) ** 0.5) for name, (into, out) in fans.items()}


INITS: dict[str, Callable[[Spec, Plan], dict[str, Draw]]] = {
    "spectral": _spectral,
    "variance_matched": _variance_matched,
    "reference": _reference,
    "orthogonal": _orthogonal,
}
"""The rules by name; docs/initialisation.md says what each is for."""


@torch.no_grad()
def fill_(tensor: Tensor, draw: Draw, plan: Plan, name: str) -> Tensor:
    """Draw ``tensor``, the factor ``name`` of ``plan`` or its bias, in place; the same tensor.

    Any float or complex dtype and any device; on the meta device nothing happens. Complex weights have the mean
    square of real ones.
    """
    distribution, scale = draw
    if tensor.is_meta:
        return tensor
    if scale == 0:
        return tensor.zero_()  # nothing is drawn, so the random state stays as it is
    if distribution == "normal":
        return tensor.normal_(std=scale)
    if distribution == "uniform":
        if tensor.is_complex():
            torch.view_as_real(tensor).uniform_(-scale / 2**0.5, scale / 2**0.5)
            return tensor
        return tensor.uniform_(-scale, scale)
    assert distribution == "orthogonal", distribution
    return tensor.copy_(scale * _orthonormal(tensor, plan, name))


def _orthonormal(factor: Tensor, plan: Plan, name: str) -> Tensor:
    """Random blocks (fan-out, fan-in), one for each value of the group axes, with orthonormal rows or columns."""
    step = plan.factors[name][1]
    axes = (*step.group, *step.out, *step.contract)
    fan_in, fan_out = analysis.fan(plan, name)
    # half precision has no QR
    dtype = torch.promote_types(factor.dtype, torch.float32)
    tall = (plan.size(step.group), max(fan_in, fan_out), min(fan_in, fan_out))
    q, r = torch.linalg.qr(torch.randn(tall, dtype=dtype, device=factor.device))
    # without the phases of the diagonal q would not be uniform over all orthonormal matrices
    q = q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    blocks: Tensor = q if fan_out >= fan_in else q.mT
    return blocks.reshape(plan.shape(axes)).permute([axes.index(axis) for axis in step.w])
