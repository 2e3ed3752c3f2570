"""Moments of an optimizer carried over from the factors of a layer to its dense weight.

An optimizer keeps moments of each factor; the dense weight ``W`` that takes their place needs ones of its own. They
follow from linearising the matrix in its factors ``F_i`` at the switch:

- Momentum is a velocity. When the factors move by ``dF_i``, the matrix moves by ``dW = sum_i (dW/dF_i) dF_i``; the
  first moment of ``W`` is the one with which its optimizer moves it by just that.
- Adam divides by a second moment. The gradient of a factor is ``(dW/dF_i)^T G``, so where the entries of ``G`` are
  uncorrelated with one second moment ``v`` for the layer, those of all factors sum to ``v |dW/dF|^2``. Hence ``v`` is
  their sum over that squared norm, which random ``G`` estimate. Pushing the second moments of the factors forward
  would not do: it gives them in units other than those of the gradients that follow, off by powers of the factors.
- The count of steps is kept, and with it the bias correction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import regroup
from .nn import StructuredLinear

State = dict[str, Tensor]
PROBES = 4  # random gradients that the norm of dW/dF is estimated from; one is within a few percent in a small layer


def stored(layer: StructuredLinear) -> dict[str, nn.Parameter]:
    """The parameters of a layer that its matrix follows from, by name."""
    return {name: parameter for name, parameter in layer.named_parameters() if name != "bias"}


def check(optimizer: Optimizer) -> None:
    """Whether `carried` has a rule for ``optimizer``.

    Raises:
        ValueError: for all but SGD, Adam and AdamW, for ``amsgrad``, and for complex parameters.
    """
    known = type(optimizer) in (SGD, Adam, AdamW)
    amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    is_complex = any(p.is_complex() for group in optimizer.param_groups for p in group["params"])
    if not known or amsgrad or is_complex:
        what = type(optimizer).__name__ + " with amsgrad" * amsgrad + " of complex parameters" * is_complex
        raise ValueError(
            f"moments='carry' has no rule for {what}; it has one for SGD, Adam and AdamW of real parameters, "
            "without amsgrad. Use moments='reset'"
        )


@torch.no_grad()
def carried(optimizer: Optimizer, layer: StructuredLinear, like: regroup.Group, lr: float) -> State:
    """The state with which the dense weight of ``layer`` moves on as its matrix does; empty if that has not moved yet.

    Args:
        optimizer: one that `check` accepts.
        layer: whose factors it holds.
        like: options of the dense weight, as betas and eps.
        lr: learning rate of the dense weight.
    """
    states: dict[str, dict[str, Any]] = {path: optimizer.state.get(p, {}) for path, p in stored(layer).items()}
    key = "momentum_buffer" if isinstance(optimizer, SGD) else "exp_avg"
    states = {path: state for path, state in states.items() if state.get(key) is not None}
    if not states:
        return {}
    dtype = states[next(iter(states))][key].dtype
    along = {}
    for path, state in states.items():
        group = regroup.find(optimizer, stored(layer)[path])
        assert group is not None
        rate = float(group["lr"])
        along[path] = _velocity(state, group) * (1.0 if rate == lr else rate / lr)
    velocity = _pushed(layer, along)
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": velocity.to(dtype)}
    latest = max(states.values(), key=lambda state: float(state["step"]))
    first, second = _corrections(latest, like)
    square = sum(state["exp_avg_sq"].double().sum() for state in states.values()) / _squared_norm(layer, list(states))
    scale = first * ((square / second).sqrt() + like["eps"])
    return {
        "step": latest["step"].clone(),
        "exp_avg": (velocity * scale).to(dtype),
        "exp_avg_sq": torch.full_like(velocity, square, dtype=dtype),
    }


def _corrections(state: State, group: regroup.Group) -> tuple[float, float]:
    first, second = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])
    return first, second


def _velocity(state: State, group: regroup.Group) -> Tensor:
    """The direction in which the optimizer moves a parameter without a new gradient, per unit of learning rate."""
    if "momentum_buffer" in state:
        return _wide(state["momentum_buffer"])
    first, second = _corrections(state, group)
    size: Tensor = (_wide(state["exp_avg_sq"]) / second).sqrt() + group["eps"]
    return _wide(state["exp_avg"]) / first / size


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _matrix(layer: StructuredLinear, varied: dict[str, Tensor]) -> Tensor:
    """(in_features, out_features): the transposed matrix of ``layer`` with the parameters ``varied``, without bias."""
    wide = {path: _wide(parameter.detach()) for path, parameter in layer.named_parameters()} | varied
    if layer.bias is not None:
        wide["bias"] = torch.zeros_like(wide["bias"])
    example = next(iter(wide.values()))
    eye = torch.eye(layer.in_features, dtype=example.dtype, device=example.device)
    with torch.autocast(example.device.type, enabled=False):
        matrix: Tensor = functional_call(layer, wide, (eye.reshape(*eye.shape, *(1,) * layer.spatial),))
    return matrix.flatten(1)


def _pushed(layer: StructuredLinear, along: dict[str, Tensor]) -> Tensor:
    """``sum_i (dW/dF_i) along_i``, (out_features, in_features)."""
    at = {path: _wide(stored(layer)[path].detach()) for path in along}
    moved: Tensor = jvp(lambda varied: _matrix(layer, varied), (at,), (along,))[1]
    return moved.T.contiguous()


def _squared_norm(layer: StructuredLinear, paths: list[str]) -> Tensor:
    """``sum_i |dW/dF_i|^2`` in the Frobenius norm: what gradients of variance 1 bring to the factors in all."""
    at = {path: _wide(stored(layer)[path].detach()) for path in paths}
    matrix, pull = vjp(lambda varied: _matrix(layer, varied), at)  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for _ in range(PROBES):
        gradient = torch.randn(matrix.shape, generator=generator, device="cpu").to(matrix)
        total += sum(g.double().square().sum() for g in pull(gradient)[0].values())
    return total.div(PROBES)
