"""What a run on images leaves to look at: accuracy as training went on, and images with what the model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMNS = 8
RIGHT, WRONG = "#009e73", "#d55e00"


def draw(
    path: Path,
    series: dict[str, list[float]],
    pixels: np.ndarray[Any, Any],
    names: Sequence[tuple[str, str]],
    title: str,
) -> None:
    """Write the picture as a PNG.

    Args:
        path: of the file.
        series: "step" and "accuracy" of every validation.
        pixels: uint8 ``[n, height, width, channels]``, of 1 or 3 channels.
        names: of each image, the class that the model says and the true one.
        title: what was trained.
    """
    rows = -(-len(pixels) // COLUMNS)
    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(2, 3))
    left, right = parts
    axes = left.subplots()
    axes.plot(series["step"], [100 * share for share in series["accuracy"]], marker="o", markersize=4, color="#0072b2")
    axes.set(xlabel="training step", ylabel="validation accuracy, %", title=title)
    axes.grid(color="#ebebeb")
    brightest = max(1, pixels.max())  # some sets keep 6 bits of each colour
    for place, cell in enumerate(right.subplots(rows, COLUMNS, squeeze=False).flat):
        cell.set_axis_off()
        if place < len(pixels):
            cell.imshow(pixels[place].squeeze() / brightest, cmap="gray", vmin=0, vmax=1)
            says, true = names[place]
            cell.set_title(says[:14], fontsize=7, pad=2, color=RIGHT if says == true else WRONG)
    right.suptitle("what the model says; orange: wrong", fontsize=9, color="#666666")
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
