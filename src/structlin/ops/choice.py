"""Which backend `auto` runs: measured once for a layer, a dtype, a number of tokens and a device, then looked up.

A choice comes from memory, else from disk, else it is measured, and where that is not possible it follows from the cost
model of `structlin.costs`. Nothing is measured while PyTorch traces or captures a graph, inside a
backward pass, or in one of several processes, which have to agree. A CPU runs `bmm` unless it was told to measure, so
that results there are the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import costs
from ..machine import describe_device, versions
from . import joined, measure, store
from .contract import autocast_dtype, seen_through
from .equation import constant_when_traced
from .lowering import Program, plan_of, program
from .moves import kernels_on
from .work import joined_work, work

CANDIDATES = ("joined", "triton", "bmm", "dense")
"""What `auto` chooses from."""

MEASURED = ("cuda",)  # types of devices on which the first use of a layer measures
ANY_NUMBER = 16384  # tokens, where compiled code takes any number of them
MARGIN = 1.03  # dense has to be faster by this much: it needs memory for its weight
FUSED = 0.95  # of its time counts for a joined product in a graph: compiled code adds its results up as it reads them


class Key(NamedTuple):
    """What a choice depends on. ``runs`` is what `name` returns, ``tokens`` a power of two."""

    runs: str
    dtype: torch.dtype
    tokens: int
    device: torch.device
    training: bool


@dataclass(frozen=True)
class Choice:
    """The backend to launch from Python (``eager``), the one inside a CUDA graph or compiled code (``graph``), and why.

    ``why`` is "measured" or "rule"; ``numbers`` are milliseconds by launch and backend, measured or predicted.
    """

    eager: str
    graph: str
    why: str
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, given: Any) -> Choice:
        """Read what ``dataclasses.asdict`` wrote.

        Raises:
            ValueError: for anything else.
        """
        names = [entry.name for entry in dataclasses.fields(cls)]
        if isinstance(given, dict) and sorted(given) == sorted(names):
            known = (
                given["eager"] in CANDIDATES and given["graph"] in CANDIDATES and given["why"] in ("measured", "rule")
            )
            if known and _are_numbers(given["numbers"]):
                return cls(**given)
        raise ValueError(f"{given!r} is no choice; one has {', '.join(names)}, of {', '.join(CANDIDATES)}")

    def __str__(self) -> str:
        what = self.eager if self.eager == self.graph else f"{self.eager} from Python, {self.graph} in graphs"
        if self.why == "rule" and not self.numbers:
            return f"{what} (the default where nothing was measured)"
        unit = "ms" if self.why == "measured" else "ms on an H200, predicted"
        launches = {"eager": "from Python", "graph": "in graphs"}
        parts = [
            f"{launches[launch]} {', '.join(f'{name} {value:.3f}' for name, value in found.items())} {unit}"
            for launch, found in self.numbers.items()
        ]
        return f"{what} ({self.why}; {'; '.join(parts)})"


def _are_numbers(given: Any) -> bool:
    found = given.values() if isinstance(given, dict) and given.keys() <= {"eager", "graph"} else [None]
    return all(isinstance(ms, dict) and all(isinstance(value, float) for value in ms.values()) for ms in found)


_chosen: dict[Key, Choice] = {}
_passing: dict[Key, Choice] = {}  # in use where nothing can be measured; a later call may still measure
_restored: dict[str, Choice] = {}


def name(what: Program, kept: tuple[int, int] | None) -> str:
    """A program and what its plan keeps of it, as one string."""
    return what.text if kept is None else f"{what.text} | {kept[0]}x{kept[1]}"


def choose(runs: str, x: Tensor, training: bool) -> str:
    """The backend for ``x``, (*, in_features), in training or inference."""
    if x.is_complex() or x.is_meta or seen_through():
        return "bmm"
    dtype = autocast_dtype(x)
    if torch.compiler.is_compiling():
        return _when_traced(runs, _known_number(prod(x.shape[:-1])), dtype, x.device, training)
    key = Key(runs, dtype, bucket(prod(x.shape[:-1])), x.device, training)
    found = _chosen.get(key) or _resolve(key)
    if found.eager == found.graph:
        return found.eager
    return found.graph if capturing(x.device) else found.eager


def capturing(device: torch.device) -> bool:
    """Whether what runs now is captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def bucket(tokens: int) -> int:
    """The next power of two."""
    return 1 << (max(tokens, 1) - 1).bit_length()


def look(key: Key) -> Choice:
    """What `auto` runs for ``key`` as far as is known without measuring."""
    return _chosen.get(key) or _known(key) or rule(key)


def settle(key: Key) -> Choice:
    """The choice for ``key``, measured now if it is not known, on any device; kept in memory and on disk."""
    found = _chosen.get(key)
    if found is None or found.why == "rule":
        found = _restored.get(_portable(key)) or _on_disk(_portable(key)) or _measured(key)
    _chosen[key] = found
    return found


@lru_cache(maxsize=1024)
def rule(key: Key) -> Choice:
    """The choice where nothing can be measured, by what an H200 would take; `bmm` on a CPU."""
    if key.device.type not in MEASURED:
        return Choice("bmm", "bmm", "rule")
    return _fastest(predicted(key), "rule")


