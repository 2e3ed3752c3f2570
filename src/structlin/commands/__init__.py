"""Sub-commands of ``structlin`` that have no package of their own, and what they share."""

from __future__ import annotations

import argparse
import sys


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
