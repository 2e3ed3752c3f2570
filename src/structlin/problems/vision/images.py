"""Labelled images from wherever they lie, as unsigned bytes: arrays, mosaics, folders of classes, archives, parquet.

Sets that fit into memory are decoded once; larger ones, as ImageNet, when a batch is taken. Validation is for whoever
reads: a split here is one of those on the disk, and the test images are never part of "train".
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...train.config import OptionError

VARIABLE = "STRUCTLIN_IMAGES"
"""The folder of images where none is given."""
TILE, MEMORY, LEAST = 32, 8 << 30, 20
TESTS = ("test", "val", "valid", "validation")
ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm")
ALLOWED = (
    "allowed: a folder with *train_x.npy and *train_y.npy (uint8 images [n, height, width] or [n, height, width, 3] "
    "and their labels; also .npy.xz), with train_NN.webp or .png, mosaics of 32x32 tiles row by row, and *train_y.npy, "
    "with train/CLASS/ or CLASS/ and images below (also packed as .tar, .tar.gz or .tar.xz), or with train-*.parquet"
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Encoded:
    """An image as a file: where it comes from, its class, and how its bytes are read."""

    name: str
    label: str
    read: Callable[[], bytes]


class Pictures:
    """Images of one size and their labels.

    Attributes:
        labels: int64 ``[n]``, places in ``classes``.
        classes: names, sorted or as ``classes.json`` has them; numbers where there are none.
        shape: height, width and channels.
        pixels: uint8 ``[n, height, width, channels]``, or None where they are decoded as they are taken.
        about: number and shape of the images and a hash of them; JSON-ready.
    """

    def __init__(self, labels: Array, classes: tuple[str, ...], images: Array | Sequence[Encoded], size: int) -> None:
        self.labels, self.classes, self._size = labels.astype(np.int64), classes, size
        self.pixels = images if isinstance(images, np.ndarray) else None
        self._encoded: Sequence[Encoded] = () if isinstance(images, np.ndarray) else images
        self.shape: tuple[int, ...] = (size, size, 3) if self.pixels is None else self.pixels.shape[1:]
        names = "\n".join(image.name for image in self._encoded).encode()
        content = names if self.pixels is None else np.ascontiguousarray(self.pixels).data
        digest = hashlib.sha256(content)
        digest.update(self.labels.tobytes())
        self.about: dict[str, Any] = {"images": [len(labels), *self.shape], "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Array) -> Array:
        """The images at the places ``chosen``, uint8 ``[len(chosen), height, width, channels]``."""
        if self.pixels is not None:
            found: Array = self.pixels[chosen]
            return found
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes beside the interpreter's lock
            return np.stack(list(pool.map(lambda place: _decode(self._encoded[place], self._size), chosen)))


def read(path: Path, split: str = "train", size: int | None = None) -> Pictures:
    """The images of one split of a folder or archive.

    Args:
        path: see `ALLOWED` for what may be there. A class may have folders of its own below it, and a split a file
            ``val_annotations.txt`` that names the class of each image instead.
        split: its name on the disk.
        size: pixels on a side that images are scaled and cut to, from their middle; None leaves them as they are.

    Raises:
        OptionError: for a path without such images, or images that do not fit together.
    """
    try:
        if path.is_dir() and (labels := _array(path, f"{split}_y")) is not None:
            images = _array(path, f"{split}_x")
            images = _mosaics(path, split, len(labels)) if images is None else images
            found = _from_arrays(images, labels, _names(path, int(labels.max(initial=0)) + 1), size)
        else:
            found = _from_files(_encoded(path, split), size)
        if split == "train" and len(found) < LEAST:
            raise ValueError(f"holds {len(found)} images, and {LEAST} are needed")
        return found
    except (OSError, ValueError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        raise OptionError("--data", f"{path}: {said}; {ALLOWED}") from None


def read_test(path: Path, train: Pictures, size: int | None = None) -> Pictures | None:
    """The test images beside ``train``: the first of the splits test, val, valid and validation that has its classes.

    None where there is none; the test images of some published sets have no labels, and then the next split counts.

    Raises:
        OptionError: as `read`, and for images of another shape.
    """
    for split in TESTS:
        if _has(path, split):
            found = read(path, split, size)
            if set(found.classes) <= set(train.classes):
                if found.shape != train.shape:
                    raise OptionError("--data", f"{path}: train is {list(train.shape)} and {split} {list(found.shape)}")
                places = np.array([train.classes.index(name) for name in found.classes])
                found.labels = places[found.labels]
                found.classes = train.classes
                return found
    return None


def _has(path: Path, split: str) -> bool:
    if not path.is_dir():
        return any(PurePosixPath(name).parts[0] == split for name in _files(path))
    return any((path / split).glob("*")) or any(path.glob(f"*{split}_y.npy*")) or any(path.rglob(f"{split}-*.parquet"))


def _names(folder: Path, count: int) -> tuple[str, ...]:
    """The list of a ``classes.json``, or numbers."""
    try:
        names = json.loads((folder / "classes.json").read_bytes())
    except FileNotFoundError:
        return tuple(map(str, range(count)))
    if not isinstance(names, list) or len(names) < count:
        raise ValueError(f"classes.json is no list of {count} names")
    return tuple(names)


def _from_arrays(images: Array, labels: Array, classes: tuple[str, ...], size: int | None) -> Pictures:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(f"holds {images.dtype} images {list(images.shape)} and {len(labels)} labels")
    if size is not None and images.shape[1:3] != (size, size):
        from PIL import Image

        flat = [Image.fromarray(image.squeeze()) for image in images]
        images = np.stack([np.asarray(_fitted(image, size)).reshape(size, size, -1) for image in flat])
    return Pictures(labels, classes, images, len(images[0]))


def _from_files(files: list[Encoded], size: int | None) -> Pictures:
    """In the order of the hashes of their names, so that no part of them has some classes only."""
    if not files:
        raise ValueError("holds no images")
    files = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    numbers = all(file.label.isdecimal() for file in files)
    classes = tuple(sorted({file.label for file in files}, key=int if numbers else str))
    place = {name: index for index, name in enumerate(classes)}
    labels = np.array([place[file.label] for file in files])
    first = _decode(files[0], size)
    if len(files) * first.nbytes > MEMORY:
        if size is None:
            raise ValueError(f"holds {len(files)} images, too many for the memory; give --image, pixels on a side")
        return Pictures(labels, classes, files, size)
    images = np.empty((len(files), *first.shape), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, image in enumerate(pool.map(lambda file: _decode(file, size), files)):
            if image.shape != first.shape:
                one, other = ("x".join(map(str, shape[:2])) for shape in (first.shape, image.shape))
                raise ValueError(f"holds images of {one} and of {other}; give --image, pixels on a side")
            images[index] = image
    return Pictures(labels, classes, images, len(first))


def _encoded(path: Path, split: str) -> list[Encoded]:
    """The images of a split that lie in files of their own, an archive, or tables."""
    if path.is_dir() and (tables := sorted([*path.rglob(f"{split}-*.parquet"), *path.rglob(f"{split}.parquet")])):
        return [image for table in tables for image in _rows(table)]
    files = _files(path)
    split_here = any(PurePosixPath(name).parts[0] == split for name in files)
    if not split_here and split != "train":
        return []
    root = PurePosixPath(split) if split_here else PurePosixPath()
    notes = files.get(str(root / "val_annotations.txt"))
    lines = [line.split("\t") for line in notes().decode().splitlines()] if notes else []
    named = {fields[0]: fields[1] for fields in lines}
    found = []
    for name, content in files.items():
        parts = PurePosixPath(name).relative_to(root).parts if name.startswith(f"{root}/") or not split_here else ()
        if len(parts) > 1 and name.lower().endswith(ENDINGS):
            found.append(Encoded(name, named.get(parts[-1], parts[0]), content))
    return found


def _files(path: Path) -> dict[str, Callable[[], bytes]]:
    """Name below ``path`` -> what reads it, of a folder or an archive."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes for file in path.rglob("*") if file.is_file()}
    with tarfile.open(path) as archive:
        content = {member.name.removeprefix("./"): archive.extractfile(member) for member in archive if member.isfile()}
        return {name: _kept(file.read()) for name, file in content.items() if file is not None}


