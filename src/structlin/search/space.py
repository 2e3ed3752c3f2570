"""What a search looks through: families of structures, listed with the values of their parameters, and the continuous
space of two-factor einsums.

A candidate is a line of text, as ``monarch:nblocks=4`` or ``einsum:theta=...``, so that studies, records and reports
hold the same thing and a user can give it to any other command.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Protocol

from ..analysis import Taxonomy, taxonomy, taxonomy_of_theta
from ..spec import Spec, parse
from ..structures import BTT, Einsum
from ..train.config import OptionError

HEADS = "head_btt"
"""The family of BTT whose output axes are the attention heads (Potapczynski et al. 2024, figure 10): the first factor's
digit of queries, keys and values counts heads, and so does the digit of what the output projection reads."""

EINSUM = "einsum"

GRID = (
    (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0),
    (0.33, 0.0, 0.67, 0.0, 0.67, 0.33, 0.0),
    (0.25, 0.0, 0.75, 0.0, 0.75, 0.25, 0.0),
    (0.67, 0.0, 0.33, 0.0, 0.67, 0.33, 0.0),
    (0.33, 0.0, 0.67, 0.0, 0.33, 0.67, 0.0),
    (0.75, 0.0, 0.25, 0.0, 0.75, 0.25, 0.0),
    (0.25, 0.0, 0.75, 0.0, 0.25, 0.75, 0.0),
    (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.25),
    (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.33),
    (0.33, 0.0, 0.67, 0.0, 0.67, 0.33, 0.25),
    (0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.0),
    (0.33, 0.67, 0.0, 0.33, 0.67, 0.0, 0.0),
    (0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.25),
    (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.75),
    (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5),
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.0),
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25),
)
"""Points ``(alpha, beta, gamma, delta, epsilon, phi, rho)`` of the published search (Potapczynski et al. 2024): BTT,
then tensor trains, low rank, and points between."""


class Trial(Protocol):
    """What a candidate is drawn from: the part of `optuna.Trial` that is used here."""

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """One of ``choices``."""
        ...

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        ...


@dataclass(frozen=True)
class Space:
    """Listed candidates, and whether points of the continuous space of einsums are among what can be drawn.

    Attributes:
        listed: candidates, checked, each once; what a grid runs through, with the points of `GRID` where the continuous
            space is part of it.
        continuous: whether the family ``einsum`` was given without parameters.
    """

    listed: tuple[str, ...]
    continuous: bool

    def grid(self) -> list[str]:
        """Every candidate of a grid, in order."""
        points = [text_of(theta) for theta in GRID] if self.continuous else []
        return list(dict.fromkeys([*points, *self.listed]))

    def draw(self, trial: Trial) -> str:
        """A candidate for ``trial``; the continuous space counts as one family beside the listed candidates."""
        choices = [*([EINSUM] if self.continuous else []), *self.listed]
        chosen = choices[0] if len(choices) == 1 else trial.suggest_categorical("structure", choices)
        if chosen != EINSUM:
            return chosen
        names = ("alpha", "beta_share", "epsilon", "delta_share", "rho_share")
        return text_of(theta_of(*(trial.suggest_float(name, 0.0, 1.0) for name in names)))


def parse_space(text: str) -> Space:
    """A space from the command line: families with commas between, the values of a parameter with slashes between.

    >>> parse_space("monarch:nblocks=2/4,low_rank:rank=8").listed
    ('monarch:nblocks=2', 'monarch:nblocks=4', 'low_rank:rank=8')
    >>> parse_space("einsum").continuous
    True

    Raises:
        OptionError: for a structure or parameter that is unknown, or nothing at all.
    """
    listed: list[str] = []
    continuous = False
    for family in filter(None, map(str.strip, text.split(","))):
        if family == EINSUM:
            continuous = True
            continue
        name, *parameters = family.split(":")
        values = [[f"{head}={value}" for value in tail.split("/")] if (tail := part.partition("=")[2]) else [part]
                  for part in parameters for head in [part.partition("=")[0]]]  # fmt: skip
        for chosen in product(*values):
            candidate = ":".join([name, *chosen])
            try:
                spec_of(candidate)
            except ValueError as error:
                raise OptionError("--space", f"{candidate}: {error}") from None
            listed.append(candidate)
    if not listed and not continuous:
        raise OptionError("--space", f"{text!r} names no structure; give some, as einsum,monarch:nblocks=2/4")
    return Space(tuple(dict.fromkeys(listed)), continuous)


def theta_of(
    alpha: float, beta_share: float, epsilon: float, delta_share: float, rho_share: float
) -> tuple[float, ...]:  # fmt: skip
    """The point of the space of einsums for five numbers from 0 to 1, each exponent rounded to two decimals.

    beta and delta are shares of what alpha and epsilon leave, gamma and phi the rest, and rho a share of
    min(alpha, epsilon), over which the rank is degenerate. Where min(alpha, epsilon) < min(beta, delta) the factors
    change places, which gives the same matrices with the cheaper order of the products.
    """
    beta, delta = (1 - alpha) * beta_share, (1 - epsilon) * delta_share
    if min(alpha, epsilon) < min(beta, delta):
        alpha, beta, epsilon, delta = beta, alpha, delta, epsilon
    rho = rho_share * min(alpha, epsilon)
    ends = []
    for contracted, waiting in ((alpha, beta), (epsilon, delta)):
        first, second = round(contracted, 2), round(waiting, 2)
        ends.append((first, second, round(max(0.0, 1 - first - second), 2)))
    (alpha, beta, gamma), (epsilon, delta, phi) = ends
    return (alpha, beta, gamma, delta, epsilon, phi, round(rho, 2))


def text_of(theta: tuple[float, ...]) -> str:
    """A point as a candidate: ``einsum:theta=0.5x0.0x0.5x0.0x0.5x0.5x0.0``."""
    return str(Einsum(theta=theta))


@cache
def spec_of(candidate: str) -> Spec:
    """The structure of a candidate; of the head-aligned family what layers outside of attention get.

    Raises:
        ValueError: for a structure or parameter that is unknown.
    """
    name, colon, rest = candidate.partition(":")
    return parse(f"btt{colon}{rest}" if name == HEADS else candidate)


def aligned(candidate: str, heads: int, head_width: int) -> dict[str, Spec]:
    """Rules for the attention of a decoder, by the end of a layer's name; none for candidates of other families."""
    spec = spec_of(candidate)
    if not isinstance(spec, BTT) or candidate.partition(":")[0] != HEADS:
        return {}
    return {
        "*.attn.qkv": BTT(rank=spec.rank, in_dims=(heads, head_width), out_dims=(3 * heads, head_width)),
        "*.attn.proj": BTT(rank=spec.rank, in_dims=(heads, head_width), out_dims=(heads, head_width)),
    }


def place(candidate: str, width: int) -> Taxonomy:
    """Where a candidate stands in the taxonomy: by its exponents if it has some, else by its sizes at a square layer.

    Raises:
        ValueError: for a width that does not fit.
    """
    spec = spec_of(candidate)
    if isinstance(spec, Einsum) and spec.theta:
        return taxonomy_of_theta(spec.theta)
    return taxonomy(spec.plan(width, width))
