"""Reconstruction as a problem for the loop: slices measured once each, and images to be brought nearer to the truth.

Every slice has one measurement, with its own coils, phase and noise, as a data set of scans would have. What does not
learn (maps, zero-filling, SENSE) is worked out once, on the device, before training.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...spec import Spec
from ...train.config import OptionError
from ..problem import Batch, Problem
from . import acquisition, files
from .metrics import psnr_db, ssim
from .models import MonarchSense, UNet
from .recipe import MriRecipe
from .sense import coil_maps, sense, zero_filled

WEIGHTS = (0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Tikhonov's weights that are tried."""
TUNING_SLICES, TOGETHER = 16, 32
SAMPLED = 0.5  # of the places of measured k-space at least; corners are often left out, and the rest is the truth
SPLIT_SEED = 0  # the slices to validate on are the same in all runs


@dataclass
class Part:
    """Images of one kind and what they become without learning; ``[n, height, width]``."""

    truth: Tensor
    zero_filled: Tensor
    sense: Tensor


class MriProblem(Problem):
    """Measurements of the slices, volumes and k-space of a folder.

    Attributes:
        weight: of Tikhonov's term in SENSE.
        parts: "train", "valid", "test", a name for each volume, and "measured"; filled by `to`. Measured k-space is in
            it where its rows and columns are those of the recipe.

    Raises:
        OptionError: for a folder without images, or fewer slices than the recipe asks for, and for measured k-space of
            the recipe's size that is mostly empty, of which nobody knows the true image.
    """

    weight: float
    parts: dict[str, Part]

    def __init__(self, recipe: MriRecipe) -> None:
        paths = recipe.data or tuple(filter(None, [os.environ.get(files.VARIABLE)]))
        if len(paths) != 1:
            raise OptionError(
                "--data", f"{len(paths)} folders are given (nor does {files.VARIABLE} name one); {files.ALLOWED}"
            )
        images = files.read(Path(paths[0]), *recipe.size)
        spare = len(images.train) - recipe.valid_slices
        if recipe.shots > spare or spare < 1:
            raise OptionError(
                "--shots, --valid-slices",
                f"{recipe.shots} and {recipe.valid_slices} are given; there are {len(images.train)} training slices",
            )
        if recipe.test_slices > len(images.test):
            raise OptionError("--test-slices", f"{recipe.test_slices} are given; there are {len(images.test)}")
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
        valid, rest = order[: recipe.valid_slices], order[recipe.valid_slices :]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(recipe.seed))]
        self.recipe, self.parts, self.kspace = recipe, {}, images.kspace
        if self._measurable() and images.sampled < SAMPLED:
            raise OptionError(
                "--size, --data",
                f"{recipe.size[0]} {recipe.size[1]} is that of a measured k-space with samples at {images.sampled:.0%} "
                f"of its places; allowed: another size, or {SAMPLED:.0%} or more, as its image is taken for the truth",
            )
        self.truths = {
            "train": images.train[rest[: recipe.shots or spare]],
            "valid": images.train[valid],
            "test": images.test[: recipe.test_slices or None],
            **images.volumes,
        }
        counts = {name: len(truth) for name, truth in self.truths.items()}
        about = {"slices": counts, "files": images.sha256, "measured": self._measurable()}
        about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.about = {"mri": about}

    def model(self) -> nn.Module:
        """What reconstructs."""
        if self.recipe.model == "unet":
            return UNet(self.recipe.channels)
        return MonarchSense(*self.recipe.size)

    def rules(self) -> dict[str, Spec | None]:
        """None: the learnable transforms are structured as they are."""
        return {}

    @torch.no_grad()
    def to(self, device: torch.device) -> None:
        """Measure everything on ``device``, choose SENSE's weight, and keep what comes out there."""
        r = self.recipe
        mask = acquisition.mask(r.size[1], r.acceleration, r.pattern, r.seed)
        tuned = self.truths["train"][:TUNING_SLICES].to(device)
        measured = acquisition.measure(tuned, r.coils, r.noise, _seed(r.seed, "train", 0)) * mask.to(device)
        maps = coil_maps(measured, r.acceleration)

        def quality(weight: float) -> float:
            return psnr_db(sense(measured, maps, mask, weight, r.iterations).abs(), tuned).mean().item()

        self.weight = max(WEIGHTS, key=quality) if r.tikhonov is None else r.tikhonov
        for name, images in self.truths.items():
            done = []
            for start in range(0, len(images), TOGETHER):
                truth = images[start : start + TOGETHER].to(device)
                kspace = acquisition.measure(truth, r.coils, r.noise, _seed(r.seed, name, start))
                done.append(self._reconstruct(truth, kspace, mask))
            self.parts[name] = _joined(done)
        if self._measurable():
            assert self.kspace is not None
            kspace = self.kspace[None].to(device)
            truth = torch.fft.ifft2(kspace).abs().square().sum(1).sqrt()
            self.parts["measured"] = self._reconstruct(truth, kspace, mask)

    def batch(self, step: int) -> Batch:
        """Complex images ``[batch, height, width]`` and their truths; every slice once in an epoch."""
        count = len(self.parts["train"].truth)
        first = step * self.recipe.batch
        chosen = [_order(self.recipe.seed, place // count, count)[place % count]
                  for place in range(first, first + self.recipe.batch)]  # fmt: skip
        index = torch.tensor(chosen, device=self.parts["train"].truth.device)
        return self._given(self.parts["train"])[index], self.parts["train"].truth[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error and, by its weight, 1 - SSIM."""
        image, truth = batch
        found = model(image).float()
        return self._loss(found, truth)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``valid_loss``, ``psnr_db`` and ``ssim``, means over slices."""
        part = self.parts["valid"]
        found = self._found(model, part)
        loss = self._loss(found, part.truth)
        return {"valid_loss": loss.item(), **_scores("", found, part.truth)}

    def test(self, model: nn.Module) -> dict[str, float]:
        """The same of every other part, and of zero-filling and SENSE on it: ``test_NAME_METHOD_psnr_db``, ..._ssim.

        Of the slices NAME is left out, and of the model METHOD is: ``test_psnr_db``, ``test_sense_psnr_db``. Scaled
        SENSE is SENSE times the one factor that brings it nearest to the truth of the training slices, as Tikhonov's
        term makes images darker.
        """
        train = self.parts["train"]
        dark = train.sense.abs()
        scale = ((dark * train.truth).sum() / dark.square().sum()).item()
        scores = {"test_sense_weight": self.weight, "test_sense_scale": scale}
        for name, part in self.parts.items():
            if name in ("train", "valid"):
                continue
            where = "test_" if name == "test" else f"test_{name}_"
            scores |= _scores(where, self._found(model, part), part.truth)
            scores |= _scores(where + "zero_filled_", part.zero_filled.abs(), part.truth)
            scores |= _scores(where + "sense_", part.sense.abs(), part.truth)
            scores |= _scores(where + "scaled_sense_", scale * part.sense.abs(), part.truth)
        return scores

    def picture(self, model: nn.Module, series: dict[str, list[float]], path: Path) -> None:
        """Truth, zero-filled, SENSE and the model on a test slice, and on measured k-space where it is there."""
        from .picture import draw

        rows = {}
        for name in ("test", "measured"):
            if name in self.parts:
                rows[f"{name}, {self.recipe.acceleration}x"] = self.images(name, 0) | {
                    self.recipe.model: self.image(model, name, 0)
                }
        draw(rows, path)

    def images(self, name: str, index: int) -> dict[str, Tensor]:
        """Truth, zero-filled and SENSE magnitudes of an image of a part, ``[height, width]`` on the CPU."""
        part = self.parts[name]
        shown = {"truth": part.truth, "zero-filled": part.zero_filled.abs(), "SENSE": part.sense.abs()}
        return {method: images[index].cpu() for method, images in shown.items()}

    @torch.no_grad()
    def image(self, model: nn.Module, name: str, index: int) -> Tensor:
        """What ``model`` makes of an image of a part, ``[height, width]`` on the CPU."""
        found: Tensor = model(self._given(self.parts[name])[index : index + 1])
        return found[0].float().cpu()

    def _loss(self, found: Tensor, truth: Tensor) -> Tensor:
        error: Tensor = (found - truth).square().mean() + self.recipe.similarity * (1 - ssim(found, truth).mean())
        return error

    def _measurable(self) -> bool:
        return self.kspace is not None and tuple(self.kspace.shape[1:]) == self.recipe.size

    def _reconstruct(self, truth: Tensor, kspace: Tensor, mask: Tensor) -> Part:
        masked = kspace * mask.to(kspace.device)
        maps = coil_maps(masked, self.recipe.acceleration)
        return Part(truth, zero_filled(masked, maps), sense(masked, maps, mask, self.weight, self.recipe.iterations))

    def _given(self, part: Part) -> Tensor:
        """What the model is given of it."""
        return part.zero_filled if self.recipe.model == "unet" and self.recipe.given == "zero_filled" else part.sense

    def _found(self, model: nn.Module, part: Part) -> Tensor:
        return torch.cat([model(images).float() for images in self._given(part).split(self.recipe.batch)])


def _scores(prefix: str, found: Tensor, truth: Tensor) -> dict[str, float]:
    psnr, similarity = psnr_db(found, truth).mean(), ssim(found, truth).mean()
    return {f"{prefix}psnr_db": psnr.item(), f"{prefix}ssim": similarity.item()}


def _seed(seed: int, part: str, start: int) -> int:
    """The seed of a measurement: other parts, places and runs have others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{part}:{start}".encode()).digest()[:6], "big")


def _joined(parts: list[Part]) -> Part:
    names = ("truth", "zero_filled", "sense")
    return Part(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _order(seed: int, epoch: int, count: int) -> list[int]:
    """The slices in the order of an epoch."""
    generator = torch.Generator().manual_seed(_seed(seed, "order", epoch))
    places: list[int] = torch.randperm(count, generator=generator).tolist()
    return places
