"""A picture of what an operator predicts: truth, prediction and error, by time or beside the given function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .recipe import OperatorRecipe

COLUMNS = 5


def draw(window: Tensor, truth: Tensor, found: Tensor, recipe: OperatorRecipe, path: Path) -> None:
    """Write a PNG to ``path``.

    Args:
        window: what was given, ``[*shape, history]``.
        truth: what followed, ``[*shape, times]``.
        found: what was predicted, likewise.
        recipe: says what they are.
        path: of the file.
    """
    figure = _lines(window, truth, found) if truth.dim() == 2 else _maps(truth, found, recipe)
    error = float((found - truth).norm() / truth.norm())
    figure.suptitle(f"{recipe.model} on {recipe.equation}, a test sample: relative L2 error {error:.4f}", fontsize=11)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(str(path))


def _maps(truth: Tensor, found: Tensor, recipe: OperatorRecipe) -> Figure:
    times = np.unique(np.linspace(0, truth.shape[-1] - 1, min(COLUMNS, truth.shape[-1])).round().astype(int))
    figure = Figure(figsize=(2.1 * len(times) + 1.2, 6.6), layout="constrained")
    rows: Any = figure.subplots(3, len(times), squeeze=False)
    largest, off = float(truth.abs().max()), float((found - truth).abs().max())
    parts = (("truth", truth, largest), ("prediction", found, largest), ("error", found - truth, off))
    for row, (name, values, limit) in zip(rows, parts, strict=True):
        for axes, time in zip(row, times, strict=True):
            look: Any = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "origin": "lower", "interpolation": "nearest"}
            image = axes.imshow(values[..., time].numpy(), **look)
            axes.set(xticks=[], yticks=[])
            if name == "truth" and recipe.times > 2:
                axes.set_title(f"t = {recipe.history + 1 + time}", fontsize=9)
        row[0].set_ylabel(name)
        figure.colorbar(image, ax=list(row), shrink=0.8)
    return figure


def _lines(window: Tensor, truth: Tensor, found: Tensor) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.arange(len(truth)) / len(truth)
    left.plot(x, window[:, -1].numpy(), color="#777777")
    left.set(title="given", xlabel="x")
    right.plot(x, truth[:, 0].numpy(), color="#000000", label="truth")
    right.plot(x, found[:, 0].numpy(), color="#d55e00", linestyle="--", label="prediction")
    right.set(title="wanted", xlabel="x")
    right.legend()
    return figure
