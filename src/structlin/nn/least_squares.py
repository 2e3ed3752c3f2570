"""Fitting the factors of one term to a matrix where no single SVD does it, for all inputs or for typical ones.

Each factor alone is a linear least-squares problem whose normal equations are a small einsum of the other factors, so
one solver serves every chain (BLAST, products of structures, weighted Kronecker); where they are large, some steps of
conjugate gradients do. `block_fit` has two factors over column blocks of the input.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import lru_cache

import torch
from opt_einsum import contract_expression
from torch import Tensor

from .. import analysis
from ..ops import reference
from ..ops.lookup import collect, gather
from ..plan import Axes, Plan, Term

LARGE = 128  # matrices above this size are split by eigenvectors where single precision is wanted
LARGEST = 4096  # unknowns of one system of normal equations
PROGRESS = 1e-5  # a fit goes on while a sweep lowers the squared error by this share of it
ON_INPUTS = 1e-4  # the same on inputs, of which there is a sample only
NEAR = 1e-6  # a share of the squared weight; residuals below are too small to be told from sums over the weight
STEPS = 20  # of conjugate gradients, where a system is larger than that


def truncated(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(batch, rows, columns) -> the nearest product of (batch, rows, rank) and (batch, rank, columns)."""
    if blocks.dtype in (torch.float32, torch.complex64) and min(blocks.shape[1:]) > LARGE:
        return _truncated_by_gram(blocks, rank)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[..., :kept].sqrt()
    up = blocks.new_zeros(*blocks.shape[:2], rank)
    down = blocks.new_zeros(blocks.shape[0], rank, blocks.shape[2])
    up[..., :kept] = u[..., :kept] * root[..., None, :]
    down[:, :kept] = vh[:, :kept] * root[..., None]
    return up, down


def matrix(plan: Plan, term: Term, factors: dict[str, Tensor]) -> Tensor:
    """The (out_features, in_features) matrix of one term."""
    first = factors[term.names[0]]
    z = torch.eye(plan.in_features, dtype=first.dtype, device=first.device)
    z = (z if term.table is None else gather(z, term.table)).reshape(-1, *plan.shape(term.x))
    for name, step in zip(term.names, term.steps, strict=True):
        z = reference.contract(z, factors[name], step.equation)
    z = z.reshape(-1, plan.size(term.y))
    return (z if term.out_table is None else collect(z, term.out_table)).T


def read(plan: Plan, term: Term, weight: Tensor) -> Tensor:
    """A matrix with the axes of the output, then those of the input, as the ends of a term read them."""
    weight = weight if term.table is None else gather(weight, term.table)
    weight = weight if term.out_table is None else gather(weight.mT, term.out_table).mT
    return weight.reshape(plan.shape(term.y + term.x))


def _truncated_by_gram(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # the eigenvectors of the smaller Gram matrix, in float64, are single precision singular vectors at a fraction of
    # the time of an SVD
    if blocks.shape[1] > blocks.shape[2]:
        up, down = _truncated_by_gram(blocks.mT, rank)
        return down.mT, up.mT
    up = blocks.new_zeros(*blocks.shape[:2], rank)
    down = blocks.new_zeros(blocks.shape[0], rank, blocks.shape[2])
    kept = min(rank, blocks.shape[1])
    for i, block in enumerate(blocks):  # one by one: float64 copies of all would be large
        wide = block.to(torch.promote_types(block.dtype, torch.float64))
        square, vectors = torch.linalg.eigh(wide @ wide.mH)
        square, vectors = square[-kept:], vectors[:, -kept:]
        root = torch.where(square > 1e-15 * square[-1], square, torch.inf) ** 0.25  # the others are rounding
        up[i, :, :kept] = torch.where(root.isfinite(), vectors * root, 0)
        down[i, :kept] = vectors.mH @ wide / root[:, None]
    return up, down


def size(weight: Tensor, covariance: Tensor | None) -> float:
    """Squared norm of a matrix, or of its outputs over inputs of this covariance."""
    if covariance is None:
        return float(weight.abs().square().sum())
    return float(((weight @ covariance) * weight.conj()).real.sum())


def ridged(gram: Tensor) -> Tensor:
    """Gram matrices that can be solved with, also where they are zero or singular."""
    ridge = 1e-13 * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1, keepdim=True) + torch.finfo(gram.real.dtype).tiny
    gram = gram.clone()
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return gram


