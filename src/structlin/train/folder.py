"""The folder of a run: writable before anything starts, and held by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import OptionError

LOCK = ".lock"


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
