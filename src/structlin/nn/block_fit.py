"""Two factors fitted to typical inputs, column block by column block of the input."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ..plan import Axes, Plan, Term
from .least_squares import ON_INPUTS, descend, falls, ridged, size, truncated

Factors = dict[str, Tensor]


def is_blockwise(term: Term) -> bool:
    """Whether a term is two factors, the first with columns of the input alone, the second with rows of the output."""
    if len(term.weights) != 2:
        return False
    first, second = term.weights
    columns, rows = {*first} - {*second}, {*second} - {*first}
    everything = {*first, *second} >= {*term.x, *term.y}
    return everything and columns <= {*term.x} - {*term.y} and rows <= {*term.y} - {*term.x}


def fit_blocks(plan: Plan, term: Term, weight: Tensor, start: Factors, covariance: Tensor, sweeps: int) -> Factors:
    """Two factors that minimise the error over inputs of this covariance, from the factors in ``start``.

    Column blocks of the input are fitted one after the other: first each exactly given the rest, which is optimal where
    there is one, then one factor of a block after the other.
    """
    first, second = term.weights
    shared = tuple(a for a in first if a in second)
    hidden = tuple(a for a in shared if a not in {*term.x, *term.y})
    outer = tuple(a for a in shared if a in term.x and a not in term.y)  # column blocks that add up
    both = tuple(a for a in shared if a in term.x and a in term.y)  # blocks that do not meet
    inner = tuple(a for a in shared if a in term.y and a not in term.x)
    rows, columns = tuple(a for a in second if a not in shared), tuple(a for a in first if a not in shared)
    inputs = _indices(plan, term.x, (outer, both, columns), weight.device)
    outputs = _indices(plan, term.y, (both, inner, rows), weight.device)
    from_down, from_up = outer + both + inner + hidden + columns, outer + both + inner + rows + hidden
    (k, g, c), (_, j, r), h = inputs.shape, outputs.shape, plan.size(hidden)
    down = start[term.names[0]].to(weight.dtype).permute([first.index(a) for a in from_down]).reshape(k, g, j, h, c)
    up = start[term.names[1]].to(weight.dtype).permute([second.index(a) for a in from_up]).reshape(k, g, j, r, h)
    blocks, whole = _Blocks(weight, covariance, inputs, outputs), size(weight, covariance)

    def goes_on(error: float, last: float) -> bool:
        return k > 1 and falls(error, last, whole, share=ON_INPUTS)

    found = descend({"up": up, "down": down}, blocks.sweep, goes_on, sweeps)
    return {
        term.names[0]: found["down"].reshape(plan.shape(from_down)).permute([from_down.index(a) for a in first]),
        term.names[1]: found["up"].reshape(plan.shape(from_up)).permute([from_up.index(a) for a in second]),
    }


class _Blocks:
    """The fit of factors "down" (k, g, j, h, c) and "up" (k, g, j, r, h) to a weight: block (k, g) of the columns,
    ``inputs`` (k, g, c), meets all rows of ``outputs[g]``, (g, j, r)."""

    def __init__(self, weight: Tensor, covariance: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        self.weight, self.covariance = weight, covariance
        self.rows, self.columns = outputs.flatten(1), inputs
        self.shape = *outputs.shape[1:], inputs.shape[-1]
        self.roots = {
            block: torch.linalg.cholesky(covariance[inputs[block][:, None], inputs[block]])
            for block in product(*map(range, inputs.shape[:2]))
        }

    def sweep(self, factors: Factors, number: int) -> tuple[Factors, float]:
        """Every block in turn, in the sweep of this number, and the squared error after it."""
        up, down, residual = factors["up"].clone(), factors["down"].clone(), self._residual(factors)
        for block, root in self.roots.items():
            out, into = self.rows[block[1]], self.columns[block]
            residual[out[:, None], into] += (up[block] @ down[block]).flatten(0, 1)
            # what this block would be if it were free: the regression of what is left on its inputs
            free = torch.cholesky_solve((residual[out] @ self.covariance[:, into]).mH, root).mH.reshape(self.shape)
            if number == 0:
                up[block], scaled = truncated(free @ root, up.shape[-1])
                down[block] = torch.linalg.solve_triangular(root, scaled, upper=False, left=False)
            else:  # near the best product a step from the last is enough, and does not turn the factors
                scaled = down[block] @ root
                gap = free @ root - up[block] @ scaled
                up[block] += torch.linalg.solve(ridged(scaled @ scaled.mH), scaled @ gap.mH).mH
                gap = free - up[block] @ down[block]
                down[block] += torch.linalg.solve(ridged(up[block].mH @ up[block]), up[block].mH @ gap)
            residual[out[:, None], into] -= (up[block] @ down[block]).flatten(0, 1)
        return {"up": up, "down": down}, size(residual, self.covariance)

    def _residual(self, factors: Factors) -> Tensor:
        residual = self.weight.clone()
        for block in self.roots:
            own = (factors["up"][block] @ factors["down"][block]).flatten(0, 1)
            residual[self.rows[block[1]][:, None], self.columns[block]] -= own
        return residual


def _indices(plan: Plan, axes: Axes, groups: tuple[Axes, ...], device: torch.device) -> Tensor:
    """Indices of the features read as ``axes``, one dimension for each of ``groups``."""
    order = [axes.index(a) for group in groups for a in group]
    index = torch.arange(plan.size(axes), device=device).reshape(plan.shape(axes)).permute(order)
    return index.reshape([plan.size(group) for group in groups])
