"""A GPU in turns: who times something has it for itself, and what times nothing runs in between."""

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


def tell(sessions: Iterable[int], what: signal.Signals) -> None:
    """Send a signal to every process of the sessions."""
    for session in sessions:
        for process in processes(session):
            with suppress(ProcessLookupError):
                os.kill(process, what)


def wanted(lines: Iterable[str], holder: int) -> bool:
    """Whether a process waits for a lock that ``holder`` has, by the lines of /proc/locks."""
    words = [line.split() for line in lines]
    held = {line[0] for line in words if line[1] == "FLOCK" and line[4] == str(holder)}
    return any(line[0] in held and line[1] == "->" for line in words)


class Between:
    """Holds a lock for processes that time nothing, and gives it up to whoever waits for it; they are stopped then.

    Args:
        path: the lock, which `structlin.once.alone` takes in processes that time something.
        sessions: what says which processes time nothing, by the ids of their sessions.
    """

    def __init__(self, path: Path, sessions: Callable[[], Iterable[int]]) -> None:
        self.path, self.sessions = path, sessions
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Between:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with open(self.path, "ab") as lock:
            while not self._ended.is_set():
                self._wait(lock.fileno())
                while not self._ended.wait(LOOK) and not wanted(LOCKS.read_text().splitlines(), os.getpid()):
                    pass
                self._stop()
                self._ended.wait(SETTLE)
                fcntl.flock(lock, fcntl.LOCK_UN)
                self._ended.wait(LOOK)  # who waits goes first
        tell(self.sessions(), signal.SIGCONT)

    def _wait(self, lock: int) -> None:
        """Until nobody else has the lock; what starts meanwhile is stopped too."""
        while not self._ended.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._stop()
                self._ended.wait(LOOK)
            else:
                tell(self.sessions(), signal.SIGCONT)
                return

    def _stop(self) -> None:
        tell(self.sessions(), signal.SIGSTOP)
