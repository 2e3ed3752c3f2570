"""Records of evaluations as lines of text: one line a number, with its standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..report.records import Record

SHARES = ("accuracy", "f1", "majority")
"""Metrics between 0 and 1 that are shown in percent, as are all of minimal pairs."""


def lines(records: Sequence[Record]) -> Iterator[str]:
    """For each record its name, what was counted, and every metric plus or minus its standard error."""
    for record in records:
        metrics = record["metrics"]
        measured = [name for name in metrics if f"{name}_stderr" in metrics]
        others = [name for name in metrics if name not in measured and not name.endswith("_stderr")]
        counts = ", ".join(f"{name.replace('_', ' ')} {cell(name, metrics[name])}" for name in others)
        yield f"{record['name']}: {counts}"
        width = max(len(name) for name in measured)
        for name in measured:
            error = metrics[f"{name}_stderr"]
            spread = "" if error is None else f" +- {cell(name, error)}"
            yield f"  {name:{width}}  {cell(name, metrics[name]):>8}{spread}"


def cell(name: str, value: float | int | None) -> str:
    """A count as it is, a share in percent with two decimals, another number with four, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if name in SHARES or "/" in name:
        return f"{100 * value:.2f}%"
    return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
