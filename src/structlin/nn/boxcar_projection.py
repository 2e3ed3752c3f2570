"""Dense weight -> low-rank blocks whose places are to be found: the projection of structures with trained masks.

Any factors that a rank allows are nearest to the weight with full intervals, so it is the widths that are given: no
interval gets wider than it starts. Blocks are found one after the other in what is left, each from the rows that
correlate with the strongest one (Lee et al. 2024, initialisation from dense weights): an interval is where the energy
of the features exceeds a cost by most. Then all factors are fitted together on the intervals that were found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import analysis
from ..masks import Boxcar
from ..plan import Plan
from .least_squares import falls, size

ROUNDS = 4  # of finding rows by columns and columns by rows
PASSES = 3  # over all components, each found again in what the others leave
COSTS = (1.0, 0.1)  # of a feature in an interval, first and later, as a share of the mean that features explain
NOISE = 4.0  # the same in later passes, as a multiple of the mean that is left over, where that is less
SWEEPS = 100  # of the fit, at most
STEPS = 6  # of conjugate gradients in each half of a sweep, at most

Interval = tuple[int, int]
"""First feature, and number of features, wrapping around."""


def refuse(plan: Plan, masks: Mapping[str, Boxcar]) -> None:
    """Whether `project_blocks` can do this plan.

    Raises:
        ValueError: unless it is one chain of two factors with a mask on each, without padding.
    """
    if plan.kept is not None:
        raise ValueError(f"{plan} is padded, and trained masks are fitted without padding; choose widths that divide")
    if len(plan.terms) > 1 or masks.keys() != plan.factors.keys() or len(masks) != 2:
        raise ValueError(f"{plan} cannot be projected to: trained masks are fitted on one chain of two factors only")


def project_blocks(plan: Plan, masks: Mapping[str, Boxcar], weight: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Factors and intervals of a sum of low-rank blocks near ``weight``; a local optimum.

    A weight that is such a sum, of blocks that hardly overlap and are not wider than the masks at first, comes back
    with its places.

    Args:
        plan: one chain of two factors.
        masks: one for each of them; their widths are the largest allowed ones.
        weight: (out_features, in_features), float or complex.

    Returns:
        Factor name -> the factor, zero outside its intervals, in the dtype of ``weight``; widths and locations
        (components,) in float64, as fractions. All on the device of ``weight``.

    Raises:
        ValueError: for a plan that `refuse` refuses.
    """
    refuse(plan, masks)
    right, left = plan.terms[0].names
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    columns, rows = (_first(masks[name], n) for name, n in ((right, plan.in_features), (left, plan.out_features)))
    rank = plan.size(plan.factors[right][1].w) // (len(columns) * plan.in_features)
    exact = torch.promote_types(wide.dtype, torch.float64)
    generator = torch.Generator().manual_seed(1)
    # a component that finds nothing left stays where it starts, ready to learn
    down = torch.randn(len(columns), rank, plan.in_features, generator=generator, dtype=torch.float64, device="cpu")
    down = (down * analysis.init_std(plan, right)).to(weight.device, exact)
    up = torch.zeros(plan.out_features, len(rows), rank, device=weight.device, dtype=exact)
    limits = [(height, width) for (_, height), (_, width) in zip(rows, columns, strict=True)]
    residual, negligible = wide.clone(), (100 * torch.finfo(wide.dtype).eps) ** 2 * size(wide, None)
    for sweep in range(PASSES):
        for k, limit in enumerate(limits):
            left_over = size(residual, None)
            if left_over <= negligible:
                break
            residual += (up[:, k] @ down[k]).to(wide.dtype)
            known = down[k].mH.to(wide.dtype) if sweep else None
            # narrow at first, so that blocks that share rows or columns stay apart
            cost = (COSTS[1], NOISE * left_over / residual.numel()) if sweep else (COSTS[0], torch.inf)
            rows[k], columns[k], u, v = _block(residual, rank, limit, known, cost, generator)
            residual -= u @ v
            up[:, k], down[k] = 0, 0
            up[:, k, : u.shape[1]], down[k, : v.shape[0]] = u.to(exact), v.to(exact)
    target = weight.to(exact)
    _fit(target, up, down, _indicator(rows, target).T[..., None], _indicator(columns, target, 1)[:, None])
    return {
        name: (_stored(factor, masks[name]).to(weight.dtype), *_fractions(places, n, weight.device))
        for name, factor, places, n in (
            (right, down.mT, columns, plan.in_features),
            (left, up.movedim(0, 1), rows, plan.out_features),
        )
    }


def _first(boxcar: Boxcar, n: int) -> list[Interval]:
    pairs = zip(boxcar.locations, boxcar.widths, strict=True)
    return [(round(location * n) % n, max(1, round(width * n))) for location, width in pairs]