def falls(error: float, last: float, whole: float, dtype: torch.dtype = torch.float64, share: float = PROGRESS) -> bool:
    """Whether another sweep is worth it: the squared error fell by a share of it, and is not yet the rounding of
    ``dtype``."""
    rounding = max(1e-24, (4 * torch.finfo(dtype).eps) ** 2)
    return last - error > share * error and error > rounding * whole


def descend(
    factors: dict[str, Tensor],
    sweep: Callable[[dict[str, Tensor], int], tuple[dict[str, Tensor], float]],
    goes_on: Callable[[float, float], bool],
    sweeps: int,
) -> dict[str, Tensor]:
    """Sweep after sweep, each with its number, as long as one of this error after one of the last error ``goes_on``.

    A sweep starts ahead of the last result, in the direction from the one before and by a share of that step which
    grows towards all of it (Nesterov 1983). One that does not pay from there is followed by one from the best result.
    """
    ahead, last, paid = factors, float("inf"), 0
    for number in range(sweeps):
        found, error = sweep(ahead, number)
        pays, before = goes_on(error, last), factors
        if error < last:
            factors, last = found, error
        if not pays and paid == 0:
            break
        share = paid / (paid + 3) if pays else 0.0
        ahead = {name: factor + share * (factor - before[name]) for name, factor in factors.items()}
        paid = paid + 1 if pays else 0
    return factors


def alternate(
    plan: Plan, term: Term, weight: Tensor, start: dict[str, Tensor], covariance: Tensor | None, sweeps: int
) -> dict[str, Tensor]:
    """Least squares for one factor after the other, in float64, until the error no longer falls.

    Factors start from ``start`` where they are there, else from seeded random ones.
    """
    dtype = torch.promote_types(weight.dtype, torch.float64)
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: start[name].to(dtype)
        if name in start
        else analysis.init_std(plan, name)
        * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64).to(weight.device, dtype)
        for name, shape in ((name, plan.shapes[name]) for name in term.names)
    }
    system = _System(plan, term, weight.to(dtype), covariance)
    if len(term.names) == 1 and not system.is_large(term.names[0]):
        return {term.names[0]: system.solve(term.names[0], factors, False)[0]}
    error = system.error(factors)

    def sweep(factors: dict[str, Tensor], _: int) -> tuple[dict[str, Tensor], float]:
        nonlocal error
        near, left = error < NEAR * system.whole, weight
        for name in term.names:
            found, left = system.solve(name, factors, near)
            factors = factors | {name: found}
        error = float(left)
        return factors, error

    share = PROGRESS if covariance is None else ON_INPUTS

    def goes_on(error: float, last: float) -> bool:
        return falls(error, last, system.whole, weight.dtype, share)

    return descend(factors, sweep, goes_on, sweeps)


