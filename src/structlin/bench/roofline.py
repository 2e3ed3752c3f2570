"""The two ceilings of a machine, measured, and the time below which a layer cannot go on it.

A step of a plan takes at least its FLOPs over the rate of a large matrix product, and at least its bytes over the rate
of a large copy; the larger of both, summed over the steps, is the floor of a layer that runs one step after another. A
kernel that fuses steps may go below it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import analysis
from ..plan import Plan, Step, Term
from .timing import Clock

PASSES = {"forward": 1, "forward_backward": 3}
"""FLOPs and bytes of a mode in units of the forward pass: both gradients of a step cost what the step costs."""

_GEMM = {"cuda": 8192, "cpu": 1024}  # width of the matrix product
_COPY = {"cuda": 2**30, "cpu": 2**26}  # bytes copied


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: FLOP/s of a large matrix product, bytes/s (read and written) of a large copy."""

    flops: float
    bandwidth: float


def measure(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings on the clock's device, about half a second; medians over random data."""
    width, size = _GEMM[clock.device.type], _COPY[clock.device.type] // dtype.itemsize
    a, b = (torch.randn(width, width, device=clock.device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.randn(2**20, device=clock.device).to(dtype).repeat(size // 2**20)
    target = torch.empty_like(source)
    gemm = _median(clock, lambda: torch.mm(a, b, out=c))
    copy = _median(clock, lambda: target.copy_(source))
    return Ceilings(2 * width**3 / gemm, 2 * source.nbytes / copy)


def floor(plan: Plan, mode: str, tokens: int, itemsize: int, ceilings: Ceilings) -> float:
    """Seconds that the steps of ``plan`` take at least, each at whichever of the two ceilings it meets."""
    steps = [_alone(plan, name, step) for name, (_, step) in plan.factors.items()]
    return PASSES[mode] * sum(
        max(
            tokens * analysis.flops(step) / ceilings.flops,
            analysis.traffic(step, tokens, itemsize) / ceilings.bandwidth,
        )
        for step in steps
    )


def _alone(plan: Plan, name: str, step: Step) -> Plan:
    axes = {*step.x, *step.w, *step.y}
    return Plan((Term(step.x, (step.w,), step.y, (name,)),), tuple(axis for axis in plan.axes if axis[0] in axes))


def _median(clock: Clock, run: Callable[[], object]) -> float:
    return statistics.median([clock.seconds(run) for _ in range(12)][2:])
