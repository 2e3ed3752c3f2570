"""Whole transformer blocks with every linear layer structured, beside the dense block, both compiled.

A layer's speed-up is not a model's: norms, attention, activations and residuals cost what they cost. Here a block of
`structlin.models.gpt` runs forward and backward through ``torch.compile``, replayed as a CUDA graph, as a training loop
would run it; the dense block is the yardstick.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models.gpt import Block, GPTConfig, angles
from ..nn import StructuredLinear, tune
from ..surgery import to_structured_
from . import timing
from .contenders import FORWARD_BACKWARD, LINEAR, ModuleContender
from .problems import BLOCK_CONTENDERS, HEAD, BlockProblem
from .race import MEANS, NO_GRAPH, NOT_TRIED, Metrics, Outcome, race
from .settings import DTYPES, Settings


def _config(problem: BlockProblem) -> GPTConfig:
    return GPTConfig(context=problem.context, width=problem.width, depth=1, heads=problem.width // HEAD)


class _OnTokens(nn.Module):
    """A block from [tokens, width] to [tokens, width], so that it is timed as a layer is."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.block = config, Block(config)
        self.register_buffer("rotation", angles(config), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x.view(-1, self.config.context, self.config.width), self.rotation)
        return y.flatten(0, 1)


def build(problem: BlockProblem, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The blocks to compare, by name; the structured ones share their values."""
    dense = _OnTokens(_config(problem)).to(device=device, dtype=dtype)
    structured = copy.deepcopy(dense)
    to_structured_(structured, {"*": problem.spec})
    again = copy.deepcopy(structured)
    for module in again.modules():
        if isinstance(module, StructuredLinear):
            module.recompute = True
    return dict(zip(BLOCK_CONTENDERS, (dense, structured, again), strict=True))


def measure(problem: BlockProblem, settings: Settings, clock: timing.Clock) -> list[Outcome]:
    """Time every block in turns, forward and backward: its name, metrics, what became of its graph, why it failed.

    A block whose output is off by more than twice what the dense one is off by is not timed.

    Raises:
        RuntimeError: when a block cannot run, out of memory for one.
    """
    dtype = DTYPES[settings.dtype]
    tokens = max(1, settings.tokens // problem.context) * problem.context
    sets = timing.number_of_sets(clock.device, 2 * tokens * problem.width * dtype.itemsize)

    def random() -> Tensor:
        return torch.randn(tokens, problem.width, device=clock.device, dtype=dtype)

    inputs = [(random().requires_grad_(), random()) for _ in range(sets)]
    torch._dynamo.reset()
    found: dict[str, ModuleContender] = {}
    metrics: dict[str, Metrics] = {}
    wrong: dict[str, str] = {}
    for name, module in build(problem, clock.device, dtype).items():
        if name != LINEAR and clock.device.type == "cuda":
            tune(module, tokens)  # compiled code measures nothing itself
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        error = _error(module, compiled, inputs[0][0])
        metrics[name] = {"error": error}
        allowed = 2 * (metrics[LINEAR]["error"] or 0) + 2 * torch.finfo(dtype).eps
        if error <= allowed:
            found[name] = ModuleContender(module, inputs, compiled)
        else:
            wrong[name] = f"not timed, because it is wrong: off by {error:.2g}, allowed: {allowed:.2g}"
    graphs = dict.fromkeys(found, NO_GRAPH)
    for name, times in race(settings, clock, found, FORWARD_BACKWARD, sets, graphs).items():
        metrics[name] |= times
    for means in MEANS:
        key = f"{means}_{FORWARD_BACKWARD}"
        dense = metrics[LINEAR].get(f"{key}_ms")
        for own in metrics.values():
            ms = own.get(f"{key}_ms")
            own[f"{key}_speedup"] = dense / ms if dense and ms else None
    return [(name, metrics[name], graphs.get(name, NOT_TRIED), wrong.get(name)) for name in metrics]


def _error(module: nn.Module, compiled: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Relative error of a compiled block against itself in float64, uncompiled."""
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(x.double())
        return float((compiled(x).double() - truth).norm() / truth.norm())
