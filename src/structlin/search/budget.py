"""The same budget for every candidate: how wide a model and how many steps it can afford.

The budget is what the dense model of the task's width costs, or a number. What a cheaper structure saves becomes a
wider model or more steps, so that the whole budget is used and losses can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..surgery import to_structured_
from .tasks import Task

EQUAL = ("flops", "seconds", "params")
"""What is the same for all candidates: FLOPs of the whole training, seconds in training steps, weights of the model."""

GROW = ("width", "steps")
"""What a candidate gets for what it saves."""

TRAINING = 3  # a backward pass costs two forward ones
WIDEST = 8  # times the width of the task
BEYOND = 2  # times the limit: a wider model can cost less, where its width divides better, but not by that
MOST_STEPS = 2**31  # as of the option that gives them
LARGEST_ODD_PART = 7  # of a width, so that it has the digits that structures ask for


@dataclass(frozen=True)
class Size:
    """What a candidate is trained as.

    Attributes:
        width: of the model.
        steps: updates; None where the clock ends the training.
        params: weights of the whole model.
        flops: forward FLOPs of the model for an example.
    """

    width: int
    steps: int | None
    params: int
    flops: int


def dense_budget(task: Task, equal: str) -> float:
    """What the dense model costs at the task's own width and steps: FLOPs or parameters.

    For seconds, which only a run can tell, this is not defined.
    """
    assert equal != "seconds"
    dense = measure(task, "dense", task.sizes.width)
    return float(TRAINING * dense.flops * task.sizes.batch * task.sizes.steps if equal == "flops" else dense.params)


def fit(task: Task, candidate: str, equal: str, grow: str, budget: float | None) -> Size:
    """Width and steps at which ``candidate`` uses ``budget``.

    - ``grow="steps"``: the task's width, and as many steps as the budget pays.
    - ``grow="width"``: the widest model that costs no more per step (equal FLOPs or seconds) or has no more weights
      (equal parameters) than the budget's share; the whole steps that remain of a FLOPs budget are used too.

    At equal seconds the width is that of equal FLOPs, and the clock ends the training.

    Args:
        task: whose model it is.
        candidate: from the space.
        equal: of `EQUAL`.
        grow: of `GROW`.
        budget: in FLOPs or parameters, None for what the dense model takes; seconds do not matter here.

    Raises:
        ValueError: where no width up to eight times the task's fits the structure and the budget, or the budget pays
            less than one step or more than any run takes.
    """
    sizes = task.sizes
    example = TRAINING * sizes.batch
    by_flops = budget if equal == "flops" and budget else dense_budget(task, "flops")
    if equal == "params":
        return _widest(task, candidate, "params", budget or dense_budget(task, "params"))
    if grow == "steps":
        size = measure(task, candidate, sizes.width)
    else:
        size = _widest(task, candidate, "flops", by_flops / (example * sizes.steps))
    if equal == "seconds":
        return Size(size.width, None, size.params, size.flops)
    steps = int(by_flops / (example * size.flops) + 1e-6)
    if steps < 1:
        raise ValueError(f"one step of {candidate} at width {size.width} costs more than {by_flops:.3g} FLOPs")
    if steps >= MOST_STEPS:
        raise ValueError(
            f"it pays {steps:.3g} steps of {candidate} at width {size.width}; allowed: below {MOST_STEPS:.3g}"
        )
    return Size(size.width, steps, size.params, size.flops)


@lru_cache(maxsize=4096)
def measure(task: Task, candidate: str, width: int) -> Size:
    """What the model with ``candidate`` is at a width, on shapes alone, at the task's steps.

    Raises:
        ValueError: when the structure does not fit the layers of that width.
    """
    with torch.device("meta"):
        model = task.model(width)
        to_structured_(model, task.rules(candidate, width))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Size(width, task.sizes.steps, params, task.flops(model))


def widths(task: Task) -> list[int]:
    """The widths that are tried, ascending."""
    unit, most = task.sizes.unit, WIDEST * task.sizes.width
    return [n for n in range(unit, most + 1, unit) if n // (n & -n) <= LARGEST_ODD_PART]


def _widest(task: Task, candidate: str, what: str, limit: float) -> Size:
    """The widest model whose ``what`` is at most ``limit``; for FLOPs else the narrowest there is, for fewer steps."""
    best: Size | None = None
    narrowest: Size | None = None
    problem = ""
    for width in widths(task):
        try:
            size = measure(task, candidate, width)
        except ValueError as error:
            problem = " ".join(str(error).split())
            continue
        narrowest = narrowest or size
        if getattr(size, what) <= limit * (1 + 1e-9):
            best = size
        elif getattr(size, what) > BEYOND * limit:
            break
    if best is None and what == "flops":
        best = narrowest
    if best is None:
        wanted = problem if problem else f"at most {limit:,.0f} {what}"
        raise ValueError(f"{candidate} fits no width from {task.sizes.unit} to {widths(task)[-1]}: {wanted}")
    return best
