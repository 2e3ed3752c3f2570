"""What the sub-commands of ``structlin`` share: numbers as options, and how an error is said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec


def whole(text: str) -> int:
    """A whole number; anything else is an error of the option."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: whole numbers") from None


def number(text: str) -> float:
    """A number; anything else is an error of the option."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: numbers") from None


def fail(message: str, status: int, name: str) -> int:
    """Say in one line what is wrong with ``structlin name``; returns ``status``."""
    print(f"structlin {name}: error: {message}", file=sys.stderr)
    return status


def lacks(packages: Sequence[str], extra: str) -> str:
    """What to say where some of ``packages``, which the extra ``extra`` installs, are not there; else ``""``."""
    missing = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(missing)}; install with: pip install 'structlin[{extra}]'" if missing else ""