def _fractions(places: list[Interval], n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    starts, lengths = torch.tensor(places, dtype=torch.float64, device=device).T / n
    return lengths, starts


def _indicator(places: list[Interval], of: Tensor, dim: int = 0) -> Tensor:
    """(components, n), one where a feature along dimension ``dim`` of a matrix is in the interval of a component."""
    starts, lengths = torch.tensor(places, device=of.device).T
    inside: Tensor = (torch.arange(of.shape[dim], device=of.device) - starts[:, None]) % of.shape[dim] < lengths[
        :, None
    ]
    return inside.to(of.dtype)


def _stored(factor: Tensor, boxcar: Boxcar) -> Tensor:
    """(components, features, rank) in the order of dimensions of the stored factor."""
    return factor.movedim((0, 1), (boxcar.component, boxcar.feature)).contiguous()


def _block(
    residual: Tensor,
    rank: int,
    limit: tuple[int, int],
    known: Tensor | None,
    cost: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Interval, Interval, Tensor, Tensor]:
    """Rows and columns of one block, at most ``limit`` many, and factors that take it off.

    A feature costs ``cost``, as a share of the mean and in the units of the residual, whichever is less. The search
    starts from the row space ``known``, else from the rows that correlate with the strongest one.
    """
    strongest = residual[residual.abs().square().sum(1).argmax()].conj()[:, None]
    basis = strongest if known is None else known
    for _ in range(ROUNDS):
        u = residual @ torch.linalg.qr(basis)[0]
        rows = _interval(u.abs().square().sum(1), limit[0], (cost[0], cost[1] * u.shape[1]))
        inside = _indicator([rows], residual)[0][:, None]
        u = torch.linalg.qr(u * inside)[0] * inside  # an interval shorter than the rank leaves columns without meaning
        v = residual.mH @ u
        columns = _interval(v.abs().square().sum(1), limit[1], (cost[0], cost[1] * u.shape[1]))
        basis = v * _indicator([columns], residual, 1)[0][:, None]
        if basis.shape[1] < rank:
            mix = torch.randn(len(u), rank - basis.shape[1], generator=generator, device="cpu").to(residual)
            mixed = residual.mH @ (mix * inside)
            basis = torch.cat([basis, mixed * _indicator([columns], residual, 1)[0][:, None]], 1)
    return rows, columns, u, basis.mH


def _interval(energy: Tensor, longest: int, cost: tuple[float, float]) -> Interval:
    """The cyclic interval of ``energy`` (n,) with the largest sum after a cost for each of its features."""
    n, energy = len(energy), energy.double()  # small costs must not drown in sums over all features
    values = energy - min(cost[0] * float(energy.mean()), cost[1])
    start, length = _largest_sum(values)
    rest, gap = _largest_sum(-values)
    if values.sum() - values[rest : rest + gap].sum() > values[start : start + length].sum() and gap < n:
        start, length = (rest + gap) % n, n - gap
    if length > longest:
        window = int(_window_sums(energy, longest).argmax())
        start, length = _largest_sum(values.roll(-window)[:longest])
        start = (start + window) % n
    return start, length


def _largest_sum(values: Tensor) -> Interval:
    """The interval, one long at least, of a sequence that does not wrap around."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    lowest, where = sums[:-1].cummin(0)
    end = int((sums[1:] - lowest).argmax())
    return int(where[end]), end + 1 - int(where[end])


def _window_sums(values: Tensor, length: int) -> Tensor:
    """Sums over every cyclic window of ``length``, by where it starts."""
    sums = torch.cat([values.new_zeros(1), torch.cat([values, values[: length - 1]]).cumsum(0)])
    return sums[length:] - sums[: len(values)]


def _fit(weight: Tensor, up: Tensor, down: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Least squares for ``up`` (out, components, rank) and ``down`` (components, rank, in) in turn, in place.

    Entries where ``rows`` or ``columns``, which broadcast to them, are zero stay zero.
    """
    up *= rows
    down *= columns
    shape, u_inside = down.shape, rows.expand_as(up).flatten(1)
    v_inside = columns.expand_as(down).flatten(0, 1)
    u, v = up.flatten(1), down.flatten(0, 1)
    last, whole = float("inf"), size(weight, None)
    for _ in range(SWEEPS):
        gram = v @ v.mH
        u = _solve(lambda x, g=gram: u_inside * (x @ g), u_inside * (weight @ v.mH), u, gram.diagonal(), 1)  # type: ignore[misc]
        gram = u.mH @ u
        v = _solve(
            lambda x, g=gram: v_inside * (g @ x), v_inside * (u.mH @ weight), v, gram.diagonal()[:, None], 0  # type: ignore[misc]
        )  # fmt: skip
        error = size(weight - u @ v, None)
        if not falls(error, last, whole):
            break
        last = error
    # both factors of a component get one size: their gradients then have one too
    u, v = u.reshape(up.shape), v.reshape(shape)
    sizes = [t.abs().square().sum(dims, keepdim=True).sqrt() for t, dims in ((u, (0, 2)), (v, (1, 2)))]
    flat = [s.flatten() for s in sizes]
    ratio = torch.where((flat[0] > 0) & (flat[1] > 0), flat[1] / flat[0], 1).nan_to_num(1.0).sqrt().to(u.dtype)
    up.copy_(u * ratio[:, None])
    down.copy_(v / ratio[:, None, None])


def _solve(apply: Callable[[Tensor], Tensor], wanted: Tensor, x: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Conjugate gradients for ``apply(x) = wanted``, along ``dim``, with diagonal ``scale``; others are separate."""
    inverse = torch.where(scale.real > 0, 1 / scale.real, 0).to(x.dtype)
    residual = wanted - apply(x)
    direction = ready = inverse * residual
    slope = (residual.conj() * ready).real.sum(dim, keepdim=True)
    enough = 1e-20 * (wanted.conj() * inverse * wanted).real.sum()
    for _ in range(STEPS):
        if not slope.sum() > enough:
            break
        image = apply(direction)
        curvature = (direction.conj() * image).real.sum(dim, keepdim=True)
        step = torch.where(curvature > 0, slope / curvature, 0)
        x = x + step * direction
        residual = residual - step * image
        ready = inverse * residual
        last, slope = slope, (residual.conj() * ready).real.sum(dim, keepdim=True)
        direction = ready + torch.where(last > 0, slope / last, 0) * direction
    return x
