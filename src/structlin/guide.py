"""Self-guided training (Wei et al. 2024): a dense weight beside every structured one, faded out as training goes on.

Early in training a product of small factors learns badly; the dense guide, which starts as that product, learns in its
place while the factors come along. When its share has reached zero it is removed with its optimizer state, and the
model is what it would have been without.
"""

from __future__ import annotations

import math
import random
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from . import regroup
from .nn import RoutedLinear, StructuredLinear
from .nn.guide import attach


class Guidance:
    """How far the self-guided training of a model is; made by `guide_`.

    Attributes:
        layers: the guided layers by name; none once the guides are dropped.
        steps: the step in which the guides are dropped.
        warmup: steps in which their share stays 1.
        count: steps done.
    """

    def __init__(
        self, layers: dict[str, StructuredLinear], steps: int, warmup: int, schedule: str, stochastic: bool, seed: int
    ) -> None:
        self.layers, self.steps, self.warmup = layers, steps, warmup
        self._schedule, self._stochastic, self._seed = schedule, stochastic, seed
        self.count = 0
        self._set()

    @property
    def alpha(self) -> float:
        """The share of the guides in the outputs now: 1 in the warm-up, then down to 0 at ``steps``."""
        if self.count >= self.steps:
            return 0.0
        part = max(0.0, (self.count - self.warmup) / (self.steps - self.warmup))
        return (1 + math.cos(math.pi * part)) / 2 if self._schedule == "cosine" else 1 - part

    @property
    def done(self) -> bool:
        """Whether the guides are gone."""
        return not self.layers

    def step(self, *optimizers: Optimizer) -> None:
        """Go on by one training step; after the last, `drop` the guides. Once they are gone nothing happens.

        Args:
            optimizers: all that hold parameters of the model.

        Raises:
            ValueError: when none of ``optimizers`` holds the weight of a guide, which then would never learn.
        """
        if self.done:
            return
        if self.count == 0:
            self._check(optimizers)
        self.count += 1
        if self.count < self.steps:
            self._set()
        else:
            self.drop(*optimizers)

    def drop(self, *optimizers: Optimizer) -> None:
        """Take the guides out of the model now, and out of ``optimizers`` with their state.

        The layers are then plain ones, also in ``state_dict``. Groups of an optimizer stay, even when empty.
        """
        for optimizer in optimizers:
            regroup.forget(optimizer, [attach(layer).weight for layer in self.layers.values()])
        for layer in self.layers.values():
            del layer.guide
        self.layers, self.count = {}, max(self.count, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the ``state_dict`` of model and optimizer: ``{"count": steps done}``."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any], *optimizers: Optimizer) -> None:
        """Continue where ``state`` was saved; drops the guides if they were gone then.

        To resume, do what the run did at its start (`guide_`, then the optimizer), call this, and only then load the
        states of model and optimizer, which now have the parameters that they had when saved.
        """
        self.count = int(state["count"])
        if self.count < self.steps:
            self._set()
        else:
            self.drop(*optimizers)

    def _set(self) -> None:
        # decided on the host from the number of the step alone: no device is waited for, all ranks agree, a resumed
        # run repeats it; and for all layers at once, so that a compiled model needs two graphs and not two for each
        active = not self._stochastic or random.Random(f"{self._seed} {self.count}").random() < self.alpha
        for layer in self.layers.values():
            guide = attach(layer)
            guide.alpha.fill_(self.alpha)
            guide.active = active

    def _check(self, optimizers: tuple[Optimizer, ...]) -> None:
        for name, layer in self.layers.items():
            weight = attach(layer).weight
            if weight.requires_grad and not any(regroup.find(optimizer, weight) for optimizer in optimizers):
                raise ValueError(
                    f"no optimizer given to step() has the guide of {name or 'the model'}; "
                    "make the optimizer after guide_, and pass all that train the model"
                )


def guide_(
    model: nn.Module,
    steps: int,
    *,
    warmup: int = 0,
    schedule: Literal["cosine", "linear"] = "cosine",
    stochastic: bool = False,
    seed: int = 0,
) -> Guidance:
    """Start self-guided training: give every `StructuredLinear` of ``model`` a dense guide, in place.

    >>> model = nn.Sequential(StructuredLinear(16, 16, Monarch(nblocks=4)))
    >>> guide = guide_(model, steps=2)
    >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))  # after guide_, as the guides are parameters too
    >>> for _ in range(3):
    ...     model(torch.randn(8, 16)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     guide.step(optimizer)
    >>> guide.done, list(model.state_dict())
    (True, ['0.first', '0.second', '0.bias'])

    A guided layer computes ``alpha * (x W^T) + (1 - alpha) * (x S^T) + bias`` (Wei et al. 2024, section 3.3), where
    ``S`` is its structured matrix and the guide ``W`` starts as `StructuredLinear.to_dense`, so the function of the
    model does not change. A layer that has a guide already, from a checkpoint, keeps it; one whose structure is a
    single dense weight gets none.

    Args:
        model: any module with structured layers; it may be compiled before or after.
        steps: training steps after which the guides are gone; about half of the run in the paper.
        warmup: steps at the start, of these, in which the guides do all.
        schedule: how ``alpha`` falls from 1 to 0: half a cosine, or a line.
        stochastic: whether a training step leaves out the guides with probability 1 - alpha, which saves about half
            of their FLOPs; for the whole model at once.
        seed: of these decisions, the same on all ranks.

    Returns:
        The `Guidance`, whose ``step`` belongs after that of the optimizer.

    Raises:
        ValueError: for numbers of steps that are not whole or leave none to fade, an unknown schedule, or a model
            without a layer to guide, or with a mixture of experts, which is no matrix that a guide could follow. The
            model is unchanged then.
    """
    if not (isinstance(steps, int) and isinstance(warmup, int) and 0 <= warmup < steps):
        raise ValueError(f"steps={steps} and warmup={warmup} must be whole numbers, warmup from 0 to below steps")
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"schedule={schedule!r} is unknown; allowed: 'cosine', 'linear'")
    if mixtures := [name for name, module in model.named_modules() if isinstance(module, RoutedLinear)]:
        raise ValueError(f"cannot guide the mixtures of experts {', '.join(mixtures)}; leave them dense or structured")
    structured = {name: m for name, m in model.named_modules() if isinstance(m, StructuredLinear)}
    layers = {name: layer for name, layer in structured.items() if not layer.plan.is_dense}
    if not layers:
        raise ValueError("the model has no structured layer to guide; convert it with to_structured_ first")
    for layer in layers.values():
        attach(layer)
    return Guidance(layers, steps, warmup, schedule, stochastic, seed)
