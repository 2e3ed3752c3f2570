"""A training run on solutions of a differential equation, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...train.config import OptionError
from ...train.settings import setting
from ..problem import Problem, ProblemRecipe


@dataclass(frozen=True, kw_only=True)
class OperatorRecipe(ProblemRecipe):
    """An operator learned from solutions that are computed for the run, or were for an earlier one.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    TITLE = "operators"

    equation: Literal["navier_stokes", "burgers", "darcy"] = setting("navier_stokes", "what is solved")
    viscosity: float = setting(1e-3, "of the fluid; not for darcy")
    resolution: int = setting(64, "points per axis that the model sees")
    grid: int = setting(64, "points per axis of the solver, a multiple of the resolution")
    time_step: float = setting(0.02, "of the solver; not for darcy")
    initial_variance: float = setting(343.0, "factor of the covariance of the initial vorticity")
    times: int = setting(50, "times that are kept of a solution")
    history: int = setting(10, "of these, the first that are given; the others are predicted")
    samples: int = setting(1000, "solutions to train on")
    valid_samples: int = setting(50, "solutions to validate on")
    test_samples: int = setting(200, "solutions to test on")
    data_seed: int = setting(0, "of the solutions")
    cache: str = setting("runs/cache", "folder for solutions")

    model: Literal["fno", "monarch_no", "unet"] = setting("fno", "the operator")
    width: int = setting(20, "its channels")
    modes: int = setting(12, "of each axis, that a layer of fno or monarch_no keeps")
    depth: int = setting(4, "layers of fno or monarch_no")
    transform_lr: float = setting(0.1, "multiplies the learning rate of the transforms of monarch_no")
    pad: int = setting(0, "points added to each axis for fno and monarch_no")
    short: int = setting(5, "times predicted in the first updates, from anywhere in a solution")
    short_share: float = setting(0.5, "share of the updates that are such")

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Least and largest value of a number, and how to say so."""
        if name in ("pad", "data_seed"):
            return 0, 2**31, "0 or more"
        if name == "short_share":
            return 0, 1, "0 to 1"
        if name == "time_step":
            return 1e-9, 1, "positive numbers up to 1"
        if name in ("viscosity", "initial_variance", "transform_lr"):
            return 1e-300, 1e300, "positive numbers"
        return super().bounds(name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Option and message of all that is wrong with the fields together."""
        if self.data:
            yield "--data", f"{self.data[0]} is given; allowed: nothing, the solutions are computed"
        if self.history >= self.times:
            yield (
                "--history",
                f"{self.history} is given; allowed: 1 to {self.times - 1}, as there are {self.times} times",
            )
        elif self.short > self.horizon:
            yield "--short", f"{self.short} is given; allowed: 1 to {self.horizon}"
        if self.equation != "navier_stokes" and self.times != 2:
            yield "--times", f"{self.times} is given; allowed for {self.equation}: 2, the given and the wanted function"
        if self.resolution < 4:
            yield "--resolution", f"{self.resolution} is given; allowed: 4 or more"
        elif self.equation == "darcy" and (self.grid - 1) % (self.resolution - 1):
            yield "--grid", f"{self.grid} is given; allowed: 1 + multiples of {self.resolution - 1}"
        elif self.equation != "darcy" and self.grid % self.resolution:
            yield "--grid", f"{self.grid} is given; allowed: multiples of {self.resolution}"
        if 1e-9 <= self.time_step <= 1 and abs(round(1 / self.time_step) * self.time_step - 1) > 1e-6:
            near = 1 / round(1 / self.time_step)
            yield "--time-step", f"{self.time_step} is given; allowed: 1 / a whole number, as {near:g}"
        yield from self._problems_of_the_model()

    def problem(self) -> Problem:
        """The problem, with its solutions computed or read.

        Raises:
            OptionError: for a step of the solver that is too large, or a file of solutions that cannot be read.
        """
        from .problem import OperatorProblem

        try:
            return OperatorProblem(self)
        except ValueError as error:
            raise OptionError("--time-step, --cache", str(error)) from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Points along each axis of a function."""
        return (self.resolution,) * (1 if self.equation == "burgers" else 2)

    @property
    def horizon(self) -> int:
        """Times that are predicted."""
        return self.times - self.history

    def _problems_of_the_model(self) -> Iterator[tuple[str, str]]:
        if self.model == "unet":
            if self.equation != "navier_stokes" or self.resolution % 8:
                yield "--model", (f"unet is given for {self.equation} at a resolution of {self.resolution}; "
                                  "allowed: navier_stokes at a multiple of 8")  # fmt: skip
            if self.structure != "dense":
                yield "--structure", f"{self.structure} is given; allowed for unet, which has no linear layer: dense"
            return
        length = self.resolution + self.pad
        if 2 * self.modes > length:
            yield "--modes", f"{self.modes} is given; allowed: 1 to {length // 2}, half of the points"
        if self.model == "monarch_no" and (length < 4 or all(length % n for n in range(2, int(length**0.5) + 1))):
            yield (
                "--pad",
                f"{self.pad} makes an axis of {length} points; allowed for monarch_no: a number that is no prime",
            )
