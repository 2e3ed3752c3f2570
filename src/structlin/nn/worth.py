"""Whether a structured layer is faster than the dense one that it replaces, as far as is known without running it."""

from __future__ import annotations

import torch

from .. import costs
from ..ops import choice
from ..ops.lowering import lower
from ..ops.moves import kernels_on
from ..ops.work import work
from ..plan import Plan

TOKENS = {"cuda": 16384, "cpu": 256}
"""Rows of an input that a forward pass is judged for, by type of device; those that ``structlin tune`` measures."""


def speedup(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Time of a dense layer over that of the steps of ``plan``, forward, and where it comes from.

    "measured" where ``structlin tune --inference`` has measured these steps on this device, in this dtype, for as many
    tokens as `TOKENS` says; else "rule", from `structlin.costs`, whose rates are those of an H200. The
    meta device stands for the first GPU, or the CPU where there is none.
    """
    if device.type == "meta":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tokens, what = TOKENS.get(device.type, TOKENS["cuda"]), lower(plan)
    if plan.is_dense:
        return 1.0, "rule"
    found = choice.look(choice.Key(choice.name(what, plan.kept), dtype, tokens, device, False))
    times = found.numbers.get("eager", {}) if found.why == "measured" else {}
    if "dense" in times and len(times) > 1:
        return times["dense"] / min(ms for name, ms in times.items() if name != "dense"), "measured"
    ceilings = costs.HOPPER.get(dtype.itemsize, costs.HOPPER[4])
    ours = costs.seconds(work(what, plan.kept, tokens, kernels_on(device, dtype), False), ceilings)
    return costs.seconds(costs.composed_work(plan, tokens, False, True), ceilings) / ours, "rule"
