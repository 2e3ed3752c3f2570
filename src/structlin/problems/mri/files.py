"""Images and measured k-space from a folder: slices in an archive or in folders, NIfTI volumes, one array of k-space.

NIfTI-1 is read here (its header of 348 bytes and one array), so that a volume needs no further package. Whatever does
not fit is an error that names the file: nothing is skipped but files of other kinds.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...train.config import OptionError

VARIABLE = "STRUCTLIN_MRI"
ALLOWED = (
    "allowed: a folder with an archive *.tar.xz (or folders) of train/... and test/... grey images (.jpg, .png), and "
    "optionally volumes *.nii or *.nii.gz and one measured *kspace*.npy, complex [coils, height, width]"
)
PICTURES = (".jpg", ".jpeg", ".png")
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
HEADER, PLANES = 348, 8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Images:
    """What a folder holds.

    Args:
        train, test: grey slices, float32 ``[n, height, width]`` from 0 to 1, each as large as asked for.
        volumes: name -> planes of a volume across its last axis, from the same range and of the same size.
        kspace: measured k-space, complex64 ``[coils, height, width]`` of its own size, frequency 0 first, or None.
        sampled: share of its places at which a coil measured something.
        sha256: of the bytes of every file that was read.
    """

    train: Tensor
    test: Tensor
    volumes: dict[str, Tensor]
    kspace: Tensor | None
    sampled: float
    sha256: str


def read(folder: Path, height: int, width: int) -> Images:
    """The images of a folder at ``height`` x ``width`` pixels, by `fit`; kept for the next call.

    Slices fill them, so that what is trained on them sees signal wherever a scan may have some; volumes stay whole.

    Raises:
        OptionError: for a folder that is not there or lacks slices, and for files that are not what their names say.
    """
    stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*")))
    return _read(folder, height, width, stamps)


@lru_cache(1)
def _read(folder: Path, height: int, width: int, stamps: tuple[tuple[Path, int, int], ...]) -> Images:
    digest = hashlib.sha256()
    slices: dict[str, list[Tensor]] = {"train": [], "test": []}
    name: Path | str = folder
    try:
        for name, data in _pictures(folder):
            part = Path(name).parts[0]
            if part in slices:
                digest.update(data)
                slices[part].append(fit(_grey(data), height, width, fill=True))
        name = folder
        if not all(slices.values()):
            raise ValueError(f"holds {len(slices['train'])} train and {len(slices['test'])} test slices")
        volumes = {}
        for path in sorted([*folder.glob("*.nii"), *folder.glob("*.nii.gz")]):
            name = path
            data = path.read_bytes()
            digest.update(data)
            volumes[path.name.partition(".")[0]] = planes(read_nifti(data), height, width)
        kspace, sampled = None, 0.0
        for path in sorted(folder.glob("*kspace*.npy")):
            name = path
            if kspace is not None:
                raise ValueError("is a second measured k-space in this folder")
            data = path.read_bytes()
            digest.update(data)
            kspace, sampled = _measured(data)
    except (OSError, EOFError, ValueError, struct.error, tarfile.TarError, lzma.LZMAError) as error:
        raise OptionError("--data", f"{name}: {error}; {ALLOWED}") from None
    train, test = (torch.stack(slices[part]) for part in ("train", "test"))
    return Images(train, test, volumes, kspace, sampled, digest.hexdigest())


def fit(image: Tensor, height: int, width: int, fill: bool = False) -> Tensor:
    """``[h, w]`` scaled to fit, its centre in the middle of ``[height, width]``, zeros around it, largest value 1.

    With ``fill`` it is scaled to have no zeros around it, and what sticks out is cut off. Scaling keeps the ratio of
    the sides; smaller images are means over areas, larger ones bilinear. An image without any signal stays zero.
    """
    ratios = height / image.shape[0], width / image.shape[1]
    scale = max(ratios) if fill else min(ratios)
    size = [max(1, round(scale * side)) for side in image.shape]
    if list(image.shape) != size:
        mode = "area" if scale < 1 else "bilinear"
        image = F.interpolate(image[None, None], size=size, mode=mode)[0, 0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    placed = F.pad(image, (left, width - size[1] - left, top, height - size[0] - top))  # a negative one cuts
    return placed / placed.max().clamp_min(torch.finfo(torch.float32).tiny)


def planes(volume: Tensor, height: int, width: int) -> Tensor:
    """Every eighth plane of the middle half of a volume ``[x, y, z]``, nose up: ``[n, height, width]`` from 0 to 1."""
    depth = volume.shape[2]
    chosen = range(depth // 4, depth - depth // 4, PLANES)
    return torch.stack([fit(volume[:, :, z].T.flip(0).contiguous(), height, width) for z in chosen])


def read_nifti(data: bytes) -> Tensor:
    """The volume of a NIfTI-1 file, possibly gzipped, float32 ``[x, y, z]``, its slope and intercept applied.

    Raises:
        ValueError: for bytes that are none, cut short, of another type or not of three dimensions.
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < HEADER:
        raise ValueError(f"has {len(data)} bytes, less than the header of a NIfTI-1 file")
    order = "<" if struct.unpack("<i", data[:4])[0] == HEADER else ">"
    if struct.unpack(order + "i", data[:4])[0] != HEADER or data[344:347] not in (b"n+1", b"ni1"):
        raise ValueError("is no NIfTI-1 file")
    count, *shape = struct.unpack(order + "8h", data[40:56])
    kind = struct.unpack(order + "h", data[70:72])[0]
    offset, slope, intercept = struct.unpack(order + "3f", data[108:120])
    if count < 3 or any(side != 1 for side in shape[3:count]) or kind not in NIFTI_TYPES:
        raise ValueError(f"has {count} dimensions {shape[:count]} of type {kind}; read are 3 of real numbers")
    array = np.dtype(order + NIFTI_TYPES[kind])
    size = int(np.prod(shape[:3]))
    if len(data) < int(offset) + size * array.itemsize:
        raise ValueError(f"is cut short: {len(data)} bytes for {shape[:3]} values of type {kind}")
    values = np.frombuffer(data, array, size, int(offset)).reshape(shape[:3], order="F").astype(np.float32)
    return torch.from_numpy(values * slope + intercept if slope else values)


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every picture under ``folder`` or in its archives, ordered by name."""
    if not folder.is_dir():
        raise OSError("is no folder")
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.lower().endswith(PICTURES) else None
                if file is not None:
                    found[member.name] = file.read()
    for path in (path for path in folder.glob("*/**/*") if path.suffix.lower() in PICTURES):
        found[str(path.relative_to(folder))] = path.read_bytes()
    yield from sorted(found.items())


def _grey(data: bytes) -> Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("L"), dtype=np.float32))


def _measured(data: bytes) -> tuple[Tensor, float]:
    """Centred k-space as one with frequency 0 first, whose inverse transform is the centred image, largest value 1; and
    the share of places that are not empty."""
    array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != 3 or not np.iscomplexobj(array) or not np.isfinite(array).all():
        raise ValueError(f"holds {array.dtype} {list(array.shape)}, not finite complex [coils, height, width]")
    kspace = torch.from_numpy(array.astype(np.complex64))
    axes = (-2, -1)
    coils = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=axes)), dim=axes)
    transformed: Tensor = torch.fft.fft2(coils / coils.abs().square().sum(0).sqrt().max())
    return transformed, float((array != 0).any(0).mean())