def _kept(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _rows(path: Path) -> list[Encoded]:
    """The images of a table as Hugging Face ``datasets`` writes them: a column of structs with bytes, and labels."""
    from pyarrow import parquet, types

    table = parquet.read_table(path)
    fields = {field.name: field.type for field in table.schema}
    images = [name for name, kind in fields.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    labels = [name for name, kind in fields.items() if types.is_integer(kind)]
    if not images or not labels:
        raise ValueError(f"{path.name} has columns {', '.join(fields)}, none of images with bytes, or none of labels")
    label = next((name for name in labels if name == "label"), labels[0])
    pairs = zip(table[images[0]].to_pylist(), table[label].to_pylist(), strict=True)
    return [Encoded(f"{path.name}/{i}", str(number), _kept(image["bytes"])) for i, (image, number) in enumerate(pairs)]


def _decode(file: Encoded, size: int | None) -> Array:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file.read())) as image:
            rgb = image.convert("RGB")
            return np.asarray(rgb if size is None else _fitted(rgb, size))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file.name} is no image that can be read: {error}") from None


def _fitted(image: Any, size: int) -> Any:
    """The largest square of its middle, scaled to ``size`` pixels on a side."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


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


def _mosaics(folder: Path, split: str, count: int) -> Array:
    """The first ``count`` tiles of the mosaics of ``folder``, in the order of their names."""
    from PIL import Image

    paths = sorted(path for kind in ("webp", "png") for path in folder.glob(f"{split}_[0-9]*.{kind}"))
    if not paths:
        raise ValueError("holds no images")

    def tiles(path: Path) -> Array:
        mosaic = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = mosaic.shape[0] // TILE, mosaic.shape[1] // TILE
        cut = mosaic[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE, 3)
        return cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, TILE, TILE, 3)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(tiles, paths)))[:count]
