"""Choices on disk, one small JSON file each, so that a machine measures a layer once and not once per process.

Files are replaced in one step, so any number of processes may read and write the folder at the same time. What cannot
be read (damaged, of another format) counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

FORMAT = 1


def folder() -> Path:
    """Where choices are kept: STRUCTLIN_CACHE_DIR, else ``~/.cache/structlin``."""
    return Path(os.environ.get("STRUCTLIN_CACHE_DIR") or os.path.expanduser("~/.cache/structlin"))


def path_of(key: str) -> Path:
    """The file for ``key``."""
    return folder() / f"choice-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def load(key: str) -> Any:
    """What `save` last wrote for ``key``; None where there is nothing readable."""
    try:
        document = json.loads(path_of(key).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("key") != key:
        return None
    return document.get("choice")


def save(key: str, choice: Any) -> None:
    """Replace the file for ``key``; where the folder cannot be written, warn once."""
    path = path_of(key)
    data = json.dumps({"format": FORMAT, "key": key, "choice": choice}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".choice-")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _warn(str(path.parent), error.strerror or str(error))


@cache
def _warn(where: str, why: str) -> None:
    message = f"choices of backends cannot be kept in {where} ({why}), so each process measures for itself; "
    warnings.warn(f"{message}set STRUCTLIN_CACHE_DIR to a folder that can be written", stacklevel=2)
