"""Everything that fixes the numbers of a comparison, as one frozen value that is checked before anything is written.

A preset is a model, a budget of steps and a learning rate that were measured to fit two CPU cores; options change the
rest. Two runs with equal configs see the same weights, batches and learning rates.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..models.gpt import GPT, GPTConfig
from ..spec import Spec, parse
from .data import Text

WHERE = {"mlp": "blocks.*.mlp.*", "all": "blocks.*"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OptionError(ValueError):
    """A bad value of an option; ``option`` is its name as on the command line."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


@dataclass(frozen=True)
class Preset:
    """A model and a budget. ``batch_size`` and ``valid_windows`` count windows of ``model.context + 1`` bytes."""

    model: GPTConfig
    steps: int
    batch_size: int
    valid_windows: int
    lr: float
    structures: tuple[str, ...]


PRESETS = {
    "smoke": Preset(
        model=GPTConfig(context=64, width=64, depth=2, heads=4),
        steps=30,
        batch_size=16,
        valid_windows=32,
        lr=1e-2,
        structures=("dense", "low_rank:rank=16", "block_diagonal:nblocks=4", "kronecker", "monarch:nblocks=4",
                    "dyad:nblocks=8", "btt:rank=2"),
    ),
    "small": Preset(
        model=GPTConfig(context=64, width=128, depth=2, heads=4),
        steps=120,
        batch_size=16,
        valid_windows=128,
        lr=6e-3,
        structures=("dense", "low_rank:rank=32", "block_diagonal:nblocks=4", "kronecker", "monarch:nblocks=4",
                    "dyad:nblocks=8", "btt:rank=2"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One comparison. ``structures`` are specs as `parse` reads them, ``data`` is what `Text.describe` says."""

    preset: str
    structures: tuple[str, ...]
    where: str
    steps: int
    seed: int
    lr: float
    device: str
    dtype: str
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Every value, those of the preset included; JSON-ready."""
        preset = PRESETS[self.preset]
        return {
            **dataclasses.asdict(self),
            "structures": list(self.structures),
            "model": dataclasses.asdict(preset.model),
            "batch_size": preset.batch_size,
            "valid_windows": preset.valid_windows,
        }


def configure(
    text: Text,
    structures: str | None = None,
    where: str = "mlp",
    preset: str = "small",
    steps: int | None = None,
    seed: int = 0,
    lr: float | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> Config:
    """A checked config; None takes the preset's value, and for ``device`` a GPU if there is one.

    Raises:
        OptionError: naming the option, what was given and what is allowed.
    """
    chosen = PRESETS[among("--preset", preset, PRESETS)]
    names = tuple(str(spec) for spec in _parse_structures(structures, chosen))
    _check_where(where, names, chosen)
    steps = chosen.steps if steps is None else steps
    if steps < 1:
        raise OptionError("--steps", f"{steps} is given; allowed: 1 or more")
    if not 0 <= seed < 2**63:
        raise OptionError("--seed", f"{seed} is given; allowed: 0 to 2**63 - 1")
    lr = chosen.lr if lr is None else lr
    if not (lr > 0 and math.isfinite(lr)):
        raise OptionError("--lr", f"{lr} is given; allowed: positive numbers")
    least = chosen.model.context + 1
    for part, data in (("training", text.train), ("validation", text.valid)):
        if len(data) < least:
            message = f"leaves {len(data)} bytes of {part} text (a tenth is held out); at least {least} are needed"
            raise OptionError("--data", f"{', '.join(text.sources)} {message}")
    return Config(
        preset=preset,
        structures=names,
        where=where,
        steps=steps,
        seed=seed,
        lr=lr,
        device=device_of(device),
        dtype=among("--dtype", dtype, DTYPES),
        data=text.describe(),
    )


def rules(where: str, structure: str) -> dict[str, Spec | None]:
    """What `to_structured_` is given for ``structure`` at ``where``."""
    return {WHERE.get(where, where): parse(structure)}


def _parse_structures(given: str | None, preset: Preset) -> Sequence[Spec]:
    specs: list[Spec] = []
    for text in preset.structures if given is None else given.split(","):
        try:
            spec = parse(text)
        except ValueError as error:
            raise OptionError("--structures", str(error)) from None
        if spec in specs:
            raise OptionError("--structures", f"{str(spec)!r} is given twice")
        specs.append(spec)
    return specs


def _check_where(where: str, structures: Sequence[str], preset: Preset) -> None:
    linears = {name: module for name, module in GPT(preset.model).named_modules() if isinstance(module, nn.Linear)}
    chosen = [module for name, module in linears.items() if fnmatchcase(name, WHERE.get(where, where))]
    if not chosen:
        near = difflib.get_close_matches(where, WHERE, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        allowed = f"allowed: {', '.join(WHERE)}, or a glob over {', '.join(linears)}"
        raise OptionError("--where", f"{where!r} matches no layer; {hint}{allowed}")
    for structure in structures:
        for shape in dict.fromkeys((layer.out_features, layer.in_features) for layer in chosen):
            try:
                parse(structure).plan(*shape)
            except ValueError as error:
                raise OptionError("--structures", f"{structure}: {error}") from None


def among(option: str, given: str, allowed: Any) -> str:
    """``given``, which must be one of ``allowed``; else an OptionError that names ``option`` and the nearest choice."""
    if given not in allowed:
        near = difflib.get_close_matches(given, allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(option, f"{given!r} is unknown; {hint}allowed: {', '.join(allowed)}")
    return given


def device_of(given: str | None) -> str:
    """A device that is there: ``given``, or without one a GPU if there is one, else the CPU; else an OptionError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if given is None:
        return "cuda" if count else "cpu"
    return among("--device", given, allowed)
