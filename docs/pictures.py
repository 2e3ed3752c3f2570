"""Draws docs/img/structures: a random member of every registered structure, and the steps that it is the product of.

`make pictures` runs it. A structure without a line in `CHOSEN` is drawn at its first example. Magnitudes go from zero
(dark) to the largest of each matrix (bright); white is always zero.
"""

from __future__ import annotations

import io
import sys
from math import prod
from pathlib import Path

import torch
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import structlin as sl
from structlin.ops import reference
from structlin.ops.lookup import collect, gather
from structlin.plan import Term
from structlin.report.records import write_bytes

FOLDER = Path(__file__).parent / "img" / "structures"
INCHES = 0.045  # of one row or column
CHOSEN = {
    "block_diagonal": "block_diagonal:nblocks=4",
    "block_dense": "block_dense:nblocks=4:rank=8",
    "block_shuffle": "block_shuffle:nblocks=4",
    "block_butterfly": "block_butterfly:butterfly_size=8",
    "block_sparse": "block_sparse:nblocks=8:slots=3",
    "blast": "blast:nblocks=4:rank=8",
    "btt": "btt:rank=1:in_dims=8x4:out_dims=4x8",
    "chain": "chain:equation=g b a; d a; g e b -> e g d:sizes=b=4 e=4 g=4",
    "dense": "dense",
    "dyad": "dyad:nblocks=4",
    "einsum": "einsum:dims=4x2x4x2x4x4x1",
    "gblr": "gblr:components=3:rank=2:width=0.4",
    "kronecker": "kronecker:in_dims=4x8:out_dims=4x8",
    "low_rank": "low_rank:rank=8",
    "monarch": "monarch:nblocks=4",
    "pixelfly": "pixelfly:block_size=4:butterfly_size=8:nfactors=2:rank=4",
    "product": "monarch:nblocks=4@block_diagonal:nblocks=8",
    "sum": "block_diagonal:nblocks=8+low_rank:rank=4",
    "tensor_train": "tensor_train:cores=2:rank=2:in_dims=8x4:out_dims=4x8",
    "transpose": "block_dense:nblocks=4:rank=8.T",
}


def draw(spec: sl.Spec, out_features: int, in_features: int) -> bytes:
    """One picture as a PNG: W = the last step of a term times ... times its first + those of the next term.

    A matrix of one factor stands alone.
    """
    torch.manual_seed(0)
    layer = sl.StructuredLinear(in_features, out_features, spec, bias=False, dtype=torch.float64)
    panels = [("W", layer.to_dense().weight.detach())]
    for term in layer.plan.terms if len(layer.plan.factors) > 1 else ():
        last, *others = steps(layer, term)
        panels += [("=" if term is layer.plan.terms[0] else "+", last), *(("", step) for step in others)]
    widths = [max(8, matrix.shape[1]) for _, matrix in panels]
    tallest = max(matrix.shape[0] for _, matrix in panels)
    shades = colormaps["viridis"].with_extremes(bad="white")
    with rc_context({"font.size": 9, "figure.dpi": 100}):
        figure = Figure(figsize=(INCHES * (sum(widths) + 9 * len(panels)), INCHES * tallest + 0.3))
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        grid = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for axes, (sign, matrix) in zip(grid, panels, strict=True):
            size = matrix.abs() / matrix.abs().max()
            # nearest: averaging neighbours would show entries that are zero as small ones
            axes.imshow(size.where(size > 0, torch.nan).numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[], ylabel=sign if sign != "W" else "")
            axes.set_title("x".join(map(str, matrix.shape)), fontsize=7)
            axes.yaxis.label.set(rotation=0, va="center", ha="right", fontsize=12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def steps(layer: sl.StructuredLinear, term: Term) -> list[Tensor]:
    """The matrices that a term is the product of, the last step first; a lookup belongs to the step beside it."""
    plan, found = layer.plan, []
    for i, (name, step) in enumerate(zip(term.names, term.steps, strict=True)):
        z = torch.eye(plan.in_features if i == 0 else prod(plan.shape(step.x)), dtype=torch.float64)
        if i == 0 and term.table is not None:
            z = gather(z, term.table)
        z = reference.contract(z.reshape(-1, *plan.shape(step.x)), getattr(layer, name).detach(), step.equation)
        z = z.reshape(len(z), -1)
        if step is term.steps[-1] and term.out_table is not None:
            z = collect(z, term.out_table)
        found.append(z.T)
    return found[::-1]


def main() -> None:
    """Draw every structure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, cls in sl.STRUCTURES.items():
        spec, shape = (sl.spec.parse(CHOSEN[name]), (32, 32)) if name in CHOSEN else next(iter(cls.examples()))
        picture = draw(spec, *shape)
        write_bytes(FOLDER / f"{name}.png", picture)
        print(f"{name}.png: {spec} at {shape[0]}x{shape[1]}, {len(picture):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
