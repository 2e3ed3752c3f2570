"""Files that several processes may want at once, made by one of them while the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def making(path: Path) -> Iterator[bool]:
    """Whether ``path`` is to be made in this block: no where it is there, or another process has made it meanwhile.

    Raises:
        OSError: where it is not there and nothing can be written beside it.
    """
    if path.exists():
        yield False
        return
    beside = path.with_name(f".{path.name}.lock")
    lock = _held(beside)
    try:
        yield not path.exists()
    finally:
        beside.unlink(missing_ok=True)
        lock.close()


def _held(path: Path) -> BinaryIO:
    """The file at ``path``, locked; one that its holder removed before it was ours is another file."""
    while True:
        lock = open(path, "wb")  # noqa: SIM115, the lock ends when it is closed
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        lock.close()
