"""What a layer could become: the structures that fit its shape, and what each costs beside the dense layer.

A cost in time is measured where the layer will run, or predicted from the ceilings of a device that is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from .. import analysis
from ..costs import Ceilings
from ..ops import measure
from ..ops.lowering import lower
from ..plan import Plan
from ..spec import Spec, parse
from ..structures import Dense
from .ceilings import predicted

CANDIDATES = (
    *(f"low_rank:rank={share}" for share in (0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625)),
    *(f"monarch:nblocks={n}" for n in (2, 4, 8)),
    *(f"block_dense:nblocks={n}:rank={share}" for n in (2, 4) for share in (0.25, 0.5)),
    *(f"dyad:nblocks={n}" for n in (2, 4, 8)),
)
"""Structures that are tried for every layer, as text; those that do not fit its shape are left out."""

Shape = tuple[int, int]
Clock = Callable[[Plan], float]
"""Seconds of a layer with that plan."""


class Option(NamedTuple):
    """A structure for a layer, or None for dense; weights without the bias, forward FLOPs per token, seconds."""

    spec: Spec | None
    params: int
    flops: int
    seconds: float | None


def options(shape: Shape, candidates: Sequence[str | Spec], clock: Clock | None) -> list[Option]:
    """Dense, and the candidates that fit ``shape`` and have fewer weights, or FLOPs, than it.

    Args:
        shape: (out_features, in_features).
        candidates: specs, as text or objects.
        clock: gives seconds, or None to leave them out.

    Raises:
        ValueError: for text that is no spec.
    """
    dense = Dense().plan(*shape)
    found = [_option(None, dense, clock)]
    for spec in dict.fromkeys(parse(text) if isinstance(text, str) else text for text in candidates):
        try:
            plan = spec.plan(*shape)
        except ValueError:
            continue  # of another shape: no candidate here
        if analysis.num_params(plan) < found[0].params or analysis.flops(plan) < found[0].flops:
            found.append(_option(spec, plan, clock))
    return found


def _option(spec: Spec | None, plan: Plan, clock: Clock | None) -> Option:
    return Option(spec, analysis.num_params(plan), analysis.flops(plan), clock(plan) if clock else None)


def predicting(ceilings: Ceilings, tokens: int, training: bool, device: str = "cuda") -> Clock:
    """A clock that predicts, for a type of device with these ceilings."""

    def clock(plan: Plan) -> float:
        return predicted(plan, tokens, ceilings, training, device)

    return cache(clock)


def measuring(device: torch.device, dtype: torch.dtype, tokens: int, training: bool) -> Clock:
    """A clock that runs each layer on ``device`` and takes the median, on a GPU as a CUDA graph would run it.

    On a CPU a layer's time is in proportion to that of the dense layer right beside it: what else the machine does
    slows both, and of many candidates the one that was lucky would be chosen.

    Raises:
        RuntimeError: from the clock, where a layer finds no memory.
    """

    def once(plan: Plan) -> tuple[float, float | None]:
        """Milliseconds of a layer, and where it was measured in turns with it, of the dense one."""
        found = measure.times(measure.Subject(lower(plan), plan.kept, dtype, tokens, device, training))
        times = found["graph" if device.type == "cuda" else "eager"]
        # what runs on a CPU where nothing was tuned, and everywhere for a plain weight
        steps_alone = plan.is_dense or device.type != "cuda"
        own = [ms for name, ms in times.items() if name == "bmm" or not steps_alone]
        if not own:
            raise RuntimeError(f"{plan} for {tokens} tokens does not fit into the memory of {device}")
        return min(own), None if training else times.get("dense")  # in training a dense weight is multiplied out

    def clock(plan: Plan) -> float:
        ms, beside = once(plan)
        if device.type != "cuda" and not plan.is_dense:
            dense = Dense().plan(plan.out_features, plan.in_features)
            ms *= 1e3 * kept(dense) / (beside or once(dense)[0])
        return ms / 1e3

    kept = cache(clock)
    return kept
