"""Solutions on disk, found again by a hash of all that they follow from.

A file is an ``.npz`` of plain arrays, written whole or not at all, and read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...once import making

FORMAT = 1
ABOUT = "about"


def cached(
    folder: Path, parameters: Mapping[str, Any], make: Callable[[], Mapping[str, NDArray[Any]]]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays that ``make`` computes, from ``folder`` where they are there, else computed and kept.

    Args:
        folder: made if needed.
        parameters: JSON-ready, "equation" among them; everything that the arrays follow from but the device.
        make: computes them.

    Returns:
        The arrays by name, and the parameters with the "sha256" of the arrays.

    Raises:
        ValueError: for a file that cannot be read, naming it.
        OSError: where nothing can be written.
    """
    wanted = json.loads(json.dumps({"format": FORMAT, **parameters}, sort_keys=True))
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{parameters['equation']}-{key}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with making(path) as missing:
        if missing:
            return _made(path, wanted, dict(make()))
    return _read(path, wanted)


def _made(path: Path, wanted: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> tuple[Any, dict[str, Any]]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    about = wanted | {"sha256": digest.hexdigest()}
    _write(path, {**arrays, ABOUT: np.array(json.dumps(about))})
    return arrays, about


def _read(path: Path, wanted: dict[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop(ABOUT)))
        if not wanted.items() <= about.items():
            raise ValueError("it was made with other parameters")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be used ({error}); delete it, and it is computed again") from None
    return arrays, about


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".solutions-", suffix=".npz")
    try:
        with open(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
