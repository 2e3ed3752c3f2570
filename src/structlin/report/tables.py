"""Records as tables: the same rows for the terminal, Markdown and HTML. Plain strings, no packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .records import Record

Column = tuple[str, str, Callable[[float], str]]

COLUMNS: tuple[Column, ...] = (
    ("swapped\nparams", "swapped_params", lambda n: short(n)),
    ("model\nparams", "model_params", lambda n: short(n)),
    ("FLOPs/\ntoken", "flops_per_token", lambda n: short(n)),
    ("valid\nloss", "valid_loss", lambda x: f"{x:.3f}"),
    ("bits/\nbyte", "bits_per_byte", lambda x: f"{x:.3f}"),
    ("tokens\n/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
    ("peak\nmemory", "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f} MB"),
    ("time to\ndense", "seconds_to_dense_loss", lambda x: f"{x:.1f} s"),
)
"""Header in two short lines, metric and format of each column after the structure's name."""

HEADERS = ("structure", *(" ".join(header.split()).replace("/ ", "/").replace(" /", "/") for header, _, _ in COLUMNS))

NOTES = (
    "Swapped params: weights of the replaced layers. FLOPs/token: forward pass of the model, a multiply-add counted as "
    "two. Valid loss: nats per byte. Tokens/s and time: training steps only, without validation and checkpoints. "
    "Peak memory: of tensors on a GPU; on a CPU of the process, interpreter and libraries included. "
    "Time to dense: training time at the first validation no worse than dense's last one."
)
"""What the columns mean."""


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per record under `HEADERS`, the lowest validation loss first, then what failed; "-" where nothing is."""
    return [[record["name"], *(_cell(record, column) for column in COLUMNS)] for record in by_loss(records)]


def by_loss(records: Sequence[Record]) -> list[Record]:
    """The records, the lowest validation loss first and those without one last."""

    def loss(record: Record) -> float:
        value = record["metrics"].get("valid_loss")
        return float("inf") if value is None else value

    return sorted(records, key=loss)


def failures(records: Sequence[Record]) -> list[str]:
    """A line for each record that failed, saying why."""
    return [f"{record['name']} failed: {record['error']}" for record in records if record["status"] == "failed"]


def markdown(records: Sequence[Record]) -> str:
    """The rows as a Markdown table, with a line for each failure."""
    lines = [HEADERS, ["---", *["---:"] * len(COLUMNS)], *rows(records)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *failures(records)]) + "\n"


def short(number: float) -> str:
    """Three digits and a letter: ``short(65536) == "65.5k"``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{letter}"
    return f"{number:.0f}"


def _cell(record: Record, column: Column) -> str:
    _, metric, form = column
    value = record["metrics"].get(metric)
    if value is None:
        return "failed" if metric == "valid_loss" and record["status"] == "failed" else "-"
    return form(value)
