"""The folder of a run: writable before anything starts, held by one process at a time, and of one run only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..report import records
from ..report.records import Record
from .config import OptionError
from .settings import ELSEWHERE

FORMAT = 1
LOCK, RUN, MODEL, RECORD = ".lock", "run.json", "model", "record.json"


def check_writable(folder: Path) -> None:
    """See that ``folder`` is or can become a folder that one may write to, without writing anything.

    Raises:
        OptionError: otherwise.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OptionError("--out", f"{there} is not a folder; allowed: a folder, or a path where one can be made")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OptionError("--out", f"{there} is not writable; allowed: a folder that you may write to")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold its lock, which the system releases when this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "wb")  # noqa: SIM115, held to the end of the block below
    except OSError as error:
        raise OptionError("--out", f"{folder} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            raise OptionError("--out", f"{folder} {'is in use by another run' if busy else error.strerror}") from None
        yield


def claim(folder: Path, run: dict[str, Any]) -> None:
    """See that ``folder`` holds this run or none, and write down that it holds this one, as ``run.json``.

    Args:
        folder: of the run.
        run: its "command", "recipe" (all fields) and "data" (what identifies them), and whatever else; JSON-ready.

    Raises:
        OptionError: where it holds another run, or one on other data.
    """
    now = {"format": FORMAT, **run}
    if (folder / MODEL).exists() and not (folder / MODEL).is_dir():
        raise OptionError("--out", f"{folder / MODEL} is a file, and the model goes there; choose another folder")
    try:
        before = json.loads((folder / RUN).read_bytes())
    except FileNotFoundError:
        before = now
    except ValueError:
        before = {}
    known = isinstance(before, dict) and all(isinstance(before.get(name), dict) for name in ("recipe", "data"))
    if not known or before.get("format") != FORMAT:
        raise OptionError("--out", f"{folder / RUN} is not of a run of this version; choose another folder")
    changed = [
        f"{name} ({before['recipe'].get(name)!r} there, {value!r} here)"
        for name, value in now["recipe"].items()
        if before["recipe"].get(name) != value and name not in ELSEWHERE
    ]
    if changed:
        raise OptionError("--out", f"{folder} holds a run with another {', '.join(changed)}; choose another folder")
    if (_hashes(before["data"]) or before["data"]) != (_hashes(now["data"]) or now["data"]):
        said = f"the data have changed since the run in {folder} began; bring them back, or choose another folder"
        raise OptionError("--data", said)
    records.write_bytes(folder / RUN, (json.dumps(now, indent=1) + "\n").encode())


def finished(path: Path) -> Record | None:
    """The record at ``path`` of a run that ended well, if it is there.

    Raises:
        OptionError: for a damaged file.
    """
    try:
        found = records.read(path)
        if len(found) != 1:
            raise ValueError(f"{path}: holds {len(found)} records, and that of a run is one")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OptionError("--out", f"{error}; remove that file or choose another folder") from None
    return found[0] if found[0]["status"] == "ok" else None


def _hashes(data: Any) -> list[str]:
    """Every ``sha256`` in ``data``, at any depth."""
    if not isinstance(data, dict):
        return []
    return [h for name, part in data.items() for h in ([part] if name == "sha256" else _hashes(part))]
