"""Dense weight -> nearest member of a structure.

One rule gives the closed forms: order the dense weight as [axes that the first factor shares with the others, rows,
columns], take a truncated SVD of every matrix, and go on with what is left for the other factors. For low rank this
is the SVD, for Kronecker the rearrangement of Van Loan and Pitsianis, for Monarch and BTT their block-wise SVD, for a
tensor train the TT-SVD; the axes say which. Sums of sparse patterns (DYAD) are least squares entry by entry. What
has no closed form is fitted by alternating least squares (`least_squares`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Boxcar
from ..plan import Plan, Term
from . import block_fit, least_squares, shared_bases
from .boxcar_projection import refuse
from .least_squares import matrix
from .trains import is_train, project_train

SWEEPS = 80  # of an alternating fit, at most; it stops before when the error no longer falls
ROUNDS = 300  # of fits of what others leave (terms of a sum, padding), at most


@torch.no_grad()
def project(plan: Plan, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
    """The factors of the matrix of ``plan`` that is nearest to ``weight`` in the Frobenius norm.

    Optimal for plans of one term with one or two factors and for sums of one-factor terms without shared weights;
    within a factor of sqrt(factors - 1) of optimal for chains in which neighbours share axes (tensor trains and their
    block forms); otherwise a local optimum. A member of the first three kinds comes back to rounding error.
    Of a padded matrix only the part that the layer keeps is fitted; what stands in the padding is free.

    Args:
        plan: the structure, at the shape of ``weight``.
        weight: (*, out_features, in_features), real or complex; half precision is computed in float32. Leading
            dimensions are separate matrices, as those of experts.
        inputs: (*, in_features), typical inputs x of the layer. If given, the factors minimise the error
            ``|(W - S) x|^2`` over them instead; a closed form for one factor, and for two where the first has no group
            axis of the input alone.

    Returns:
        Factor name -> tensor of the plan's shape (after the leading dimensions of ``weight``), in the dtype and on the
        device of ``weight``.

    Raises:
        ValueError: for a weight that `check` refuses, inputs of another width or with NaN or infinite entries, and with
            inputs a plan that adds up blocks.
    """
    check(plan, weight)
    if weight.dim() > 2:
        each = [project(plan, w, inputs) for w in weight.flatten(0, -3)]
        return {n: torch.stack([f[n] for f in each]).unflatten(0, weight.shape[:-2]) for n in plan.factors}
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    factors = _with_free_padding(plan, wide, {}, None)
    if inputs is not None:
        if any(term.out_table is not None for term in plan.terms):
            raise ValueError(f"{plan} cannot be fitted to inputs, as it adds up blocks; project without inputs")
        # from the nearest matrix on, so that the result is never worse than that
        factors = _with_free_padding(plan, wide, factors, _covariance(plan, inputs, wide))
    return {name: factors[name].to(weight.dtype).contiguous() for name in plan.factors}


def _with_free_padding(
    plan: Plan, weight: Tensor, factors: dict[str, Tensor], covariance: Tensor | None
) -> dict[str, Tensor]:
    """The best factors, from ``factors`` on, for a weight whose padding may be anything.

    The padding starts at zero and is then what the last fit has there, so that each fit comes nearer to the weight.
    Where padding is whole rows and columns of the matrices of a closed form, zero is what the first fit has and is
    optimal.
    """
    if plan.kept is None:
        return _nearest(plan, weight, factors, covariance)
    rows, columns = plan.kept
    plan = replace(plan, kept=None)
    weight = weight if covariance is None else weight.to(covariance.dtype)
    target = F.pad(weight, (0, plan.in_features - columns, 0, plan.out_features - rows))
    whole, last, best = least_squares.size(target, covariance), float("inf"), factors
    for _ in range(ROUNDS):
        factors = _nearest(plan, target, factors, covariance)
        found = torch.stack([matrix(plan, term, factors) for term in plan.terms]).sum(0)
        residual = torch.zeros_like(found)
        residual[:rows, :columns] = weight - found[:rows, :columns]
        error = least_squares.size(residual, covariance)
        best = factors if error < last else best
        outside = least_squares.size(found, None) - least_squares.size(found[:rows, :columns], None)
        if not least_squares.falls(error, last, whole) or outside <= 1e-12 * whole:
            break
        last, target = error, found + residual
    return best


def _nearest(plan: Plan, weight: Tensor, start: dict[str, Tensor], covariance: Tensor | None) -> dict[str, Tensor]:
    if covariance is not None:
        return _fit_sum(plan, weight, start, covariance)
    if len(plan.terms) == 1:
        return _fit_term(plan, plan.terms[0], weight, start, None, SWEEPS if not start else 2)
    if all(len(term.weights) == 1 and not term.steps[0].free for term in plan.terms):
        return _project_supports(plan, weight)
    return _fit_sum(plan, weight, start, None)


def check(plan: Plan, weight: Tensor, masks: Mapping[str, Boxcar] | None = None) -> None:
    """Whether `project`, or with trained ``masks`` `project_blocks`, can do this, found out without the work.

    Raises:
        ValueError: for a weight of another shape, without values (on the meta device) or with NaN or infinite ones, or
            a plan that cannot be fitted.
    """
    if tuple(weight.shape[-2:]) != (plan.out_features, plan.in_features):
        raise ValueError(f"the weight is {tuple(weight.shape)}, the plan {(plan.out_features, plan.in_features)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values to project")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries; there is no nearest structured matrix")
    if masks:
        refuse(plan, masks)
    for term in plan.terms:
        row = term.x[:1] if term.table is not None else term.y[:1] if term.out_table is not None else ()
        both = term.table is not None and term.out_table is not None
        if both or (row and (len(term.weights) > 1 or not {*row} <= {*term.x} & {*term.y})):
            raise ValueError(f"{plan} cannot be projected to: a chain that looks up blocks must be one factor of rows")


def _covariance(plan: Plan, inputs: Tensor, weight: Tensor) -> Tensor:
    if inputs.shape[-1] != plan.in_features or not torch.isfinite(inputs).all():
        raise ValueError(
            f"inputs must be finite and of width {plan.in_features}, not of shape {tuple(inputs.shape)}; "
            "give the inputs that the layer sees"
        )
    x = inputs.reshape(-1, plan.in_features).to(weight.device, torch.promote_types(weight.dtype, torch.float64))
    x = F.pad(x, (0, plan.padded[1] - plan.in_features))  # what no input has is left to the plain distance
    covariance = x.T @ x.conj() / max(1, len(x))
    # directions that no input has are left to the plain distance, at a millionth of the weight
    scale = covariance.diagonal().real.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return covariance + 1e-6 * scale * torch.eye(plan.padded[1], dtype=x.dtype, device=x.device)


def _project_supports(plan: Plan, weight: Tensor) -> dict[str, Tensor]:
    # every parameter stands at one entry; where terms overlap the smallest solution gives each the same part
    ones = {name: weight.new_ones(shape) for name, shape in plan.shapes.items()}
    cover = torch.stack([matrix(plan, term, ones) for term in plan.terms]).real.sum(0).clamp(min=1)
    factors: dict[str, Tensor] = {}
    for term in plan.terms:
        factors |= project_train(plan, term, weight / cover)
    return factors


def _fit_sum(plan: Plan, weight: Tensor, start: dict[str, Tensor], covariance: Tensor | None) -> dict[str, Tensor]:
    """Each term in turn against what the others leave, until the error no longer falls."""
    weight = weight if covariance is None else weight.to(covariance.dtype)
    factors, sweeps = dict(start), SWEEPS if len(plan.terms) == 1 else 2
    parts = [matrix(plan, term, start).to(weight.dtype) if start else torch.zeros_like(weight) for term in plan.terms]
    residual, whole = weight - torch.stack(parts).sum(0), least_squares.size(weight, covariance)
    last = least_squares.size(residual, covariance) if start else float("inf")
    for _ in range(ROUNDS):
        for i, term in enumerate(plan.terms):
            target = residual + parts[i]
            factors |= _fit_term(plan, term, target, factors, covariance, sweeps)
            parts[i] = matrix(plan, term, factors).to(weight.dtype)
            residual = target - parts[i]
        error = least_squares.size(residual, covariance)
        if len(plan.terms) == 1 or not least_squares.falls(error, last, whole):
            break
        last = error
    return factors


def _fit_term(
    plan: Plan, term: Term, weight: Tensor, start: dict[str, Tensor], covariance: Tensor | None, sweeps: int
) -> dict[str, Tensor]:
    """The term nearest to ``weight``: in closed form, or from the factors in ``start`` if they are there."""
    if covariance is None and is_train(term):
        return project_train(plan, term, weight)
    if covariance is not None and block_fit.is_blockwise(term):
        return block_fit.fit_blocks(plan, term, weight, start, covariance, sweeps)
    if covariance is None and not start:
        start = shared_bases.start(plan, term, weight)
    return least_squares.alternate(plan, term, weight, start, covariance, sweeps)
