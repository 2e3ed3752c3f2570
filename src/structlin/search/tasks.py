"""What candidates are trained on: a small model that exists at every width, its data, and its loss.

Each task is tiny enough for a CPU at its smoke preset, and the same at the larger ones: regression on a random network
(Potapczynski et al. 2024, appendix on experiments), prediction of the next pixel, characters, tokens, and classes of
images. Batches are a function of the seed and the step, so candidates see the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.flops import linear_flops
from ..models.gpt import GPT, GPTConfig, flops_per_token
from ..models.mlp import MLP
from ..problems.vision import images
from ..spec import Spec
from ..train.config import OptionError
from ..train.data import read_text
from ..train.recipe import Recipe
from ..train.tokens import prepare
from ..train.windows import Windows, spread
from . import levels
from .space import aligned, spec_of

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A task at a preset. ``width`` is that of the dense model that sets the budget, ``unit`` divides every width.

    ``batch`` and ``valid`` count examples; the last four are for the tasks that have such a thing.
    """

    width: int
    unit: int
    depth: int
    steps: int
    batch: int
    valid: int
    lr: float
    teacher: int = 0
    image: int = 0
    context: int = 0
    vocabulary: int = 0


class Task(ABC):
    """Data and model of a search; ``about`` identifies the data and is JSON-ready."""

    sizes: Sizes
    about: dict[str, Any]

    @abstractmethod
    def model(self, width: int) -> nn.Module:
        """The dense model of a width, with new weights."""

    @abstractmethod
    def rules(self, candidate: str, width: int) -> dict[str, Spec | None]:
        """What `to_structured_` is given to put a candidate into the model of a width.

        Raises:
            OptionError: for a candidate that this task's model cannot have.
        """

    @abstractmethod
    def flops(self, model: nn.Module) -> int:
        """Forward FLOPs of an example, a multiply-add counted as two."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The training examples of a step, counted from 0."""

    def to(self, device: torch.device) -> None:
        """Draw examples there from now on, where that is worth it; batches may be on the CPU still."""
        return

    @abstractmethod
    def validation(self) -> list[Batch]:
        """All validation examples, in batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a float32 scalar."""


class Perceptron(Task):
    """Tasks whose model is an `MLP` with structured hidden layers."""

    in_features: int
    out_features: int

    def model(self, width: int) -> nn.Module:
        """An `MLP`."""
        return MLP(self.in_features, width, self.sizes.depth, self.out_features)

    def rules(self, candidate: str, width: int) -> dict[str, Spec | None]:
        """The hidden layers."""
        if candidate.startswith("head_"):
            raise OptionError("--space", f"{candidate} is for attention; this task's model has none")
        return {"hidden.*": spec_of(candidate)}

    def flops(self, model: nn.Module) -> int:
        """Those of the linear layers."""
        return linear_flops(model)


