"""What is read off the curves of a run on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def seconds_to(accuracy: float, series: Mapping[str, Sequence[float]]) -> float | None:
    """Seconds of training until a validation first had ``accuracy``, or None where none had.

    Args:
        accuracy: a share.
        series: "seconds" and "accuracy" of every validation; a finer curve gives a finer time.
    """
    return next((t for t, a in zip(series["seconds"], series["accuracy"], strict=True) if a >= accuracy), None)
