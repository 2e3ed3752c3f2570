"""The inputs that the layers of a model see on real data, so that a projection keeps what matters for these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .nn.kinds import StructuredConv, kind_of


@torch.no_grad()
def record_inputs(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Run ``model`` in evaluation mode over ``batches`` and keep what the named layers are given.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> inputs = record_inputs(model, ["2"], [torch.randn(4, 8), torch.randn(3, 8)])
    >>> inputs["2"].shape
    torch.Size([7, 16])

    Args:
        model: any module; its training mode is restored.
        names: linear layers, as for `to_structured_`.
        batches: what ``model`` is called with, one call each: keyword arguments if a dict, positional ones if a tuple,
            else the one argument.

    Returns:
        Name -> inputs (tokens, in_features), in their dtype and on their device. All are kept: this takes tokens times
        the sum of the widths in memory.

    Raises:
        ValueError: for a name that is no linear layer, or that no batch reaches.
    """
    modules, names = dict(model.named_modules(remove_duplicate=False)), list(names)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    if unknown := [name for name in names if name not in modules or kind_of(modules[name]) is None]:
        raise ValueError(f"{', '.join(unknown)}: no linear layer of the model; give names as in the conversion table")

    def keep(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, kind = given_to(given, named), kind_of(module)
        if kind is not None and issubclass(kind, StructuredConv):
            x = x.movedim(-1 - kind.spatial, -1)
        found[name].append(x.reshape(-1, x.shape[-1]).clone())

    hooks = [
        modules[name].register_forward_pre_hook(
            lambda module, given, named, name=name: keep(name, module, given, named), with_kwargs=True
        )
        for name in names
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(*batch if isinstance(batch, tuple) else (batch,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if silent := [name for name, rows in found.items() if not rows]:
        raise ValueError(f"{', '.join(silent)}: no batch reaches it; give batches that do, or keep it by a None rule")
    return {name: torch.cat(rows) for name, rows in found.items()}


def given_to(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The input of a linear layer that was called with these arguments."""
    x: Tensor = positional[0] if positional else named["input"]
    return x
