"""The problem of naming what is on an image: batches on the device, cross-entropy, accuracy, and a picture of both.

Images stay bytes until a batch is taken, and on a GPU the whole set lies in its memory, so a step waits for nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...spec import Spec
from ...train.config import OptionError
from ..problem import Batch, Problem, chosen
from . import augment, models
from .images import VARIABLE, Pictures, read, read_test
from .recipe import VisionRecipe

SCALED_BY, EVALUATED = 10_000, 1000


class Classify(Problem):
    """Images of a folder and their classes; the last of the training images are held out for validation.

    Raises:
        OptionError: for data that are not there, or do not fit the recipe.
    """

    def __init__(self, recipe: VisionRecipe) -> None:
        self.recipe = recipe
        folder = given(recipe.data)
        self.train = read(folder, "train", recipe.image)
        self.tests = read_test(folder, self.train, recipe.image)
        held_out = max(1, round(recipe.valid_share * len(self.train)))
        self.count = len(self.train) - held_out
        self.valid = np.arange(self.count, len(self.train))[: recipe.valid_images]
        tests = {} if self.tests is None else {"test": self.tests.about}
        self.about = {"train": self.train.about, **tests, "classes": len(self.train.classes), "valid": len(self.valid)}
        if recipe.shift >= min(self.train.shape[:2]):
            raise OptionError("--shift", f"{recipe.shift} is given; images of {self.train.shape[0]} pixels allow less")
        sample = self.train.take(np.arange(min(SCALED_BY, self.count))).astype(np.float32)
        self._mean = torch.from_numpy(sample.mean((0, 1, 2)))
        self._std = torch.from_numpy(sample.std((0, 1, 2))).clamp(min=1.0)
        self._pixels = {id(part): _tensor(part) for part in (self.train, self.tests) if part is not None}
        self._device = torch.device("cpu")

    def model(self) -> nn.Module:
        """What `models.build` makes."""
        try:
            return models.build(self.recipe, self.train.shape, len(self.train.classes))
        except ValueError as error:
            raise OptionError("--model", str(error)) from None

    def rules(self) -> dict[str, Spec | None]:
        """The structure in what `models.layers_of` says."""
        with torch.device("meta"):
            known = models.layers_of(self.model())
        return chosen(self.recipe, {name: tuple(layers) for name, layers in known.items()})

    def to(self, device: torch.device) -> None:
        """Keep all images there that are decoded."""
        self._device = device
        self._pixels = {key: None if pixels is None else pixels.to(device) for key, pixels in self._pixels.items()}
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def batch(self, step: int) -> Batch:
        """Training images, float32 ``[batch, channels, height, width]`` of mean 0 and variance 1, shifted and mirrored,
        and their classes, int64 ``[batch]``."""
        recipe = self.recipe
        found = augment.places(recipe.seed, step, recipe.batch, self.count)
        by = augment.moves(recipe.seed, step, recipe.batch, recipe.shift, recipe.mirror)
        pixels, labels = self._examples(self.train, found)
        if recipe.shift or recipe.mirror:
            pixels = augment.moved(pixels, self._there(by))
        return self._scaled(pixels), labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(models.logits(model, batch[0]).float(), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``valid_loss`` in nats, ``accuracy`` as a share, and its standard error ``accuracy_se``."""
        loss, share, error = self._measure(model, self.train, self.valid)
        return {"valid_loss": loss, "accuracy": share, "accuracy_se": error}

    def test(self, model: nn.Module) -> dict[str, float]:
        """The same of all test images, where there are some."""
        if self.tests is None:
            return {}
        loss, share, error = self._measure(model, self.tests, np.arange(len(self.tests)))
        return {"test_loss": loss, "test_accuracy": share, "test_accuracy_se": error}

    def picture(self, model: nn.Module, series: dict[str, list[float]], path: Path) -> None:
        """Accuracy as training went on, and images, of the test where there are some, with what the model says."""
        from .picture import draw

        pictures, first = (self.train, self.count) if self.tests is None else (self.tests, 0)
        shown = np.arange(first, len(pictures))[:32]
        pixels, labels = self._examples(pictures, shown)
        said = models.logits(model, self._scaled(pixels)).argmax(1)
        names = [(pictures.classes[says], pictures.classes[label]) for says, label in zip(said, labels, strict=True)]
        draw(path, series, pixels.cpu().numpy(), names, f"{self.recipe.name}, {self.recipe.structure}")

    def _measure(
        self, model: nn.Module, pictures: Pictures, places: np.ndarray[Any, Any]
    ) -> tuple[float, float, float]:
        """Mean loss, accuracy and its standard error."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for start in range(0, len(places), EVALUATED):
            pixels, labels = self._examples(pictures, places[start : start + EVALUATED])
            logits = models.logits(model, self._scaled(pixels)).float()
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right])
        loss, share = (sums / len(places)).tolist()
        return loss, share, math.sqrt(share * (1 - share) / len(places))

    def _examples(self, pictures: Pictures, places: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Bytes ``[batch, height, width, channels]`` and classes of the images at ``places``, on the device."""
        kept = self._pixels[id(pictures)]
        pixels = self._there(pictures.take(places)) if kept is None else kept[self._there(places)]
        return pixels, self._there(pictures.labels[places])

    def _there(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _scaled(self, pixels: Tensor) -> Tensor:
        return ((pixels - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()


def given(data: tuple[str, ...]) -> Path:
    """The one folder or archive of ``data``, or that of STRUCTLIN_IMAGES where ``data`` is empty.

    Raises:
        OptionError: for none, or several.
    """
    found = data or tuple(filter(None, [os.environ.get(VARIABLE, "")]))
    if len(found) != 1:
        allowed = f"one folder or archive of images, here or in {VARIABLE}"
        raise OptionError("--data", f"{len(found)} paths are given; allowed: {allowed}")
    return Path(found[0])


def _tensor(pictures: Pictures) -> Tensor | None:
    return None if pictures.pixels is None else torch.from_numpy(pictures.pixels)
