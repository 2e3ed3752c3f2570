"""Closed forms by one SVD after the other: chains whose factors can be taken off from the input on, each time leaving a
chain of the same kind. Order the matrix as [axes that the first factor shares with the others, rows, columns], truncate
every matrix, and go on with what is left."""

from __future__ import annotations

import string

import torch
from torch import Tensor

from ..plan import Axes, Plan, Term
from .least_squares import read, truncated


def is_train(term: Term) -> bool:
    """Whether taking factors off one by one leaves, each time, a chain of the same kind."""
    known = {*term.x, *term.y}
    for i, first in enumerate(term.weights[:-1]):
        following = term.weights[i + 1]
        shared = {a for a in first if any(a in w for w in term.weights[i + 1 :])}
        later = {a for w in term.weights[i + 2 :] for a in w}
        if not shared <= {*following} or (shared - known) & later:
            return False
        known |= shared
    return True


def project_train(plan: Plan, term: Term, weight: Tensor) -> dict[str, Tensor]:
    """The factors of a train nearest to ``weight``, (out_features, in_features)."""
    used = {a for w in term.weights for a in w}
    have = tuple(a for a in dict.fromkeys(term.y + term.x) if a in used)
    # an axis at both ends is read on its diagonal; one that no factor sees repeats the matrix, whose mean is nearest
    repeats = plan.size(a for a in term.x if a not in used)
    tensor = rearrange(plan, read(plan, term, weight), term.y + term.x, have) / repeats
    return split(plan, term, tensor, have)


def split(plan: Plan, term: Term, tensor: Tensor, have: Axes) -> dict[str, Tensor]:
    """The factors of a train from its matrix as one tensor, each axis of ``have`` once."""
    factors: dict[str, Tensor] = {}
    for i, (name, first) in enumerate(zip(term.names[:-1], term.weights[:-1], strict=True)):
        shared = tuple(a for a in first if any(a in w for w in term.weights[i + 1 :]))
        batch, hidden = tuple(a for a in shared if a in have), tuple(a for a in shared if a not in have)
        rows, columns = tuple(a for a in have if a not in first), tuple(a for a in first if a not in shared)
        blocks = rearrange(plan, tensor, have, batch + rows + columns)
        blocks = blocks.reshape(plan.size(batch), plan.size(rows), plan.size(columns))
        up, down = truncated(blocks, plan.size(hidden))
        have, taken = batch + rows + hidden, batch + hidden + columns
        factors[name] = rearrange(plan, down.reshape(plan.shape(taken)), taken, first)
        tensor = up.reshape(plan.shape(have))
    factors[term.names[-1]] = rearrange(plan, tensor, have, term.weights[-1])
    return factors


def rearrange(plan: Plan, tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    """``tensor`` with axes ``have`` as one with ``want``: a repeated axis on its diagonal, a missing one summed."""
    letters = dict(zip(plan.sizes, string.ascii_letters, strict=False))
    spell = ("".join(letters[axis] for axis in axes) for axes in (have, want))
    return torch.einsum("->".join(spell), tensor)
