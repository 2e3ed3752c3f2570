"""Fitting the factors of one term to a matrix where no single SVD does it, for all inputs or for typical ones.

Each factor alone is a linear least-squares problem whose normal equations are a small einsum of the other factors, so
one solver serves every chain (BLAST, products of structures, weighted Kronecker); where they are large, some steps of
conjugate gradients do. `block_fit` has two factors over column blocks of the input.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import torch
from torch import Tensor

from .. import analysis
from ..ops import reference
from ..ops.lookup import collect, gather
from ..plan import Axes, Plan, Term

LARGE = 128  # matrices above this size are split by eigenvectors where single precision is wanted
LARGEST = 4096  # unknowns of one system of normal equations
PROGRESS = 1e-5  # a fit goes on while a sweep lowers the squared error by this share of it
ON_INPUTS = 1e-4  # the same on inputs, of which there is a sample only
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
    ridge = 1e-13 * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None] + torch.finfo(gram.real.dtype).tiny
    return gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def falls(error: float, last: float, whole: float, dtype: torch.dtype = torch.float64, share: float = PROGRESS) -> bool:
    """Whether another sweep is worth it: the squared error fell by a share of it, and is not yet the rounding of
    ``dtype``."""
    rounding = max(1e-24, (4 * torch.finfo(dtype).eps) ** 2)
    return last - error > share * error and error > rounding * whole


def descend(
    factors: dict[str, Tensor],
    sweep: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
    error: Callable[[dict[str, Tensor]], float],
    goes_on: Callable[[float, float], bool],
    sweeps: int,
) -> dict[str, Tensor]:
    """Sweep after sweep, each with its number, as long as one of this error after one of the last error ``goes_on``.

    Before a sweep goes a step ahead in the direction of the last one, longer and longer, where that pays (Bro 1998).
    """
    before, last = factors, float("inf")
    for number in range(sweeps):
        step = number ** (1 / 3)
        further = {name: factor + step * (factor - before[name]) for name, factor in factors.items()}
        before = factors
        if number > 2 and error(further) < last:
            factors = further
        factors = sweep(factors, number)
        now = error(factors)
        if not goes_on(now, last):
            break
        last = now
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
        else torch.randn(plan.shapes[name], generator=generator, dtype=torch.float64).to(weight.device, dtype)
        * analysis.init_std(plan, name)
        for name in term.names
    }
    system = _System(plan, term, weight.to(dtype), covariance)
    if len(term.names) == 1 and not system.is_large(term.names[0]):
        return {term.names[0]: system.solve(term.names[0], factors)}

    def sweep(factors: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        for name in term.names:
            factors = factors | {name: system.solve(name, factors)}
        return factors

    share = PROGRESS if covariance is None else ON_INPUTS

    def goes_on(error: float, last: float) -> bool:
        return falls(error, last, system.whole, weight.dtype, share)

    return descend(factors, sweep, system.error, goes_on, sweeps)


class _System:
    """The normal equations of every factor of one term."""

    def __init__(self, plan: Plan, term: Term, weight: Tensor, covariance: Tensor | None) -> None:
        self.plan, self.term, self.weight, self.covariance = plan, term, weight, covariance
        self.whole = size(weight, covariance)
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

    def solve(self, name: str, factors: dict[str, Tensor]) -> Tensor:
        """The best factor ``name`` for the others as they are."""
        axes, others = self.axes[name], [other for other in self.term.names if other != name]
        unknown = tuple(a for a in axes if a in self.moving)
        seen = {a for other in others for a in self.axes[other]}
        if self.covariance is not None:
            seen |= {*self.term.x}
        batch = tuple(a for a in axes if a not in self.moving and a in seen)
        apart = tuple(a for a in axes if a not in self.moving and a not in seen)
        # a correction to the factor is found, not the factor: rounding is then that of the residual
        residual = self.weight - matrix(self.plan, self.term, factors)
        if self.is_large(name):
            return factors[name] + self._descend(name, others, factors, self._onto(residual, others, axes, factors))
        n = self.plan.size(unknown)
        right = self._onto(residual, others, batch + unknown + apart, factors)
        gram = ridged(self._gram(others, batch, unknown, factors).reshape(-1, n, n) * self.repeats)
        found = torch.linalg.solve(gram, right.reshape(len(gram), n, -1))
        return factors[name] + self._einsum([(found.reshape(right.shape), batch + unknown + apart)], axes)

    def _onto(self, residual: Tensor, others: list[str], want: Axes, factors: dict[str, Tensor]) -> Tensor:
        """The right side of the normal equations: half of how fast the squared error falls along a factor."""
        residual = residual if self.covariance is None else residual @ self.covariance
        operands = [(read(self.plan, self.term, residual), self.term.y + self.term.x)]
        return self._einsum([*operands, *((factors[o].conj(), self.axes[o]) for o in others)], want)

    def _descend(self, name: str, others: list[str], factors: dict[str, Tensor], right: Tensor) -> Tensor:
        """A correction to one factor by some steps of conjugate gradients, which never makes the error larger."""
        found, rest, direction = torch.zeros_like(right), right, right
        length = float(rest.abs().square().sum())
        first = length
        for _ in range(STEPS):
            if length <= 1e-24 * first:
                break
            through = matrix(self.plan, self.term, factors | {name: direction})
            applied = self._onto(through, others, self.axes[name], factors)
            step = length / float((direction.conj() * applied).real.sum())
            found, rest = found + step * direction, rest - step * applied
            before, length = length, float(rest.abs().square().sum())
            direction = rest + length / before * direction
        return found

    def _gram(self, others: list[str], batch: Axes, unknown: Axes, factors: dict[str, Tensor]) -> Tensor:
        operands = [(factors[o].conj(), self.axes[o]) for o in others]
        operands += [(factors[o], self._primed(self.axes[o])) for o in others]
        if self.covariance is not None:
            shape = self.plan.shape(self.term.x)
            covariance = self.covariance
            if self.term.table is not None:
                covariance = gather(gather(covariance, self.term.table).mT, self.term.table).mT
            operands.append((covariance.reshape(shape + shape), self._primed(self.term.x) + self.term.x))
        if not operands:
            return self.weight.new_ones(1)
        return self._einsum(operands, batch + unknown + self._primed(unknown))

    def _primed(self, axes: Axes) -> Axes:
        return tuple(f"{a}'" if a in self.moving else a for a in axes)

    def _einsum(self, operands: list[tuple[Tensor, Axes]], want: Axes) -> Tensor:
        spell = ",".join("".join(self.letters[a] for a in axes) for _, axes in operands)
        result: Tensor = torch.einsum(f"{spell}->{''.join(self.letters[a] for a in want)}", *(t for t, _ in operands))
        return result

    def error(self, factors: dict[str, Tensor]) -> float:
        """Squared error of the factors."""
        return size(self.weight - matrix(self.plan, self.term, factors), self.covariance)
