"""Everything that is timed on a problem: our backends and what they have to beat.

* ``linear``: ``nn.Linear`` of the same shape, the yardstick of every speed-up.
* ``compiled``: the plan as plain ``torch.einsum``, through ``torch.compile``.
* ``ceiling``: per step one batched GEMM on contiguous operands that someone else has permuted. No layer gets that for
  free, and the terms of a sum are not added up.
* every name in `structlin.ops.BACKENDS`: `StructuredLinear` run by that backend. ``copy`` is what published code does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..nn import StructuredLinear
from ..ops import BACKENDS, reference
from ..ops.lookup import collect, gather
from ..plan import Plan
from .timing import Step

LINEAR, COMPILED, CEILING = "linear", "compiled", "ceiling"
NAMES = (LINEAR, COMPILED, CEILING, *BACKENDS)
"""All contenders, the yardstick first."""

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
MODES = (FORWARD, FORWARD_BACKWARD)
"""Inference (``eval``, no gradients), and a training step as a user writes it: ``layer(x).backward(dy)``."""

Inputs = Sequence[tuple[Tensor, Tensor]]
"""Sets of (x, dy), each [tokens, in_features] that requires a gradient, and [tokens, out_features]."""


class Contender(Protocol):
    """One way to do the work of a layer."""

    def step(self, mode: str) -> Step:
        """Get ready for ``mode`` and return what runs it once."""

    def clear(self) -> None:
        """Let go of all gradients."""


class ModuleContender:
    """A module, run as a user runs it; ``call`` stands in for the module where it is compiled."""

    def __init__(self, module: nn.Module, inputs: Inputs, call: Callable[[Tensor], Tensor] | None = None) -> None:
        self.module, self.inputs, self.call = module, inputs, module if call is None else call
        self.parameters = dict(module.named_parameters())

    def step(self, mode: str) -> Step:
        """Forward without gradients, or forward and backward into gradients that were None."""
        self.module.train(mode == FORWARD_BACKWARD)
        return self._forward if mode == FORWARD else self._forward_backward

    def clear(self) -> None:
        """Let go of the gradients of the inputs and the parameters."""
        for tensor in (*(x for x, _ in self.inputs), *self.parameters.values()):
            tensor.grad = None

    def _forward(self, index: int) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.call(self.inputs[index][0])
        return y

    def _forward_backward(self, index: int) -> Tensor:
        x, dy = self.inputs[index]
        x.grad = None
        for parameter in self.parameters.values():
            parameter.grad = None
        self.call(x).backward(dy)
        assert x.grad is not None
        return x.grad


class EinsumLayer(nn.Module):
    """The plan as its equations say, one ``torch.einsum`` after another; shares the factors of ``layer``."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        plan = layer.plan
        self.chains = [
            (
                term,
                plan.shape(term.x),
                [(name, reference.letters(step.equation)) for name, step in zip(term.names, term.steps, strict=True)],
            )
            for term in plan.terms
        ]
        for name in plan.factors:
            self.register_parameter(name, nn.Parameter(getattr(layer, name).detach()))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features]."""
        y: Tensor | None = None
        for term, view, steps in self.chains:
            z = (x if term.table is None else gather(x, term.table)).reshape(-1, *view)
            for name, equation in steps:
                z = torch.einsum(equation, z, getattr(self, name))
            z = z.flatten(1) if term.out_table is None else collect(z.flatten(1), term.out_table)
            y = z if y is None else y + z
        assert y is not None
        return y


class CeilingContender:
    """The batched GEMMs of a plan on random contiguous operands: [G, M, K] x [G, K, N] forward, and both gradients."""

    def __init__(self, plan: Plan, tokens: int, sets: int, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes = [
            (plan.size(step.group), tokens * plan.size(step.free), plan.size(step.out), plan.size(step.contract))
            for _, step in plan.factors.values()
        ]

        def matrix(g: int, rows: int, columns: int) -> Tensor:
            # without a batch this is the plain product, as nn.Linear would run it
            return torch.randn(*([g] if g > 1 else []), rows, columns, device=device, dtype=dtype)

        self.x = [[matrix(g, m, k) for _ in range(sets)] for g, m, _, k in self.sizes]
        self.dy = [[matrix(g, m, n) for _ in range(sets)] for g, m, n, _ in self.sizes]
        self.w = [matrix(g, k, n) for g, _, n, k in self.sizes]
        self.y, self.dx, self.dw = (
            [torch.empty_like(t) for t in like] for like in ([d[0] for d in self.dy], [x[0] for x in self.x], self.w)
        )

    def step(self, mode: str) -> Step:
        """The products of the forward pass, or these and those of both gradients."""
        return self._forward if mode == FORWARD else self._forward_backward

    def clear(self) -> None:
        """Nothing to let go of: everything was allocated beforehand."""

    def _forward(self, index: int) -> Tensor:
        for x, w, y in zip(self.x, self.w, self.y, strict=True):
            torch.matmul(x[index], w, out=y)
        return self.y[-1]

    def _forward_backward(self, index: int) -> Tensor:
        self._forward(index)
        for x, w, dy, dx, dw in zip(self.x, self.w, self.dy, self.dx, self.dw, strict=True):
            torch.matmul(dy[index], w.mT, out=dx)
            torch.matmul(x[index].mT, dy[index], out=dw)
        return self.dx[-1]


def build(name: str, layer: StructuredLinear, inputs: Inputs) -> Contender:
    """The contender called ``name`` with the factors of ``layer``, which has no bias.

    Raises:
        ValueError: for a name that is not in `NAMES`.
    """
    x = inputs[0][0]
    if name == LINEAR:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device=x.device, dtype=x.dtype)
        return ModuleContender(linear, inputs)
    if name == COMPILED:
        torch._dynamo.reset()  # it compiles one function for a few shapes only, and every problem is another
        einsum = EinsumLayer(layer)
        return ModuleContender(einsum, inputs, torch.compile(einsum, fullgraph=True, dynamic=False))
    if name == CEILING:
        return CeilingContender(layer.plan, len(x), len(inputs), x.device, x.dtype)
    twin = copy.deepcopy(layer)
    twin.backend = name
    return ModuleContender(twin, inputs)
