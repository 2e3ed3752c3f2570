"""A training run on images from undersampled coils, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...train.settings import setting
from ...widths import balanced
from ..problem import Problem, ProblemRecipe
from .acquisition import Pattern, centre_columns
from .metrics import WINDOW


@dataclass(frozen=True, kw_only=True)
class MriRecipe(ProblemRecipe):
    """Images from measurements of several coils that leave out columns of k-space.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    TITLE = "MRI"

    model: Literal["monarch_sense", "unet"] = setting("monarch_sense", "what reconstructs")
    size: tuple[int, ...] = setting((224, 224), "rows and columns of the images")
    acceleration: int = setting(4, "columns of k-space over those that are measured")
    pattern: Pattern = setting("equispaced", "which columns outside of the centre are measured")  # noqa: RUF009
    coils: int = setting(8, "of the simulated scanner")
    noise: float = setting(0.01, "of each coil's image, standard deviation, the brightest pixel being 1")
    shots: int = setting(0, "slices to train on; 0: all but those to validate on")
    valid_slices: int = setting(64, "training slices to validate on")
    test_slices: int = setting(0, "test slices; 0: all")
    tikhonov: float | None = setting(None, "weight in SENSE; none: the one with the best pSNR on training slices")
    iterations: int = setting(12, "steps of conjugate gradients in SENSE")
    similarity: float = setting(0.01, "weight of 1 - SSIM in the loss, beside the mean squared error")
    given: Literal["zero_filled", "sense"] = setting("zero_filled", "what unet corrects")
    channels: int = setting(24, "of the first stage of unet")

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Least and largest value of a number, and how to say so."""
        if name in ("shots", "test_slices"):
            return 0, 2**31, "0 or more"
        if name in ("noise", "similarity", "tikhonov"):
            return 0, 1e3, "0 to 1000"
        return super().bounds(name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Option and message of all that is wrong with the fields together."""
        if len(self.size) != 2 or min(self.size) < WINDOW:
            yield (
                "--size",
                f"{' '.join(map(str, self.size))} is given; allowed: rows and columns, each {WINDOW} or more",
            )
            return
        if self.structure != "dense":
            yield (
                "--structure",
                f"{self.structure} is given; allowed: dense, as the models have no linear layers to replace",
            )
        prime = [side for side in self.size if balanced(side)[0] == 1]
        if self.model == "monarch_sense" and prime:
            yield "--size", f"{prime[0]} is prime; allowed for monarch_sense: products of two numbers above 1"
        if self.model == "unet" and max(self.size) <= 16:
            yield "--size", f"{' '.join(map(str, self.size))} is given; allowed for unet: one side of 17 or more"
        if self.model == "monarch_sense" and self.dtype != "float32":
            yield "--dtype", f"{self.dtype} is given; allowed for monarch_sense: float32, as its numbers are complex"
        total, centre = self.size[1] // self.acceleration, centre_columns(self.size[1], self.acceleration)
        if self.acceleration > 1 and total < centre:
            most = max(a for a in range(1, self.size[1]) if self.size[1] // a >= centre_columns(self.size[1], a))
            yield (
                "--acceleration",
                (
                    f"{self.acceleration}x leaves {total} of {self.size[1]} columns, and the centre has {centre}; "
                    f"allowed: 1 to {most}"
                ),
            )

    def problem(self) -> Problem:
        """The problem, with its images read."""
        from .problem import MriProblem

        return MriProblem(self)
