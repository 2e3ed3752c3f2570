"""What a plan implies, for every structure at once: costs, rank, scales. Pure Python, so candidates can be ranked
by the thousand without building one. If a fact can be read off the plan it is written here and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import combinations, product
from math import log
from typing import NamedTuple

from .padding import Digits, digits
from .plan import Axes, Plan, Step, Term

OPTIMIZERS = ("adam", "sgd")
"""The kinds of optimizer that `lr_scale` knows: Adam and what divides by the size of its gradient, and SGD."""


def num_params(plan: Plan) -> int:
    """Number of weights in all factors (without a bias, and without the places of trained masks)."""
    return sum(plan.size(step.w) for _, step in plan.factors.values())


def step_flops(plan: Plan, step: Step) -> int:
    """Forward FLOPs of one step for one token, a multiply-add counted as two."""
    return 2 * plan.size({*step.x, *step.w})


def flops(plan: Plan) -> int:
    """Forward FLOPs for one token, a multiply-add counted as two; the backward pass costs twice that."""
    return sum(step_flops(plan, step) for _, step in plan.factors.values())


def compute(plan: Plan) -> float:
    """FLOPs as a fraction of those of the dense matrix of the same shape."""
    return flops(plan) / (2 * plan.in_features * plan.out_features)


def traffic(plan: Plan, tokens: int, itemsize: int = 2) -> int:
    """Bytes that a forward pass moves when every step, every lookup of blocks and every copy that adds padding or cuts
    it off reads its operands and writes its result once."""
    looked_up = sum(
        plan.width(axes, table) + plan.size(axes)
        for term in plan.terms
        for axes, table in ((term.x, term.table), (term.y, term.out_table))
        if table is not None
    )
    ends = zip(plan.padded, (plan.out_features, plan.in_features), strict=True)
    copied = sum(whole + kept for whole, kept in ends if whole != kept)  # adding the padding and cutting it off
    steps = [step for _, step in plan.factors.values()]
    moved = looked_up + copied + sum(plan.size(step.x) + plan.size(step.y) for step in steps)
    return itemsize * (tokens * moved + sum(plan.size(step.w) for step in steps))


def factor_products(term: Term) -> list[tuple[Axes, Axes, Axes]]:
    """The products ``a, b -> c`` that multiply the factors of a term from left to right, none for a single factor.

    The last ends in the axes of the output, those of the input that it does not have, and no others.
    """
    found: list[tuple[Axes, Axes, Axes]] = []
    have = term.weights[0]
    for i, w in enumerate(term.weights[1:], 2):
        needed = {*term.x, *term.y}.union(*term.weights[i:])
        both = tuple(axis for axis in dict.fromkeys(have + w) if axis in needed)
        found.append((have, w, both))
        have = both
    return found


def fused_traffic(plan: Plan, tokens: int, itemsize: int = 2) -> int:
    """Bytes that any forward pass moves at least: the input, the output and every factor, once each."""
    return itemsize * (tokens * (plan.in_features + plan.out_features) + num_params(plan))


def saved_activations(plan: Plan) -> int:
    """Elements per token that the backward pass needs: the input, once, what a table looks up, every intermediate."""
    hidden = sum(plan.size(step.y) for term in plan.terms for step in term.steps[:-1])
    return plan.padded[1] + hidden + sum(plan.size(term.x) for term in plan.terms if term.table is not None)


def rank_bound(plan: Plan) -> int:
    """Largest rank of the matrix, attained by generic factors: the minimum cut between input and output.

    In each term's tensor network every factor stands on the side of the input or of the output; the sizes of the
    axes that cross multiply, and the smallest product over all divisions bounds the rank. Terms add. Of a padded
    matrix it is a bound only: how the padding falls into blocks can cost a little more.
    """

    def cut(term: Term) -> int:
        best = []
        for side in product((0, 1), repeat=len(term.weights)):
            nodes = [(term.x, 0), (term.y, 1), *zip(term.weights, side, strict=True)]
            sides = {axis: {s for axes, s in nodes if axis in axes} for axis in {a for axes, _ in nodes for a in axes}}
            best.append(plan.size(axis for axis, both in sides.items() if len(both) == 2))
        return min(best)

    return min(plan.in_features, plan.out_features, sum(map(cut, plan.terms)))


@lru_cache(maxsize=256)  # counts every feature, and a model has few shapes
def density(plan: Plan) -> float:
    """Fraction of the entries of the matrix that can be other than zero, exact.

    A term links an output to an input when both have the same digits on the axes that it reads and writes alike.
    The union over the terms is counted by inclusion and exclusion, from how many features have which digits.
    """
    if any(set(term.x).isdisjoint(term.y) for term in plan.terms):
        return 1.0
    classes = [digits(plan, term) for term in plan.terms]
    linked = 0
    for size in range(1, len(classes) + 1):
        for chosen in combinations(classes, size):
            inputs, outputs = (_together(ends) for ends in zip(*chosen, strict=True))
            pairs = sum(n * outputs[values] for values, n in inputs.items())
            linked += pairs if size % 2 else -pairs
    return linked / (plan.in_features * plan.out_features)


def _together(ends: Sequence[Digits]) -> Counter[tuple[Hashable, ...]]:
    """How many features have which digits in each of several terms."""
    return Counter(values for feature in zip(*ends, strict=True) for values in product(*feature))


class Taxonomy(NamedTuple):
    """Exponents of the taxonomy of Potapczynski et al. 2024 (section 3), in the width d of the matrix.

    Attributes:
        omega: parameter sharing, params ~ FLOPs / d**omega; 0 when every weight is used once per token.
        psi: rank ~ d**psi; 1 is full rank.
        nu: compute, FLOPs ~ d**(1 + nu); 1 is that of a dense matrix.
    """

    omega: float
    psi: float
    nu: float


def taxonomy(plan: Plan) -> Taxonomy:
    """Where a matrix stands in the taxonomy, read off its sizes: the exponents of its largest step and factor.

    The width is the geometric mean of both widths. For plans whose sizes are powers of the width these are the
    exponents of the family; otherwise constant factors show, as the 1/4 of a block-diagonal matrix of four blocks.
    """
    width = (plan.in_features * plan.out_features) ** 0.5
    if width == 1:
        return Taxonomy(0.0, 1.0, 1.0)
    steps = [step for term in plan.terms for step in term.steps]
    uses = max(plan.size({*step.x, *step.w}) for step in steps)
    weights = max(plan.size(step.w) for step in steps)
    return Taxonomy(log(uses / weights, width), log(rank_bound(plan), width), log(uses, width) - 1)


def taxonomy_of_theta(theta: Sequence[float]) -> Taxonomy:
    """The exponents of a point ``(alpha, beta, gamma, delta, epsilon, phi, rho)`` of the space of einsums.

    ``omega = min(alpha + delta, beta + epsilon) - min(alpha, epsilon)``, ``psi = 1 + min(0, 1 + rho - alpha -
    epsilon)``, ``nu = 1 + rho - min(alpha, epsilon)`` (Potapczynski et al. 2024, section 3). Where min(alpha, epsilon)
    is below min(beta, delta), points that the paper leaves out as redundant, psi is only a bound.
    """
    alpha, beta, _, delta, epsilon, _, rho = theta
    smaller = min(alpha, epsilon)
    omega = min(alpha + delta, beta + epsilon) - smaller
    return Taxonomy(omega, 1 + min(0.0, 1 + rho - alpha - epsilon), 1 + rho - smaller)


def fan(plan: Plan, name: str) -> tuple[int, int]:
    """Fan-in and fan-out of one factor: sizes of the axes that its step contracts and brings in."""
    _, step = plan.factors[name]
    return plan.size(step.contract), plan.size(step.out)


def init_std(plan: Plan, name: str) -> float:
    """Standard deviation of one factor under the spectral (muP) rule.

    Each factor gets ``sqrt(min(1, fan_out / fan_in) / fan_in)`` (Potapczynski et al. 2024, section on initialisation),
    divided by the root of the number of terms so that a sum has the scale of one matrix.
    """
    fan_in, fan_out = fan(plan, name)
    return float((min(1.0, fan_out / fan_in) / fan_in / len(plan.terms)) ** 0.5)


def lr_scale(plan: Plan, name: str, optimizer: str = "adam") -> float:
    """Learning rate of one factor relative to that of the dense layer it replaces, under ``"adam"`` or ``"sgd"``.

    Adam: ``(in_features / fan_in) / number of factors`` (Qiu et al. 2024, structure-aware learning rates). SGD: that
    times ``(features that the step yields) / (features that its term yields)``, derived in docs/learning-rates.md.
    The code of Potapczynski et al. 2024 has the factor's fan-out there, which is the same for a step without groups
    and waiting axes.

    Raises:
        ValueError: for another optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown; allowed: {', '.join(OPTIMIZERS)}")
    term, step = plan.factors[name]
    adam = plan.in_features / plan.size(step.contract) / len(plan.factors)
    return adam if optimizer == "adam" else adam * plan.size(step.y) / plan.size(term.y)
