"""What the sub-commands of ``structlin`` share: numbers as options, and how an error is said."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path


def whole(text: str) -> int:
    """A whole number; anything else is an error of the option."""
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is given; allowed: whole numbers")
    return value


def whole_from(least: int) -> Callable[[str], int]:
    """What reads a whole number that is not below ``least``."""

    def read(text: str) -> int:
        value = whole(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is given; allowed: {least} or more")
        return value

    return read


def number(text: str) -> float:
    """A finite number; anything else is an error of the option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: numbers")
    return value


def check_file(option: str, given: str | None, ending: str = "") -> None:
    """See, before any work, that a file can be written where ``option`` says, if it does.

    Raises:
        ValueError: for a folder, a file in no folder, or another ending.
    """
    if given is None:
        return
    if not given.endswith(ending):
        raise ValueError(f"{option}: {given} is given; allowed: a path that ends in {ending}")
    if Path(given).is_dir() or not Path(given).parent.is_dir():
        raise ValueError(f"{option}: {given} is given; allowed: a file in a folder that exists")


def reason(error: OSError) -> str:
    """Which file could not be read or written, and why."""
    return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")


def fail(message: str, status: int, name: str) -> int:
    """Say in one line what is wrong with ``structlin name``; returns ``status``.

    Raises:
        BrokenPipeError: where that is what is wrong: who read the output has left, and no file failed.
    """
    if isinstance(broken := sys.exc_info()[1], BrokenPipeError):
        raise broken
    print(f"structlin {name}: error: {message}", file=sys.stderr)
    return status


def lacks(packages: Sequence[str], extra: str) -> str:
    """What to say where some of ``packages``, which the extra ``extra`` installs, are not there; else ``""``."""
    missing = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(missing)}; install with: pip install 'structlin[{extra}]'" if missing else ""