class Teacher(Perceptron):
    """Regression: the outputs of a random ReLU network of six layers on eight normal inputs, of mean 0 and variance 1;
    mean squared error."""

    in_features, out_features = 8, 1
    layers = 6

    def __init__(self, sizes: Sizes, data: tuple[str, ...], seed: int) -> None:
        if data:
            raise OptionError("--data", "is given, but the task teacher makes its own")
        self.sizes, self.seed = sizes, seed
        self.about = {"teacher": f"{self.layers} layers of {sizes.teacher}"}
        widths = [self.in_features, *[sizes.teacher] * (self.layers - 1), self.out_features]
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(m, n, generator=generator, device="cpu") for n, m in pairwise(widths)]
        self._weights = [weight * (2 / weight.shape[1]) ** 0.5 for weight in drawn]
        self._biases = [0.1 * torch.randn(m, generator=generator, device="cpu") for m in widths[1:]]
        self._shift, self._scale = torch.zeros(()), torch.ones(())
        _, targets = self._examples(-1, 4096)
        self._shift, self._scale = targets.mean(), targets.std()

    def to(self, device: torch.device) -> None:
        """Let the teacher compute there."""
        self._weights, self._biases = ([part.to(device) for part in parts] for parts in (self._weights, self._biases))
        self._shift, self._scale = self._shift.to(device), self._scale.to(device)

    def batch(self, step: int) -> Batch:
        """Fresh inputs and their targets, float32 ``[batch, 8]`` and ``[batch, 1]``."""
        return self._examples(step, self.sizes.batch)

    def validation(self) -> list[Batch]:
        """Examples of a stream that training does not see."""
        return list(zip(*(x.split(self.sizes.batch) for x in self._examples(-2, self.sizes.valid)), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error; 1 is what the best constant has."""
        return F.mse_loss(model(batch[0]).float(), batch[1])

    @torch.no_grad()
    def _examples(self, stream: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed((self.seed << 32) + stream + 2)
        x = hidden = torch.randn(count, self.in_features, generator=generator, device="cpu").to(self._shift.device)
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            hidden = F.linear(hidden, weight, bias)
            hidden = F.relu(hidden) if index < self.layers - 1 else hidden
        return x, (hidden - self._shift) / self._scale


class Classes(Perceptron):
    """Classification of small images by a perceptron; cross-entropy in nats."""

    def __init__(self, sizes: Sizes, data: tuple[str, ...], seed: int) -> None:
        found = images.read(_folder(data))
        self.sizes, self.seed, self.about = sizes, seed, found.about
        self._x = levels.small(found, sizes.image).flatten(1)
        self._y = torch.from_numpy(found.labels)
        self._held_out = round(levels.VALID_SHARE * len(found))
        self.in_features, self.out_features = self._x.shape[1], len(found.classes)

    def batch(self, step: int) -> Batch:
        """Random training images, float32 ``[batch, features]``, and labels, int64 ``[batch]``."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        chosen = torch.randint(len(self._y) - self._held_out, (self.sizes.batch,), generator=generator, device="cpu")
        return self._examples(chosen)

    def validation(self) -> list[Batch]:
        """Images that are held out."""
        count = min(self._held_out, self.sizes.valid)
        held_out = torch.arange(len(self._y) - self._held_out, len(self._y))[:count]
        return [self._examples(chosen) for chosen in held_out.split(self.sizes.batch)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    def _examples(self, chosen: Tensor) -> Batch:
        return self._x[chosen].float() / (levels.LEVELS / 2) - 1, self._y[chosen]


class Decoder(Task):
    """Tasks whose model is a `GPT` with structured layers in its blocks; an example is a window of ``context + 1``
    tokens, and the loss is in nats per token."""

    vocabulary: int
    context: int

    def model(self, width: int) -> nn.Module:
        """A `GPT` with heads of ``unit`` features."""
        sizes, heads = self.sizes, width // self.sizes.unit
        return GPT(GPTConfig(self.context, width, sizes.depth, heads, vocabulary=self.vocabulary))

    def rules(self, candidate: str, width: int) -> dict[str, Spec | None]:
        """All layers of the blocks."""
        attention = aligned(candidate, width // self.sizes.unit, self.sizes.unit)
        return {**attention, "blocks.*": spec_of(candidate)}

    def flops(self, model: nn.Module) -> int:
        """Those of the linear layers and of attention, over a whole window."""
        assert isinstance(model, GPT)
        return self.context * flops_per_token(model)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per token."""
        assert isinstance(model, GPT)
        return model.loss(batch[0])


class Tokens(Decoder):
    """A decoder on one long row of tokens."""

    train: np.ndarray[Any, Any]
    valid: np.ndarray[Any, Any]

    def batch(self, step: int) -> Batch:
        """Windows in the order of `Windows`, int64 ``[batch, context + 1]``."""
        return (self._windows.batch(step, self.sizes.batch),)

    def validation(self) -> list[Batch]:
        """Windows spread over the validation tokens."""
        return [(part,) for part in spread(self.valid, self.sizes.valid, self.context).split(self.sizes.batch)]

    def _own(self, sizes: Sizes, seed: int, train: np.ndarray[Any, Any], valid: np.ndarray[Any, Any]) -> None:
        self.sizes, self.context, self.train, self.valid = sizes, sizes.context, train, valid
        if min(len(train), len(valid)) < sizes.context + 1:
            message = f"there are {len(train)} tokens to train on and {len(valid)} to validate on"
            raise OptionError("--data", f"{message}; at least {sizes.context + 1} each are needed")
        self._windows = Windows(train, sizes.context, seed)


class Characters(Tokens):
    """Language modelling by characters: the most frequent of the training text, and one token for all others."""

    def __init__(self, sizes: Sizes, data: tuple[str, ...], seed: int) -> None:
        try:
            text = read_text(data)
        except ValueError as error:
            raise OptionError("--data", str(error)) from None
        train, valid = (_codes(part) for part in (text.train, text.valid))
        found, counts = np.unique(train, return_counts=True)
        kept = np.sort(found[np.argsort(-counts, kind="stable")[: sizes.vocabulary - 1]])
        self.vocabulary, self.about = sizes.vocabulary, text.describe()
        self._own(sizes, seed, _tokens(kept, train), _tokens(kept, valid))


class Pieces(Tokens):
    """Language modelling by byte-pair encoding, with a tokenizer trained on the text (`structlin.train.tokens`)."""

    def __init__(self, sizes: Sizes, data: tuple[str, ...], seed: int) -> None:
        recipe = Recipe(data=data or ("stdlib",), valid_share=0.1, vocabulary=sizes.vocabulary, context=sizes.context)
        try:
            tokens = prepare(recipe)
        except OptionError as error:
            raise OptionError("--data", str(error).removeprefix("--data: ").removesuffix(", or --valid")) from None
        self.vocabulary, self.about = tokens.vocabulary, tokens.about
        self._own(sizes, seed, tokens.train, tokens.valid)


class Pixels(Decoder):
    """Prediction of the next of the 64 levels of small images, row by row and channel by channel within a pixel."""

    vocabulary = levels.LEVELS

    def __init__(self, sizes: Sizes, data: tuple[str, ...], seed: int) -> None:
        found = images.read(_folder(data))
        self.sizes, self.seed, self.about = sizes, seed, found.about
        self._rows = levels.small(found, sizes.image).flatten(1)
        self._held_out = round(levels.VALID_SHARE * len(self._rows))
        self.context = self._rows.shape[1] - 1

    def batch(self, step: int) -> Batch:
        """Random training images, int64 ``[batch, pixels]``."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        chosen = torch.randint(len(self._rows) - self._held_out, (self.sizes.batch,), generator=generator, device="cpu")
        return (self._rows[chosen].long(),)

    def validation(self) -> list[Batch]:
        """Images that are held out."""
        held_out = self._rows[-self._held_out :][: self.sizes.valid].long()
        return [(part,) for part in held_out.split(self.sizes.batch)]


def _folder(data: tuple[str, ...]) -> Path:
    if len(data) != 1:
        raise OptionError("--data", f"{len(data)} paths are given; this task needs one folder of images")
    return Path(data[0])


def _codes(text: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), np.uint32)


def _tokens(kept: np.ndarray[Any, Any], codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """1 and up for characters in ``kept``, which is sorted, and 0 for others."""
    place = np.searchsorted(kept, codes).clip(max=len(kept) - 1)
    return np.where(kept[place] == codes, place + 1, 0).astype(np.uint16)
