"""The options of a run, checked as a whole before anything is measured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import BACKENDS, backends_on
from . import problems
from .contenders import COMPILED, FORWARD, LINEAR, MODES, NAMES
from .problems import BlockProblem, Problem
from .timing import MIN_SAMPLES

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
DEFAULT_TOKENS = {"cuda": 16384, "cpu": 256}


@dataclass(frozen=True)
class Settings:
    """One run. ``preset`` is "custom" where problems were given one by one; ``backends`` are names of contenders."""

    preset: str
    problems: tuple[Problem | BlockProblem, ...]
    tokens: int
    dtype: str
    device: str
    backends: tuple[str, ...]
    modes: tuple[str, ...]
    repeats: int
    seed: int

    def config(self, problem: Problem | BlockProblem, backend: str) -> dict[str, Any]:
        """What a record says of how one number came about: JSON-ready, and the same for the same settings."""
        return {
            "preset": self.preset,
            "problem": str(problem),
            "structure": f"{'block ' * isinstance(problem, BlockProblem)}{problem.spec}",
            "out_features": problem.out_features,
            "in_features": problem.in_features,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "device": self.device,
            "backend": backend,
            "modes": list(self.modes),
            "repeats": self.repeats,
            "seed": self.seed,
            "bias": False,
        }


def configure(
    preset: str | None = None,
    problem: Sequence[str] = (),
    tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backends: str | None = None,
    repeats: int = 10,
    seed: int = 0,
    only_forward: bool = False,
) -> Settings:
    """Checked settings; None takes the default of the device, which is a GPU if there is one.

    Raises:
        ValueError: naming the option, what was given and what is allowed.
    """
    if preset is not None and problem:
        raise ValueError("--problem: cannot be combined with --preset; leave one out")
    try:
        chosen = tuple(map(problems.read_any, problem)) if problem else problems.preset(preset or "smoke")
    except ValueError as error:
        raise ValueError(f"{'--problem' if problem else '--preset'}: {error}") from None
    _once("--problem", chosen)
    if only_forward and (blocks := [str(one) for one in chosen if isinstance(one, problems.BlockProblem)]):
        raise ValueError(f"--only-forward: {blocks[0]} is given, and blocks are timed forward and backward")
    device = _device(device)
    kind = torch.device(device).type
    tokens = DEFAULT_TOKENS[kind] if tokens is None else tokens
    for option, value, least in (("--tokens", tokens, 1), ("--repeats", repeats, MIN_SAMPLES), ("--seed", seed, 0)):
        if not least <= value < 2**63:
            raise ValueError(f"{option}: {value} is given; allowed: {least} or more")
    return Settings(
        preset="custom" if problem else preset or "smoke",
        problems=chosen,
        tokens=tokens,
        dtype=_among("--dtype", dtype or DEFAULT_DTYPE[kind], DTYPES),
        device=device,
        backends=_backends(backends, torch.device(device)),
        modes=(FORWARD,) if only_forward else MODES,
        repeats=repeats,
        seed=seed,
    )


def _backends(given: str | None, device: torch.device) -> tuple[str, ...]:
    if given is None:
        # compiling takes longer than all the rest on a few CPU cores
        out = {*BACKENDS} - {*backends_on(device)} | ({COMPILED} if device.type == "cpu" else set())
        return tuple(name for name in NAMES if name not in out)
    names = [_among("--backends", name.strip(), NAMES) for name in given.split(",")]
    _once("--backends", names)
    return tuple(name for name in NAMES if name in {LINEAR, *names})


def _device(given: str | None) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given is None:
        return "cuda" if count else "cpu"
    return _among("--device", given, ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))])


def _among(option: str, given: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if given not in names:
        near = difflib.get_close_matches(given, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{option}: {given!r} is unknown; {hint}allowed: {', '.join(names)}")
    return given


def _once(option: str, given: Sequence[object]) -> None:
    for value in given:
        if given.count(value) > 1:
            raise ValueError(f"{option}: {str(value)!r} is given twice; give it once")
