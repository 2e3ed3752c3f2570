"""The fields of a run on images, and how they are checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...train.settings import setting
from ..problem import Problem, ProblemRecipe


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(ProblemRecipe):
    """One run of a classifier of images. Batches are in images, sizes of images in pixels.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    TITLE = "vision"
    packages = ("transformers", "PIL")

    model: Literal["vit", "mixer", "mlp"] = setting("vit", "vit, mixer or mlp")
    image: int | None = setting(None, "pixels on a side that images are scaled to; none: as they are")
    patch: int = setting(4, "pixels on a side of a patch, vit and mixer")
    width: int = setting(512, "features of a patch, or of a hidden layer")
    depth: int = setting(6, "number of blocks, or of square hidden layers")
    heads: int = setting(8, "attention heads of a block, vit")
    mlp_width: int = setting(2048, "hidden features of the MLP, vit and mixer")
    token_width: int = setting(256, "hidden features of the MLP across patches, mixer")

    shift: int = setting(4, "training images move by up to so many pixels in each direction; 0: not")
    mirror: bool = setting(True, "whether half of the training images are mirrored")
    valid_share: float = setting(0.1, "share of the training images held out, the last ones")
    valid_images: int = setting(5000, "images of a validation at most")

    def problem(self) -> Problem:
        """The images of ``data``, or of STRUCTLIN_IMAGES.

        Raises:
            OptionError: for data that are not there or do not fit.
        """
        from .classify import Classify

        return Classify(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the width."""
        if self.model == "vit" and self.width % self.heads:
            yield "--heads", f"{self.heads} heads do not divide the width {self.width}"

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Those of the fields here, and the others'."""
        if name == "shift":
            return 0, 2**31, "0 or more"
        if name == "valid_share":
            return 1e-9, 1 - 1e-9, "between 0 and 1"
        return super().bounds(name)
