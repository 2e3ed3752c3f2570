"""Recovering the factors of an exact member of the classes whose blocks share their bases, by eigenvectors.

Block (i, j) of such a matrix is ``left[i] diag(middle[:, i, j]) right[j]``. These are BLAST, and the products M1 M2^T
of two Monarch matrices of rank 1, with their rows and columns read in the order of the blocks. The factors follow as
in the theorem on the factorisation of MM* (Dao et al. 2022, theorem 2): products of blocks in which all but ``left[i]``
cancels to a diagonal matrix have its columns as eigenvectors, whatever the alternating fits of `least_squares` do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Axes, Plan, Term
from .least_squares import alternate, matrix, read, truncated
from .trains import is_train, rearrange, split

DRAWS = 4  # random sums of the blocks that are tried; one of them may have eigenvalues that nearly meet
SWEEPS = 100  # of least squares that take rounding out of what eigenvectors give
TURN = 0.3  # how far the bases of a low-rank start are turned
EXACT = 1e-6  # a relative error below which a matrix of low rank is what is looked for
NEAR = 0.5  # a relative error up to which eigenvectors tell more than a random start


@dataclass(frozen=True)
class Grid:
    """How a term reads as a grid of blocks: its axes of more than one value by their role.

    Attributes:
        rows: which row of the grid, of the output.
        within_rows: which row in a block.
        columns: which column of the grid, of the input.
        within_columns: which column in a block.
        hidden: of the diagonal.
        middle: what stands between the bases, as a chain from (hidden, columns) to (hidden, rows).
    """

    rows: Axes
    within_rows: Axes
    columns: Axes
    within_columns: Axes
    hidden: Axes
    middle: Plan


def recover(plan: Plan, weight: Tensor) -> dict[str, Tensor]:
    """The factors of ``weight``, an exact member of the class of ``plan``.

    `structlin.project` finds them too, and something near where there are none; this says so. ``plan`` is that of BLAST
    or of a product of two Monarch matrices: ``Monarch(m) @ Monarch(m).T`` for widths m^2, ``BTT(1, in_dims=(n / b, b),
    out_dims=(b, n / b))`` and its transpose for blocks of another size.

    Args:
        plan: the structure, at the shape of ``weight``.
        weight: (out_features, in_features), real or complex; the work is done in double precision.

    Returns:
        Factor name -> tensor of the plan's shape, in the dtype and on the device of ``weight``. Their product is
        ``weight`` to a relative error of at most 1e-10 in double, 1e-5 in single and 1e-2 in half precision.

    Raises:
        ValueError: for another shape or another kind of plan, a rank above the size of the blocks, and a weight that
            has no such factors or to which the theorem does not apply: bases that are not invertible, zeros in the
            middle factor wherever one looks, or diagonals that are multiples of each other.
    """
    if tuple(weight.shape) != (plan.out_features, plan.in_features):
        raise ValueError(f"the weight is {tuple(weight.shape)}, the plan {(plan.out_features, plan.in_features)}")
    term = plan.terms[0]
    grid = read_grid(plan, term) if len(plan.terms) == 1 else None
    if grid is None:
        raise ValueError(f"'{plan}' is no grid of blocks with shared bases; BLAST is one, and a product of two Monarch")
    rank, most = plan.size(grid.hidden), _most(plan, grid)
    if rank > most:
        raise ValueError(f"rank={rank} of '{plan}' exceeds the {most} of a block, so its factors are not determined")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float64))
    factors = _from_eigenvectors(plan, term, grid, wide)
    if factors is not None:
        factors = alternate(plan, term, wide, factors, None, SWEEPS)
    error = float("inf") if factors is None else _distance(plan, term, factors, wide)
    precision = torch.finfo(weight.dtype).eps
    limit = 1e-10 if precision < 1e-10 else 1e-5 if precision < 1e-5 else 1e-2
    if factors is None or not error <= limit:
        raise ValueError(
            f"the weight has no factors of '{plan}' that eigenvectors find: the nearest are off by {error:.1e}, and "
            f"{limit:.0e} is allowed. Blocks must have rank {rank}, their diagonals no zeros and no common multiple"
        )
    return {name: factors[name].to(weight.dtype).contiguous() for name in plan.factors}


def start(plan: Plan, term: Term, weight: Tensor) -> dict[str, Tensor]:
    """Factors from which an alternating fit of ``term`` should start, in double precision; none for other terms."""
    grid = read_grid(plan, term)
    if grid is None:
        return {}
    wide = weight.to(torch.promote_types(weight.dtype, torch.float64))
    factors = None if plan.size(grid.hidden) > _most(plan, grid) else _from_eigenvectors(plan, term, grid, wide)
    if factors is None or not _distance(plan, term, factors, wide) < NEAR:
        return _from_low_rank(plan, term, grid, wide)
    return factors


def read_grid(plan: Plan, term: Term) -> Grid | None:
    """``term`` as a grid of blocks with shared bases; None where it is something else."""
    if len(term.weights) < 3 or term.table is not None or term.out_table is not None:
        return None
    x, *weights, y = (tuple(a for a in axes if plan.sizes[a] > 1) for axes in (term.x, *term.weights, term.y))
    right, *between, left = map(set, weights)
    middle = set().union(*between)
    hidden, columns, rows = right & left, (right & middle) - left, (left & middle) - right
    inside = right - middle - left, left - middle - right
    if {*x} != columns | inside[0] or {*y} != rows | inside[1] or {*x} & {*y} or hidden & {*x, *y}:
        return None
    if not all(hidden <= axes for axes in between):
        return None

    def ordered(role: set[str]) -> Axes:
        return tuple(a for a in dict.fromkeys((*y, *x, *weights[0])) if a in role)

    within = ordered(hidden)
    chain = Term(within + ordered(columns), tuple(weights[1:-1]), within + ordered(rows), term.names[1:-1])
    if not is_train(chain):
        return None
    used = {a for axes in (chain.x, *chain.weights, chain.y) for a in axes}
    middle_plan = Plan((chain,), tuple((a, size) for a, size in plan.axes if a in used))
    return Grid(ordered(rows), ordered(inside[1]), ordered(columns), ordered(inside[0]), within, middle_plan)


def _most(plan: Plan, grid: Grid) -> int:
    return min(plan.size(grid.within_rows), plan.size(grid.within_columns))


def _distance(plan: Plan, term: Term, factors: dict[str, Tensor], weight: Tensor) -> float:
    whole = float(weight.norm())
    return float((matrix(plan, term, factors) - weight).norm()) / whole if whole else 0.0


def _from_eigenvectors(plan: Plan, term: Term, grid: Grid, weight: Tensor) -> dict[str, Tensor] | None:
    """The factors of a member, up to the rounding that eigenvectors magnify; None where blocks are singular."""
    found = factorise(_blocks(plan, term, grid, weight), plan.size(grid.hidden))
    return None if found is None else _as_factors(plan, term, grid, *found)


def _from_low_rank(plan: Plan, term: Term, grid: Grid, weight: Tensor) -> dict[str, Tensor]:
    """The bases of the nearest matrix of low rank, which is a member of equal diagonals, and diagonals that differ."""
    blocks, rank = _blocks(plan, term, grid, weight), plan.size(grid.hidden)
    i, p, j, q = blocks.shape
    generator = torch.Generator().manual_seed(1)
    # turned a little, as singular vectors may be zero in a block, and no fit of the other factors changes that
    noise = torch.randn(rank, rank, generator=generator, device="cpu", dtype=torch.float64)
    turn = torch.linalg.qr(torch.eye(rank, dtype=noise.dtype, device="cpu") + TURN * rank**-0.5 * noise)[0].to(weight)
    left, right = truncated(blocks.reshape(1, i * p, j * q), rank)
    left, right = left @ turn, turn.mT @ right
    left, right = left.reshape(i, p, rank), right.reshape(rank, j, q).transpose(0, 1)
    equal = _as_factors(plan, term, grid, left, left.new_ones(i, j, rank), right)
    if _distance(plan, term, equal, weight) < EXACT:
        return equal
    # elsewhere equal ones are a saddle point
    middle = 1 + torch.randn(i, j, rank, generator=generator, device="cpu", dtype=torch.float64)
    return _as_factors(plan, term, grid, left, middle.to(weight), right)


def _blocks(plan: Plan, term: Term, grid: Grid, weight: Tensor) -> Tensor:
    groups = (grid.rows, grid.within_rows, grid.columns, grid.within_columns)
    x, y = (tuple(a for a in axes if plan.sizes[a] > 1) for axes in (term.x, term.y))
    tensor = read(plan, term, weight).reshape(plan.shape(y + x))
    order = tuple(a for group in groups for a in group)
    return rearrange(plan, tensor, y + x, order).reshape([plan.size(axes) for axes in groups])


def _as_factors(plan: Plan, term: Term, grid: Grid, left: Tensor, middle: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The factors of a term from left (i, p, rank), middle (i, j, rank) and right (j, rank, q) of its grid."""
    (chain,) = grid.middle.terms
    have = grid.hidden + grid.rows + grid.columns
    factors = split(grid.middle, chain, middle.permute(2, 0, 1).reshape(plan.shape(have)), have)
    for name, basis, have, axes in (
        (term.names[0], right, grid.columns + grid.hidden + grid.within_columns, term.weights[0]),
        (term.names[-1], left, grid.rows + grid.within_rows + grid.hidden, term.weights[-1]),
    ):
        want = tuple(a for a in axes if plan.sizes[a] > 1)
        factors[name] = rearrange(plan, basis.reshape(plan.shape(have)), have, want)
    return {name: factors[name].reshape(plan.shapes[name]) for name in term.names}


