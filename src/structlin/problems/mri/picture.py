"""A picture of reconstructions: images in a row, what is wrong with each below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from .metrics import psnr_db, ssim

BRIGHTER = 5


def draw(rows: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Write a PNG to ``path``.

    Args:
        rows: name of an image -> method -> ``[height, width]``; the method "truth" comes first in each.
        path: of the file.
    """
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(2 * columns, 4.3 * len(rows)), layout="constrained")
    grid: Any = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (name, images) in enumerate(rows.items()):
        truth = images["truth"]
        for column, (method, image) in enumerate(images.items()):
            above, below = grid[2 * place][column], grid[2 * place + 1][column]
            above.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            if method == "truth":
                above.set_title(f"{name}\ntruth", fontsize=9)
                below.text(0.5, 0.5, f"error,\n{BRIGHTER} times as bright", ha="center", va="center", fontsize=9)
                continue
            off = (image - truth).abs()
            below.imshow(off.numpy(), cmap="magma", vmin=0, vmax=1 / BRIGHTER)
            psnr, similarity = psnr_db(image[None], truth[None]).item(), ssim(image[None], truth[None]).item()
            above.set_title(f"{method}\n{psnr:.1f} dB, SSIM {similarity:.3f}", fontsize=9)
    figure.savefig(path)
