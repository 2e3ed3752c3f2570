"""What every training run has in common, as a frozen value: all numbers that fix what comes out, checked as a whole.

Recipes add the fields of their models and data. Each field is an option of ``structlin train``, and all of them are
saved with the run. Two runs with equal fields, data and versions see the same weights, batches and learning rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from .config import OptionError

Compile = Literal["none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

ELSEWHERE = ("device", "cache", "trackers", "log_every")
"""Fields that do not change what comes out of a run; a run may go on with others."""


def setting(default: Any, text: str) -> Any:
    """A field with a default and what ``--help`` says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training run has. Batches are in examples.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    TITLE: ClassVar[str] = "every recipe"
    packages: ClassVar[tuple[str, ...]] = ()  # that its run needs, besides those of structlin

    name: str = setting("", "what the run is called in its record")

    structure: str = setting(
        "dense", "structure of the chosen layers, as dyad:nblocks=4; dense keeps the model as it is"
    )
    layers: str = setting("all", "layers that get it: mlp, all, or globs over names, with spaces between")
    init: str = setting("spectral", "how factors are drawn")

    data: tuple[str, ...] = setting((), "what to train on: files and folders")

    steps: int = setting(1000, "updates")
    batch: int = setting(64, "examples of an update, over all devices")
    lr: float = setting(1e-3, "peak learning rate of a dense layer, from which those of factors follow")
    warmup: float = setting(0.05, "share of the steps in which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "how the rate falls afterwards")
    final_lr: float = setting(0.0, "share of the peak that it falls to")
    weight_decay: float = setting(0.1, "of matrices")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.95, "of AdamW")
    eps: float = setting(1e-8, "of AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(0, "of weights and order of the data")

    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "of the matrix products; weights stay float32")
    compile: Compile = setting("default", "mode of torch.compile, or none")  # noqa: RUF009, it is a field
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    log_every: int = setting(20, "steps between two lines of progress; losses are read back only then")
    valid_every: int = setting(250, "steps between two validations")
    checkpoint_every: int = setting(250, "steps between two checkpoints")

    def __post_init__(self) -> None:
        if problems := [*_ranges(self), *self.problems()]:
            raise OptionError(problems[0][0], "; ".join([problems[0][1], *(f"{n}: {m}" for n, m in problems[1:])]))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Option and message of all that is wrong with the fields together; each alone is checked already."""
        yield from ()

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Least and largest value of a number, and how to say so."""
        if name in ("seed", "weight_decay"):
            return 0, 2**63 - 1, "0 or more"
        if name in ("warmup", "final_lr", "beta1", "beta2"):
            return 0, 1 - 1e-9, "0 to below 1"
        if name in ("lr", "eps", "clip"):
            return 1e-300, 1e300, "positive numbers"
        return 1, 2**31, "1 or more"

    def to_dict(self) -> dict[str, Any]:
        """Every field; JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**fields)

    def due(self, name: str, done: int) -> bool:
        """Whether what ``NAME_every`` counts is to be done after ``done`` updates; always after the last one."""
        return bool(done % getattr(self, f"{name}_every") == 0) or done == self.steps

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``, counted from 0: a linear rise, then the schedule."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        part = (step - rise) / max(1, self.steps - rise)
        fall = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}[self.schedule]
        return self.final_lr + (1 - self.final_lr) * fall


def kinds(cls: type[Settings]) -> dict[str, Any]:
    """Name -> type of every field of a recipe's class."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def option(name: str) -> str:
    """A field as it is written on the command line: ``valid_every`` is ``--valid-every``."""
    return "--" + name.replace("_", "-")


Given = TypeVar("Given", bound=Settings)


def override(recipe: Given, texts: Mapping[str, Any]) -> Given:
    """``recipe`` with fields from the command line, each a text or a list of texts.

    Raises:
        OptionError: one message with every field that it does not have, is not of its type, or does not fit.
    """
    known = kinds(type(recipe))
    values: dict[str, Any] = {}
    problems = []
    for name, text in texts.items():
        if name not in known:
            problems.append((option(name), f"{recipe.name} has no such field; it has {', '.join(map(option, known))}"))
            continue
        kind = known[name]
        texts_of = text if isinstance(text, list | tuple) else [text]
        try:
            if get_origin(kind) is tuple:
                values[name] = tuple(_parse(get_args(kind)[0], part) for part in texts_of)
            elif len(texts_of) == 1:
                values[name] = _parse(kind, texts_of[0])
            else:
                problems.append((option(name), f"{len(texts_of)} values are given; allowed: one"))
        except ValueError:
            problems.append((option(name), f"{text!r} is given; allowed: {_described(kind)}"))
    if problems:
        raise OptionError(problems[0][0], "; ".join([problems[0][1], *(f"{n}: {m}" for n, m in problems[1:])]))
    return dataclasses.replace(recipe, **values)


def _parse(kind: Any, text: str) -> Any:
    options = get_args(kind)
    if NoneType in options:
        return None if text.lower() == "none" else _parse(next(o for o in options if o is not NoneType), text)
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else float("no bool")
    return kind(text) if kind in (int, float) else text  # choices are checked with the recipe as a whole


def _described(kind: Any) -> str:
    named = {int: "whole numbers", float: "numbers", bool: "true, false"}
    options = [option for option in get_args(kind) if option is not NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(options)
    return f"{_described(options[0])}, none" if NoneType in get_args(kind) else named.get(kind, "text")


def _ranges(recipe: Settings) -> Iterator[tuple[str, str]]:
    """Option and message of every field whose value is none that it may have."""
    for name, kind in kinds(type(recipe)).items():
        value = getattr(recipe, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            yield option(name), f"{value!r} is given; allowed: {_described(kind)}"
        if isinstance(value, bool | str | tuple | NoneType):
            continue
        low, high, words = recipe.bounds(name)
        if not low <= value <= high or not math.isfinite(value):
            yield option(name), f"{value} is given; allowed: {words}"
