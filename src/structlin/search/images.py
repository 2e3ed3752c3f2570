"""Images from a folder, as integers from 0 to 63: arrays of numpy, or mosaics of 32x32 tiles as CIFAR is often packed.

The last tenth is held out for validation. Only training images are read, so that a search does not choose by the test.
"""

from __future__ import annotations

import hashlib
import io
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..train.config import OptionError

VARIABLE = "STRUCTLIN_IMAGES"
TILE, LEVELS, VALID_SHARE = 32, 64, 0.1
ALLOWED = (
    "allowed: a folder with *train_x.npy and *train_y.npy (uint8 images [n, height, width] or [n, height, width, 3] "
    "and their labels; also .npy.xz), or with train_NN.webp or .png, mosaics of 32x32 tiles row by row, and "
    "*train_y.npy"
)

Array = np.ndarray[Any, Any]


def read_images(folder: Path) -> tuple[Array, Array]:
    """The training images of a folder, uint8 ``[n, height, width, channels]``, and their labels, int64 ``[n]``.

    Raises:
        OptionError: for a folder without them, or arrays that do not fit.
    """
    try:
        labels = _array(folder, "train_y")
        if labels is None:
            raise ValueError("holds no labels")
        images = _array(folder, "train_x")
        images = _mosaics(folder, len(labels)) if images is None else images
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels) or len(labels) < 20:
            raise ValueError(f"holds {images.dtype} images {list(images.shape)} and {len(labels)} labels")
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise OptionError("--data", f"{folder}: {error}; {ALLOWED}") from None
    return images, labels.astype(np.int64)


def small(images: Array, size: int) -> Tensor:
    """Images as means over ``size`` x ``size`` areas, rounded, uint8 ``[n, size, size, channels]`` from 0 to 63.

    Images with values above 63 are divided by 4 first.
    """
    values = torch.from_numpy(images).float()
    if images.max() >= LEVELS:
        values = (values / 4).floor()
    areas = F.adaptive_avg_pool2d(values.permute(0, 3, 1, 2), size)
    return areas.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def about(images: Array, labels: Array) -> dict[str, Any]:
    """Shape of the images and a hash of them and their labels; JSON-ready."""
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return {"images": list(images.shape), "sha256": digest}


def _array(folder: Path, ending: str) -> Array | None:
    """The one array of ``folder`` whose name ends so."""
    found = [path for kind in (".npy", ".npy.xz") for path in sorted(folder.glob(f"*{ending}{kind}"))]
    if len(found) > 1:
        raise ValueError(f"holds {' and '.join(path.name for path in found)}")
    if not found:
        return None
    data = found[0].read_bytes()
    loaded: Array = np.load(io.BytesIO(lzma.decompress(data) if found[0].suffix == ".xz" else data))
    return loaded


def _mosaics(folder: Path, count: int) -> Array:
    """The first ``count`` tiles of the mosaics of ``folder``, in the order of their names."""
    from PIL import Image

    paths = sorted(path for kind in ("webp", "png") for path in folder.glob(f"train_[0-9]*.{kind}"))
    if not paths:
        raise ValueError("holds no images")
    tiles: list[Array] = []
    for path in paths:
        mosaic = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = mosaic.shape[0] // TILE, mosaic.shape[1] // TILE
        cut = mosaic[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE, 3)
        tiles.append(cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, TILE, TILE, 3))
    return np.concatenate(tiles)[:count]
