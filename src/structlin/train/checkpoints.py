"""The checkpoints of a training run: one file a moment, the last two kept, and a damaged one passed over aloud.

A file holds weights, moments of the optimizer and, in its header, the rest as JSON. Batches and random numbers follow
from the step, so a run goes on from here to the same bits. One file replaced in one step is always whole, whenever
the process dies; a sum over its bytes finds what a bad disk does later.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import state
from .engine import Engine

KEPT = 2
FOLDER, SUFFIX = "checkpoints", ".safetensors"
SERIES = ("step", "seconds", "train_loss", "valid_step", "valid_seconds", "valid_loss")


@dataclass
class Progress:
    """How far a run is: updates done, seconds spent in them, most bytes of memory, and its curves."""

    step: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    series: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SERIES})


def save(folder: Path, progress: Progress, engine: Engine) -> None:
    """Add the checkpoint of this moment below ``folder``, then remove all but the last two.

    Raises:
        OSError: when it cannot be written; those before it stay.
    """
    tensors = weights(engine.model) | state.moments(engine.optimizer)
    about = {
        "progress": dataclasses.asdict(progress),
        "densified": engine.densified,
        "guide": engine.guide.state_dict() if engine.guide else None,
        "checksum": checksum(tensors),
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    state.write(folder / FOLDER / f"{progress.step:09d}{SUFFIX}", tensors, {"run": json.dumps(about)})
    for old in found(folder)[KEPT:]:
        old.unlink()


def found(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, the last one first."""
    return sorted((folder / FOLDER).glob(f"*{SUFFIX}"), reverse=True)


def resume(folder: Path, engine: Engine, say: Callable[[str], None]) -> Progress:
    """Put ``engine`` where its last whole checkpoint left it; a fresh progress where there is none.

    ``say`` is told of each checkpoint that is passed over.
    """
    notes = []
    for path in found(folder):
        try:
            tensors, about = _read(path)
        except ValueError as error:
            notes.append(str(error))
            continue
        for note in notes:
            say(f"{note}; going on from {path.name}")
        if about["densified"]:
            engine.densify()
        if engine.guide:
            engine.guide.load_state_dict(about["guide"], engine.optimizer)
        put_weights(engine.model, {n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        state.put_moments(engine.optimizer, tensors)
        return Progress(**about["progress"])
    for note in notes:
        say(f"{note}; starting anew")
    return Progress()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, prefixed with "model."; those that several names share once."""
    known: set[int] = set()
    named = model.state_dict(keep_vars=True).items()
    return {f"model.{n}": t.detach() for n, t in named if not (id(t) in known or known.add(id(t)))}  # type: ignore[func-returns-value]


@torch.no_grad()
def put_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into the parameters and buffers of ``model``, which has exactly these."""
    own = {name[6:]: tensor for name, tensor in weights(model).items()}
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in tensors.items()}, "another model"
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors, in the order of their names."""
    total = 0
    for _, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(data.tobytes(), total)
    return total


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = state.read(path)
    try:
        about: dict[str, Any] = json.loads(header["run"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if checksum(tensors) != about["checksum"]:
        raise ValueError(f"{path} is damaged (its checksum does not hold)")
    return tensors, about