def predicted(key: Key) -> dict[str, dict[str, float]]:
    """Milliseconds on an H200 of each backend that runs there, by launch."""
    subject = _subject(key)
    plan, ceilings = plan_of(subject.what, subject.kept), costs.HOPPER.get(key.dtype.itemsize, costs.HOPPER[4])
    found = measure.structured(subject.what, key.dtype, key.tokens, key.device)
    kernels, how = kernels_on(key.device, key.dtype), joined.joined(subject.what)
    runs = {
        "triton" if "triton" in found else "bmm": work(subject.what, subject.kept, key.tokens, kernels, key.training)
    }
    if how is not None and "joined" in found:
        runs["joined"] = joined_work(how, subject.kept, key.tokens, kernels, key.training)
    times = {name: 1e3 * costs.seconds(run, ceilings) for name, run in runs.items()}
    numbers: dict[str, dict[str, float]] = {}
    for launch, keep in (("eager", not key.training), ("graph", False)):
        dense = costs.seconds(costs.composed_work(plan, key.tokens, key.training, keep), ceilings)
        numbers[launch] = times | {"dense": 1e3 * dense}
    return numbers


def choices() -> dict[str, dict[str, Any]]:
    """The choices in use in this process, to be stored and given to `restore_choices`; JSON-ready.

    The keys name the program, dtype, tokens (a power of two), device, training or inference, and versions.
    """
    return {_portable(key): dataclasses.asdict(choice) for key, choice in {**_passing, **_chosen}.items()}


def restore_choices(given: dict[str, dict[str, Any]]) -> None:
    """Use these choices from now on where they fit, instead of those of this machine; see `choices`.

    Choices of other devices or versions never fit, and do no harm.

    Raises:
        ValueError: when ``given`` is not what `choices` returned; nothing is changed then.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{given!r} is given; allowed: what structlin.choices() returned")
    _restored.update({key: Choice.from_dict(choice) for key, choice in given.items()})
    for used in (_chosen, _passing):
        for key in [key for key in used if _portable(key) in given]:
            del used[key]


def install(found: dict[Key, Choice]) -> None:
    """Put choices in use that another process made for the same keys."""
    _chosen.update(found)


def forget() -> None:
    """Drop all choices of this process; those on disk stay."""
    _chosen.clear()
    _passing.clear()
    _restored.clear()
    _on_disk.cache_clear()


def distributed() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


@constant_when_traced
def _when_traced(runs: str, tokens: int, dtype: torch.dtype, device: torch.device, training: bool) -> str:
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = Key(runs, dtype, bucket(tokens), device, training)
    _passing[key] = look(key)
    return _passing[key].graph


def _known_number(tokens: int) -> int:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import, and is there by now

    return tokens if has_static_value(tokens) else ANY_NUMBER


def _resolve(key: Key) -> Choice:
    found = _known(key)
    if _may_measure(key.device):
        if found is None:
            found = _measured(key)
        elif found.eager != found.graph:
            measure.warm_up(_subject(key), found.graph)  # a capture that comes later cannot
        _chosen[key] = found
        return found
    found = found or rule(key)
    (_passing if key.device.type in MEASURED else _chosen)[key] = found
    return found


def _may_measure(device: torch.device) -> bool:
    if device.type not in MEASURED or distributed() or torch.compiler.is_compiling():
        return False
    # the thread that measures would wait for the backward pass that waits for it
    in_backward: bool = torch._C._current_graph_task_id() != -1
    return not in_backward and not capturing(device)


def _measured(key: Key) -> Choice:
    times = measure.times(_subject(key))
    if not times["eager"] or not times["graph"]:
        return rule(key)  # nothing fits into memory beside what is there
    found = _fastest(times, "measured")
    store.save(_portable(key), dataclasses.asdict(found))
    return found


def _fastest(numbers: dict[str, dict[str, float]], why: str) -> Choice:
    eager, graph = numbers["eager"], numbers["graph"]
    handicaps = {"dense": MARGIN, "joined": FUSED}
    return Choice(
        min(eager, key=lambda backend: eager[backend] * (MARGIN if backend == "dense" else 1)),
        min(graph, key=lambda backend: graph[backend] * handicaps.get(backend, 1)),
        why,
        numbers,
    )


def _known(key: Key) -> Choice | None:
    """What was restored or is on disk; of several processes each might find something else there."""
    return _restored.get(_portable(key)) or (None if distributed() else _on_disk(_portable(key)))


@cache
def _on_disk(key: str) -> Choice | None:
    try:
        return Choice.from_dict(store.load(key))
    except ValueError:
        return None


@lru_cache(maxsize=1024)
def _portable(key: Key) -> str:
    """The key as text, with the name of the device and the versions that times depend on."""
    where, found = describe_device(key.device), versions()
    device = f"{key.device.type}: {where['name']}"
    if key.device.type == "cpu":
        device += f", {where['threads']} threads"
    fields = {
        "program": key.runs,
        "dtype": str(key.dtype).removeprefix("torch."),
        "tokens": key.tokens,
        "device": device,
        "training": key.training,
        "versions": {name: found.get(name) for name in ("structlin", "torch", "triton")},
    }
    return json.dumps(fields, sort_keys=True)


def _subject(key: Key) -> measure.Subject:
    text, _, kept = key.runs.partition(" | ")
    rows, _, columns = kept.partition("x")
    cut = (int(rows), int(columns)) if kept else None
    return measure.Subject(program(text), cut, key.dtype, key.tokens, key.device, key.training)