def factorise(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(i, p, j, q) -> left (i, p, rank), middle (i, j, rank), right (j, rank, q), whose products are the blocks.

    ``left[i] diag(middle[i, j]) right[j]`` is block (i, j), exactly where there are such factors with no zeros in one
    row and one column of ``middle``. None where no row or column of blocks is invertible within its bases.
    """
    i, p, j, q = blocks.shape
    # coordinates in the rank directions that the blocks of a row, and of a column, share
    into = torch.linalg.svd(blocks.reshape(i, p, j * q), full_matrices=False)[0][..., :rank]
    out = torch.linalg.svd(blocks.permute(2, 3, 0, 1).reshape(j, q, i * p), full_matrices=False)[0][..., :rank]
    square = torch.einsum("ipr,ipjq,jqs->ijrs", into.conj(), blocks, out.conj())
    values = torch.linalg.svdvals(square)
    sound = values[..., -1] / values[..., 0].clamp(min=torch.finfo(values.dtype).tiny)
    row, column = int(sound.amin(1).argmax()), int(sound.amin(0).argmax())
    smallest = torch.finfo(values.dtype).eps
    if not min(sound[row].min(), sound[:, column].min()) > smallest:
        return None
    # right[column]^-1 times a diagonal matrix times right[column], for every block
    similar = torch.linalg.solve(square[:, column, None].expand_as(square), square)
    similar = torch.linalg.solve(square[row].expand_as(square), similar, left=False) @ square[row, column]
    similar = similar.reshape(i * j, rank, rank)
    weights = torch.randn(
        DRAWS, i * j, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu"
    )
    weights = weights.to(similar) / torch.linalg.matrix_norm(similar)
    best, least = None, float("inf")
    for mixed in torch.einsum("dn,nrs->drs", weights, similar):
        values, vectors = torch.linalg.eig(mixed)
        if not mixed.is_complex():  # two eigenvalues that rounding made a complex pair span a real plane
            vectors = torch.where(values.imag < 0, vectors.imag, vectors.real)
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
        if not torch.linalg.svdvals(vectors)[-1] > smallest:
            continue
        found = _from_basis(square, vectors, row, column)
        error = float((torch.einsum("irk,ijk,jks->ijrs", *found) - square).norm())
        if error < least:
            best, least = found, error
    return None if best is None else (into @ best[0], best[1], best[2] @ out.mT)


def _from_basis(square: Tensor, vectors: Tensor, row: int, column: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors, from the inverse of one of the bases: ones in one row and one column of the middle."""
    left = square[:, column] @ vectors
    right = torch.linalg.solve(left[row].expand_as(square[row]), square[row])
    middle = torch.linalg.solve(left[:, None].expand_as(square), square)
    middle = torch.linalg.solve(right.expand_as(square), middle, left=False)
    return left, middle.diagonal(dim1=-2, dim2=-1), right
