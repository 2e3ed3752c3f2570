"""Which layer makes a number that is not finite: one step done again, layer by layer, with the weights that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def blame(model: nn.Module, loss: Loss, pieces: Iterable[Tensor]) -> str:
    """Where the first number that is not finite arises, in words that name the layer.

    Args:
        model: with the weights from before the failed update.
        loss: of ``model``, without compilation.
        pieces: what each pass of that update read.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights of {name} are not finite"
    for piece in pieces:
        if found := _watched(model, lambda piece=piece: loss(piece)):  # type: ignore[misc]
            return found
    return "no layer alone: its gradients overflow only when the passes of the update are summed"


def _watched(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The first layer whose output, or else whose gradient, is not finite in one pass forward and backward."""
    found: list[str] = []
    named = model.named_modules()
    leaves = {module: name for name, module in named if next(module.parameters(False), None) is not None}

    def forward(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not found and not output.isfinite().all():
            found.append(f"the output of {leaves[module]}")
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            output.register_hook(lambda gradient, name=leaves[module]: backward(gradient, name))

    def backward(gradient: Tensor, name: str) -> None:
        if not found and not gradient.isfinite().all():
            found.append(f"the gradient at the output of {name}")

    handles = [module.register_forward_hook(forward) for module in leaves]
    try:
        loss = run()
        if not found and not loss.isfinite():
            return "the loss, from finite outputs of all layers"
        if not found:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    bad = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
    name = found[0] if found else next((f"the gradient of {name}" for name in bad), None)
    model.zero_grad()
    return name
