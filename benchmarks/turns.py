"""A GPU in turns: what times something has it for itself, and all else that shares it stops meanwhile."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

LOCKS = Path("/proc/locks")  # where the system says who waits for a lock; Linux has it
LOOK = 0.02  # seconds between two looks at it
SETTLE = 0.15  # seconds until a device has done what a stopped process had asked for


def processes(session: int) -> list[int]:
    """All processes of a session, those in groups of their own too."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(name)) == session:
                found.append(int(name))
    return found


def tell(sessions: Iterable[int], what: signal.Signals, but: int | None = None) -> None:
    """Send a signal to every process of the sessions, but to those of one group."""
    for session in sessions:
        for process in processes(session):
            with suppress(ProcessLookupError):
                if os.getpgid(process) != but:
                    os.kill(process, what)


def waiting(lines: Iterable[str], holder: int) -> int | None:
    """The process that waits for a lock of ``holder``, the first one, by the lines of /proc/locks; None for nobody."""
    words = [line.split() for line in lines]
    held = {line[0] for line in words if line[1] == "FLOCK" and line[4] == str(holder)}
    return next((int(line[5]) for line in words if line[0] in held and line[1] == "->"), None)


class Turns:
    """Holds a lock, and gives it to whoever waits for it; the others that share the GPU are stopped meanwhile.

    Args:
        path: the lock, which `structlin.once.alone` takes in processes that time something.
        sessions: what says which processes share the GPU, by the ids of their sessions.
    """

    def __init__(self, path: Path, sessions: Callable[[], Iterable[int]]) -> None:
        self.path, self.sessions = path, sessions
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Turns:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with open(self.path, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while not self._ended.wait(LOOK):
                if (process := waiting(LOCKS.read_text().splitlines(), os.getpid())) is not None:
                    with suppress(ProcessLookupError):  # it ended meanwhile
                        self._give(lock.fileno(), os.getpgid(process))
                    tell(self.sessions(), signal.SIGCONT)

    def _give(self, lock: int, group: int) -> None:
        """Let a process of ``group`` have the lock until it is free again."""

        def stop() -> None:
            tell(self.sessions(), signal.SIGSTOP, but=group)

        stop()
        self._ended.wait(SETTLE)
        fcntl.flock(lock, fcntl.LOCK_UN)
        while not self._ended.wait(LOOK):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                stop()  # what has started since
