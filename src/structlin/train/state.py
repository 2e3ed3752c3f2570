"""A training run on disk: one safetensors file with weights and optimizer state, and the rest as JSON in its header,
the backends that were chosen included.

One file replaced in one step is always whole, whenever the process dies; two files could disagree. Batches are a
function of the step, so a run continues from here as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn, optim

from ..ops.choice import choices, restore_choices
from ..report import records


@dataclass
class State:
    """How far a run is: steps done, seconds spent in them, peak memory in bytes, and its curves so far."""

    step: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    series: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "seconds": [], "train_loss": [], "valid_loss": []}
    )


def save(path: Path, state: State, model: nn.Module, optimizer: optim.Optimizer, environment: dict[str, Any]) -> None:
    """Replace the file at ``path`` by this moment of a run.

    Raises:
        OSError: when it cannot be written; the file before it stays.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    header = {
        "state": json.dumps(dataclasses.asdict(state)),
        "environment": json.dumps(environment),
        "choices": json.dumps(choices()),
    }
    write(path, tensors | moments(optimizer), header)


def load(path: Path, model: nn.Module, optimizer: optim.Optimizer, environment: dict[str, Any]) -> State:
    """Put ``model`` and ``optimizer`` where `save` left them, and go on with the backends that ran then.

    Raises:
        ValueError: when the file is damaged, of another model, or of another environment (versions, device), which
            would round differently. Model and optimizer are unchanged then.
    """
    tensors, header = read(path)
    try:
        state = State(**json.loads(header["state"]))
        before, chosen = json.loads(header["environment"]), json.loads(header["choices"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if before != environment:
        changed = [name for name in {**before, **environment} if before.get(name) != environment.get(name)]
        raise ValueError(f"{path} was written with other {', '.join(changed)}")
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in model.state_dict().items()}:
        raise ValueError(f"{path} is of another model")
    try:
        restore_choices(chosen)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    model.load_state_dict(weights)
    put_moments(optimizer, tensors)
    return state


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Replace the file at ``path`` by these tensors and this header; OSError when it cannot be written."""
    records.write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file that `write` wrote; ValueError when it is damaged."""
    data = path.read_bytes()
    try:
        return safetensors.torch.load(data), _header(data)
    except (KeyError, TypeError, ValueError, struct.error, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def moments(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter of ``optimizer``, by ``optimizer.INDEX.NAME``."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def put_moments(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `moments` found, from among ``tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _header(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", data[:8])
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata
