"""Which option each layer takes under a budget for all of them: a knapsack with one choice per layer, solved exactly by
HiGHS (`scipy.optimize.milp`), and one structure for all layers to hold it against.
"""

from __future__ import annotations

from collections.abc import Sequence


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
