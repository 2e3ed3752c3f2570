"""Nothing is timed before it is right: outputs and every gradient of a contender, against float64.

The yardstick of an error is what plain PyTorch loses on the same data in the same dtype: twice that, at most, as
everywhere in this project (`structlin.testing.assert_as_accurate`). The data are those that are timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import testing
from ..nn import StructuredLinear
from .contenders import FORWARD, MODES, Inputs, ModuleContender

Results = dict[str, Tensor]
"""``output``, ``gradient of the input`` and one gradient for each factor."""


@dataclass(frozen=True)
class Truth:
    """The results of a layer by plain PyTorch, in its own dtype and in float64."""

    plain: Results
    exact: Results


def truth(layer: StructuredLinear, inputs: Inputs) -> Truth:
    """What the layer has to compute on the first set of inputs."""
    x, dy = inputs[0]
    wide = StructuredLinear(
        layer.in_features, layer.out_features, layer.spec, bias=False, device=x.device, dtype=torch.float64
    )
    wide.load_state_dict(layer.state_dict())
    return Truth(_results(layer, x, dy), _results(wide, x.double(), dy.double()))


def check(contender: ModuleContender, truth: Truth, modes: tuple[str, ...] = MODES) -> float:
    """Hold a contender to the truth in every mode that will be timed; returns its largest relative error.

    Raises:
        AssertionError: naming the first result that is off, and by how much.
    """
    x = contender.inputs[0][0]
    if x.is_cuda:
        _poison(x.device, 4 * sum(result.nbytes for result in truth.plain.values()))
    worst = 0.0
    for mode in modes:
        last = contender.step(mode)(0)
        found = {"output": last} if mode == FORWARD else _gradients(contender)
        for name, result in found.items():
            try:
                testing.assert_as_accurate(result, truth.plain[name], truth.exact[name])
            except AssertionError as broken:
                raise AssertionError(f"{name} against float64: {broken}") from None
            worst = max(worst, testing.error(result, truth.exact[name]))
    contender.clear()
    return worst


def _gradients(contender: ModuleContender) -> Results:
    grads = {"gradient of the input": contender.inputs[0][0].grad}
    grads |= {f"gradient of {name}": parameter.grad for name, parameter in contender.parameters.items()}
    missing = [name for name, grad in grads.items() if grad is None]
    if missing:
        raise AssertionError(f"there is no {missing[0]}")
    return {name: grad for name, grad in grads.items() if grad is not None}


def _results(layer: StructuredLinear, x: Tensor, dy: Tensor) -> Results:
    x = x.detach().requires_grad_()
    y = testing.plain(layer, x)
    names, factors = zip(*layer.named_parameters(), strict=True)
    dx, *dw = torch.autograd.grad(y, (x, *factors), dy)
    gradients = {f"gradient of {name}": grad for name, grad in zip(names, dw, strict=True)}
    return {"output": y.detach(), "gradient of the input": dx, **gradients}


def _poison(device: torch.device, nbytes: int) -> None:
    """Leave NaN in the memory that the next tensors will get, so that an element nobody writes shows."""
    torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device)  # all bits set are a NaN in every float format
