"""What one of several processes does while the others wait: make a file that all want, or time something."""

from __future__ import annotations

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


ALONE = "STRUCTLIN_TIMING_LOCK"
_inside = False


@contextmanager
def alone() -> Iterator[None]:
    """Be the only process in such a block of all those for which STRUCTLIN_TIMING_LOCK names the same file.

    So processes that share a GPU can compile side by side and still time one after the other. Without the variable, and
    in a block inside another one, nothing is waited for.
    """
    global _inside
    path = os.environ.get(ALONE)
    if path is None or _inside:
        yield
        return
    import fcntl

    with open(path, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _inside = True
        try:
            yield
        finally:
            _inside = False
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile holds it too


def _held(path: Path) -> BinaryIO:
    """The file at ``path``, locked; one that its holder removed before it was ours is another file."""
    import fcntl  # which some systems do not have

    while True:
        lock = open(path, "wb")  # noqa: SIM115, the lock ends when it is closed
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        lock.close()