class _System:
    """The normal equations of every factor of one term."""

    def __init__(self, plan: Plan, term: Term, weight: Tensor, covariance: Tensor | None) -> None:
        self.plan, self.term, self.weight, self.covariance = plan, term, weight, covariance
        self.whole = size(weight, covariance)
        self.aim = weight if covariance is None else weight @ covariance
        used = {a for w in term.weights for a in w}
        self.repeats = plan.size(a for a in term.x if a not in used) if covariance is None else 1
        self.axes = dict(zip(term.names, term.weights, strict=True))
        # of an axis that is summed twice, once for each copy of the other factors, the second copy is primed
        fixed = {*term.y} if covariance is not None else {*term.y, *term.x}
        self.moving = {a for axes in (term.x, *term.weights) for a in axes if a not in fixed}
        names = [*plan.sizes, *(f"{a}'" for a in sorted(self.moving))]
        self.letters = dict(zip(names, string.ascii_letters, strict=False))

    def is_large(self, name: str) -> bool:
        """Whether `solve` comes nearer to the best factor ``name``, and not to it."""
        return self.plan.size(a for a in self.axes[name] if a in self.moving) > LARGEST

    def solve(self, name: str, factors: dict[str, Tensor], near: bool) -> tuple[Tensor, Tensor]:
        """The best factor ``name`` for the others as they are, and the squared error with it.

        Of factors that are ``near`` a correction is found, so that rounding is that of the residual.
        """
        axes, others = self.axes[name], [other for other in self.term.names if other != name]
        unknown = tuple(a for a in axes if a in self.moving)
        seen = {a for other in others for a in self.axes[other]}
        if self.covariance is not None:
            seen |= {*self.term.x}
        batch = tuple(a for a in axes if a not in self.moving and a in seen)
        apart = tuple(a for a in axes if a not in self.moving and a not in seen)
        order, large = batch + unknown + apart, self.is_large(name)
        whole, aim = self._residual(factors) if near or large else (self.whole, self.aim)
        right = self._onto(aim, others, order, factors)
        if large:
            found = self._descend(order, others, factors, right)
        else:
            n = self.plan.size(unknown)
            gram = ridged(self._gram(others, batch, unknown, factors).reshape(-1, n, n))
            found = torch.linalg.solve(gram, right.reshape(len(gram), n, -1) / self.repeats).reshape(right.shape)
        left = whole - (right.conj() * found).real.sum()  # what a solution of normal equations leaves
        found = self._einsum([(found, order)], axes)
        return (factors[name] + found if near or large else found), left

    def error(self, factors: dict[str, Tensor]) -> float:
        """Squared error of the factors."""
        return self._residual(factors)[0]

    def _residual(self, factors: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Its squared size, and the residual on the inputs."""
        residual = self.weight - matrix(self.plan, self.term, factors)
        return size(residual, self.covariance), residual if self.covariance is None else residual @ self.covariance

    def _onto(self, aim: Tensor, others: list[str], want: Axes, factors: dict[str, Tensor]) -> Tensor:
        """The right side of the normal equations: half of how fast the squared error falls along a factor."""
        operands = [(read(self.plan, self.term, aim), self.term.y + self.term.x)]
        return self._einsum([*operands, *((factors[o].conj(), self.axes[o]) for o in others)], want)

    def _descend(self, axes: Axes, others: list[str], factors: dict[str, Tensor], right: Tensor) -> Tensor:
        """A correction to one factor by some steps of conjugate gradients, which never makes the error larger."""
        operands = self._normal(others, factors)
        found, rest, direction = torch.zeros_like(right), right, right
        length = float(rest.abs().square().sum())
        first = length
        for _ in range(STEPS):
            if length <= 1e-24 * first:
                break
            applied = self._einsum([*operands, (direction, self._primed(axes))], axes) * self.repeats
            step = length / float((direction.conj() * applied).real.sum())
            found, rest = found + step * direction, rest - step * applied
            before, length = length, float(rest.abs().square().sum())
            direction = rest + length / before * direction
        return found

    def _gram(self, others: list[str], batch: Axes, unknown: Axes, factors: dict[str, Tensor]) -> Tensor:
        operands = self._normal(others, factors)
        return self._einsum(operands, batch + unknown + self._primed(unknown)) if operands else self.weight.new_ones(1)

    def _normal(self, others: list[str], factors: dict[str, Tensor]) -> list[tuple[Tensor, Axes]]:
        """What the matrix of the normal equations is the product of."""
        operands = [(factors[o].conj(), self.axes[o]) for o in others]
        operands += [(factors[o], self._primed(self.axes[o])) for o in others]
        if self.covariance is not None:
            shape = self.plan.shape(self.term.x)
            covariance = self.covariance
            if self.term.table is not None:
                covariance = gather(gather(covariance, self.term.table).mT, self.term.table).mT
            operands.append((covariance.reshape(shape + shape), self._primed(self.term.x) + self.term.x))
        return operands

    def _primed(self, axes: Axes) -> Axes:
        return tuple(f"{a}'" if a in self.moving else a for a in axes)

    def _einsum(self, operands: list[tuple[Tensor, Axes]], want: Axes) -> Tensor:
        spell = ",".join("".join(self.letters[a] for a in axes) for _, axes in operands)
        spell = f"{spell}->{''.join(self.letters[a] for a in want)}"
        result: Tensor = _expression(spell, *(tensor.shape for tensor, _ in operands))(*(t for t, _ in operands))
        return result


@lru_cache(1024)
def _expression(spell: str, *shapes: torch.Size) -> Callable[..., Tensor]:
    # torch.einsum looks for the cheapest order of more than two operands again at every call
    expression: Callable[..., Tensor] = contract_expression(spell, *shapes)
    return expression
