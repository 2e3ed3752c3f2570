"""What the models of operators share: a step from a window of times to the next, repeated, and how an error is said."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Stepper(nn.Module, ABC):
    """A model that is given the last times and says the next, and goes on from what it said.

    `prepare` has what stays the same over the steps, so it is computed once. Only `step` is ever compiled: a compiled
    loop of forty steps would be forty times as long to compile and no faster.
    """

    def prepare(self) -> list[Tensor]:
        """Tensors that `step` is given besides the window."""
        return []

    @abstractmethod
    def step(self, window: Tensor, *prepared: Tensor) -> Tensor:
        """The next time ``[batch, *shape, 1]`` after a window ``[batch, *shape, times]``."""

    def forward(self, window: Tensor, steps: int = 1) -> Tensor:
        """The next ``steps`` times, float32 ``[batch, *shape, steps]``, after a window ``[batch, *shape, times]``."""
        prepared, found = self.prepare(), []
        for _ in range(steps):
            found.append(self.step(window, *prepared).float())
            window = torch.cat([window[..., 1:], found[-1]], -1)
        return torch.cat(found, -1)

    def compile_step(self, mode: str) -> None:
        """Compile `step` from now on; ``mode`` is that of `torch.compile`."""
        self.step = torch.compile(self.step, mode=mode)  # type: ignore[method-assign]


def relative_l2(found: Tensor, truth: Tensor) -> Tensor:
    """Norm of the error over the norm of the truth, ``[batch]``, over all other dimensions of both."""
    error: Tensor = (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return error
