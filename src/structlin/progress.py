"""A line on the terminal that says how much of a long job is done and when the rest will be.

Plain text on stderr, so that it needs no package and leaves stdout to results; silent where stderr is no terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

ERASE = "\r\x1b[K"


def shown(jobs: Iterable[tuple[str, float, T]]) -> Iterator[T]:
    """The items of ``jobs``, with a line on the terminal about each while it is worked on.

    Args:
        jobs: for each item its name, its share of the work in any unit, and the item itself.
    """
    jobs = list(jobs)
    whole, done, start = sum(share for _, share, _ in jobs), 0.0, time.monotonic()
    terminal = sys.stderr.isatty()
    try:
        for count, (name, share, item) in enumerate(jobs, 1):
            if terminal:
                passed = time.monotonic() - start
                left = f", {duration(passed * (whole - done) / done)} left" if done else ""
                print(f"{ERASE}{count} of {len(jobs)}, {done / whole:.0%} done{left}: {name}", end="", file=sys.stderr)
                sys.stderr.flush()
            yield item
            done += share
    finally:
        if terminal:
            print(ERASE, end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3 min"`` or ``"1 h 20 min"``, rounded up."""
    minutes = -int(-seconds // 60)
    if seconds < 60:
        return f"{-int(-seconds // 1)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
