"""What a problem is to the loop that trains on it: data, a model, a loss, and what is measured and shown at the end.

A recipe is a frozen value that makes its problem; everything in a problem follows from it, so a run that is started
again sees the same weights and batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import Spec
from ..train import rules
from ..train.settings import Settings

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ProblemRecipe(Settings):
    """A `Settings` that stands for a problem. What it is made for is in its subclasses."""

    def problem(self) -> Problem:
        """The problem, with its data read or made.

        Raises:
            OptionError: for data that is not there or does not fit.
        """
        raise NotImplementedError


class Problem(ABC):
    """Data, model and loss of a recipe.

    Attributes:
        about: identifies the data; JSON-ready. Runs whose ``sha256`` in it differ, or all of it where it has none, are
            runs on other data.
    """

    about: dict[str, Any]

    @abstractmethod
    def model(self) -> nn.Module:
        """The dense float32 model with new weights, drawn on the CPU from the global generator, which was seeded."""

    @abstractmethod
    def rules(self) -> dict[str, Spec | None]:
        """What `to_structured_` is given; `chosen` makes it in most problems."""

    def rates(self) -> dict[str, float]:
        """Globs over module names, and what the learning rate is multiplied by there; see `param_groups`."""
        return {}

    def to(self, device: torch.device) -> None:
        """Keep the data on ``device`` from now on, where that is worth it."""
        return

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The training examples of a step, counted from 0, on any device: a function of seed and step alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch on the model's device, a float32 scalar; may be compiled."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``valid_loss`` and other metrics on validation data; called in eval mode, without gradients."""

    def test(self, model: nn.Module) -> dict[str, float]:
        """Metrics on test data, their names beginning with ``test_``; called once, after the last update."""
        return {}

    def picture(self, model: nn.Module, series: dict[str, list[float]], path: Path) -> None:
        """Write a PNG that shows what came out; ``series`` are the curves of the run. Needs matplotlib."""
        return


def chosen(recipe: Settings, known: dict[str, tuple[str, ...]]) -> dict[str, Spec | None]:
    """Rules that give ``recipe.structure`` to ``recipe.layers``: a name in ``known``, or globs with spaces between.

    Raises:
        OptionError: for a structure that is not known.
    """
    if recipe.structure == "dense":
        return {}
    structure = rules.spec("--structure", recipe.structure)
    return dict.fromkeys(known.get(recipe.layers, tuple(recipe.layers.split())), structure)
