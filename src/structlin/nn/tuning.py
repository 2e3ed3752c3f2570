"""Choose backends ahead of time, so that no first step stops to measure and all processes run the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..ops import choice
from ..ops.choice import Choice, Key
from .explain import layer_key
from .linear import StructuredLinear


@dataclass(frozen=True)
class Tuned:
    """What was chosen for layers of one kind: the first one's name, tokens as a power of two, in training or not."""

    layer: str
    dtype: torch.dtype
    tokens: int
    training: bool
    choice: Choice


class Tuning(list[Tuned]):
    """All that was chosen, one for each kind of layer; prints as a table of milliseconds, from Python / in a graph."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "tokens", "dtype", "for", *choice.CANDIDATES, "from Python", "in a graph", "why")
        ]
        for row in self:
            numbers, dtype = row.choice.numbers, str(row.dtype).removeprefix("torch.")
            cells = (
                " / ".join(
                    f"{numbers[launch][name]:.3f}" for launch in ("eager", "graph") if name in numbers.get(launch, {})
                )
                for name in choice.CANDIDATES
            )
            mode = "training" if row.training else "inference"
            end = row.choice.eager, row.choice.graph, row.choice.why
            rows.append((row.layer, str(row.tokens), dtype, mode, *(cell or "-" for cell in cells), *end))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def tune(
    model: nn.Module | Iterable[StructuredLinear],
    tokens: int | Sequence[int],
    training: bool = True,
    dtype: torch.dtype | None = None,
) -> Tuning:
    """Choose the backend that "auto" runs in every structured layer, by measuring what is not known yet.

    On any device, a CPU included, and kept in memory and on disk. The layers themselves are not run and not changed.
    Among several processes of torch.distributed all have to call it, with the same model: the first one measures, and
    all run what it chose.

    Args:
        model: a model, or its layers.
        tokens: rows of the inputs, the product of all leading dimensions; one number or several.
        training: choose for forward and backward, or for inference.
        dtype: of the products, where that is not the layers' own, as under torch.autocast.

    Raises:
        ValueError: for fewer than one token, a model without structured layers, or layers on the meta device.
    """
    counts = [tokens] if isinstance(tokens, int) else list(tokens)
    if not counts or min(counts) < 1:
        raise ValueError(f"tokens={tokens!r} is given; allowed: positive whole numbers")
    keys: dict[Key, str] = {}
    for name, layer in _layers(model):
        if layer.plan.is_dense:
            continue
        for count in counts:
            key = layer_key(layer, count, training)
            keys.setdefault(key if dtype is None else key._replace(dtype=dtype), name)
    if any(key.device.type == "meta" for key in keys):
        raise ValueError("layers on the meta device cannot be measured; move the model to where it will run first")
    found = _agreed(list(keys)) if choice.distributed() else {key: choice.settle(key) for key in keys}
    return Tuning(Tuned(name, key.dtype, key.tokens, training, found[key]) for key, name in keys.items())


def _layers(model: nn.Module | Iterable[StructuredLinear]) -> list[tuple[str, StructuredLinear]]:
    if isinstance(model, StructuredLinear):
        return [(f"{model.spec}@{model.out_features}x{model.in_features}", model)]
    if isinstance(model, nn.Module):
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, StructuredLinear)]
    else:
        found = [entry for layer in model for entry in _layers(layer)]
    if not found:
        raise ValueError("there is no structured layer to tune; see structlin.to_structured_")
    return found


def _agreed(keys: list[Key]) -> dict[Key, Choice]:
    """What the first process chooses for these keys, in all processes."""
    told: list[list[Choice] | str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            told = [[choice.settle(key) for key in keys]]
        except Exception as error:  # the others wait for word
            told = [f"{type(error).__name__}: {error}"]
    torch.distributed.broadcast_object_list(told, src=0)
    heard = told[0]
    if not isinstance(heard, list):
        raise RuntimeError(f"process 0 could not choose backends: {heard}")
    if len(heard) != len(keys):
        raise ValueError(
            f"process 0 has {len(heard)} kinds of layers, this one {len(keys)}; tune the same model in all"
        )
    found = dict(zip(keys, heard, strict=True))
    choice.install(found)
    return found
