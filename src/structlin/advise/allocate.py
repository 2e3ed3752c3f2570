"""Which option each layer takes under a budget for all of them: a knapsack with one choice per layer, solved exactly by
HiGHS (`scipy.optimize.milp`), and two plainer policies to hold it against.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import analysis
from ..structures import Pixelfly
from .options import Shape


def knapsack(values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The option of every layer for which the sum of ``values`` is smallest and that of ``costs`` within ``budget``.

    Needs scipy.

    Args:
        values: of every option of every layer; to be minimised.
        costs: of the same options.
        budget: that the chosen costs may add up to.

    Raises:
        ValueError: for a budget below the cheapest options of all layers.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    least = sum(map(min, costs))
    if least > budget:
        raise ValueError(f"a budget of {budget:.4g} is given; the cheapest options of all layers take {least:.4g}")
    flat_values, flat_costs = (np.array([x for row in rows for x in row]) for rows in (values, costs))
    one_each = block_diag([np.ones((1, len(row))) for row in values])
    # the solver's tolerances are absolute, so numbers are brought to a common size
    value_scale, cost_scale = flat_values.max() or 1.0, budget or 1.0
    found = milp(
        flat_values / value_scale,
        integrality=np.ones(len(flat_values)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(flat_costs[None] / cost_scale, -np.inf, 1.0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    chosen, start = [], 0
    for row in values:
        chosen.append(int(found.x[start : start + len(row)].argmax()))
        start += len(row)
    return chosen


def uniform(
    names: Sequence[Sequence[str]], values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One structure for all layers: of those within the budget that every layer has, that of the smallest summed value.

    Args:
        names: of every option of every layer.
        values: as for `knapsack`.
        costs: as for `knapsack`.
        budget: as for `knapsack`.

    Raises:
        ValueError: where no structure that fits all layers is within the budget.
    """
    best: tuple[float, list[int]] | None = None
    for name in names[0]:
        if all(name in row for row in names):
            chosen = [row.index(name) for row in names]
            total = sum(values[i][j] for i, j in enumerate(chosen))
            if sum(costs[i][j] for i, j in enumerate(chosen)) <= budget and (best is None or total < best[0]):
                best = total, chosen
    if best is None:
        raise ValueError(f"no structure that fits all layers is within the budget of {budget:.4g}")
    return best[1]


def pixelfly_split(shapes: Sequence[Shape], share: float) -> list[Pixelfly]:
    """The rule of thumb of Dao et al. 2022 for pixelfly: each type of layer gets a density in proportion to its share
    of the dense compute, a quarter of it as low rank, the rest as butterfly strides as far as they fit.

    Args:
        shapes: (out_features, in_features) of every layer; layers of one shape are one type.
        share: of the weights of all layers.

    Raises:
        ValueError: for a shape that no pixelfly of that density fits.
    """
    sizes = {shape: shape[0] * shape[1] for shape in shapes}
    whole = sum(sizes[shape] for shape in shapes)
    compute = {shape: shapes.count(shape) * size / whole for shape, size in sizes.items()}
    # densities in proportion to the shares, scaled so that all layers together meet the budget, and at most 1
    density, rest, left = dict.fromkeys(sizes, 1.0), list(sizes), share
    while rest:
        scale = left / sum(compute[shape] ** 2 for shape in rest)
        full = [shape for shape in rest if scale * compute[shape] > 1]
        if not full:
            density |= {shape: scale * compute[shape] for shape in rest}
            break
        rest, left = [shape for shape in rest if shape not in full], left - sum(compute[shape] for shape in full)
    return [_pixelfly(shape, density[shape]) for shape in shapes]


def _pixelfly(shape: Shape, density: float) -> Pixelfly:
    budget, found = density * shape[0] * shape[1], list[tuple[int, Pixelfly]]()
    for size in (4, 8, 16, 32, 64):
        for block in (64, 32, 16, 8):
            rank = max(block, round(budget / 4 / sum(shape) / block) * block)
            for strides in range(size.bit_length() - 1, 0, -1):
                spec = Pixelfly(block_size=block, butterfly_size=size, nfactors=strides, rank=rank)
                try:
                    params = analysis.num_params(spec.plan(*shape))
                except ValueError:
                    continue
                if params <= budget:
                    found.append((params, spec))
    if not found:
        raise ValueError(f"no pixelfly fits {shape[0]}x{shape[1]} with {density:.1%} of its weights; give more")
    return max(found, key=lambda pair: pair[0])[1]
