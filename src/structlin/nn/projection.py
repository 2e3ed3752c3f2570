"""Dense weight -> nearest member of a structure, in closed form for one or two factors.

One rule serves all of them: order the dense weight as [axes both factors share, rows, columns], take a truncated
SVD of every matrix, order the pieces as the factors are stored. For low rank this is the SVD, for Kronecker the
rearrangement of Van Loan and Pitsianis, for Monarch and BTT their block-wise SVD; the axes say which.
"""

from __future__ import annotations

import string

import torch
from torch import Tensor

from ..plan import Axes, Plan, Term


@torch.no_grad()
def project(plan: Plan, weight: Tensor) -> dict[str, Tensor]:
    """The factors of the matrix of ``plan`` that is nearest to ``weight`` in the Frobenius norm.

    Args:
        plan: one term of one or two factors.
        weight: (out_features, in_features), real or complex; half precision is computed in float32.

    Returns:
        Factor name -> tensor of the plan's shape, in the dtype and on the device of ``weight``.

    Raises:
        ValueError: for a weight of another shape or with NaN or infinite entries, or a plan without a closed form.
    """
    if tuple(weight.shape) != (plan.out_features, plan.in_features):
        raise ValueError(f"the weight is {tuple(weight.shape)}, the plan {(plan.out_features, plan.in_features)}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries; there is no nearest structured matrix")
    if len(plan.terms) > 1 or len(plan.terms[0].weights) > 2:
        raise ValueError(
            f"no closed-form projection onto a sum or onto more than two factors ({plan}); use weights='init'"
        )
    term = plan.terms[0]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    tensor = wide.reshape(plan.shape(term.y + term.x))
    factors = _project_one(plan, term, tensor) if len(term.weights) == 1 else _project_two(plan, term, tensor)
    return {name: factor.to(weight.dtype).contiguous() for name, factor in factors.items()}


def _project_one(plan: Plan, term: Term, tensor: Tensor) -> dict[str, Tensor]:
    # an axis at both ends is read on its diagonal; one that shares the factor is averaged over
    (step,) = term.steps
    return {term.names[0]: _rearrange(plan, tensor, term.y + term.x, step.w) / plan.size(step.free)}


def _project_two(plan: Plan, term: Term, tensor: Tensor) -> dict[str, Tensor]:
    first, second = term.weights
    ends = {*term.x, *term.y}
    shared = tuple(a for a in first if a in second)
    batch = tuple(a for a in shared if a in ends)
    hidden = tuple(a for a in shared if a not in ends)
    rows = tuple(a for a in second if a not in shared)
    columns = tuple(a for a in first if a not in shared)
    blocks = _rearrange(plan, tensor, term.y + term.x, batch + rows + columns)
    blocks = blocks.reshape(plan.size(batch), plan.size(rows), plan.size(columns))
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    rank = plan.size(hidden)
    kept = min(rank, s.shape[-1])
    root = s[:, :kept].sqrt()
    up = blocks.new_zeros(*blocks.shape[:2], rank)
    down = blocks.new_zeros(blocks.shape[0], rank, blocks.shape[2])
    up[..., :kept] = u[..., :kept] * root[:, None]
    down[:, :kept] = vh[:, :kept] * root[..., None]
    return {
        term.names[0]: _split(plan, down, batch + hidden + columns, first),
        term.names[1]: _split(plan, up, batch + rows + hidden, second),
    }


def _split(plan: Plan, tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    return _rearrange(plan, tensor.reshape(plan.shape(have)), have, want)


def _rearrange(plan: Plan, tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    letters = dict(zip(plan.sizes, string.ascii_letters, strict=False))
    spell = ("".join(letters[axis] for axis in axes) for axes in (have, want))
    return torch.einsum("->".join(spell), tensor)
