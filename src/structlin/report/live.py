"""What a comparison shows on the terminal: bars with the time that is left while it runs, then the table.

Where standard error is not a terminal, one line per finished structure takes the place of the bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .records import Record
from .tables import COLUMNS, NOTES, failures, rows


class Live:
    """Bars for a run; a context manager.

    Args:
        console: where to draw.
        structures: in the order of training.
        done: those that need no training.
        steps: of each structure.
    """

    def __init__(self, console: Console, structures: Sequence[str], done: Sequence[str], steps: int) -> None:
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks = {
            name: self.progress.add_task(
                escape(name),
                total=steps,
                start=False,
                completed=steps if name in done else 0,
                note="done before" if name in done else "",
            )
            for name in structures
        }
        self.reached = dict.fromkeys((name for name in structures if name not in done), 0)
        self.all = self.progress.add_task("all", total=steps * len(self.reached), note="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, structure: str, values: Mapping[str, Any]) -> None:
        """Show what a worker emitted, or its start or end."""
        task = self.tasks[structure]
        if "start" in values:
            self.progress.start_task(task)
        if "note" in values:
            self.console.print(values["note"], soft_wrap=True, markup=False, highlight=False)
        if "step" in values:
            self._reach(structure, values["step"], f"training {values['loss'] / math.log(2):.2f} bits/byte")
        if "record" in values or "error" in values:
            error = values["error"] if "error" in values else values["record"]["error"]
            bits = values["record"]["metrics"]["bits_per_byte"] if error is None else None
            note = f"failed: {error}" if bits is None else f"validation {bits:.3f} bits/byte"
            self._reach(structure, self.steps, escape(note))
            self.progress.stop_task(task)
            if not self.console.is_terminal:
                self.console.print(f"{structure}: {note}", soft_wrap=True, markup=False, highlight=False)

    def _reach(self, structure: str, step: int, note: str) -> None:
        self.reached[structure] = step
        self.progress.update(self.tasks[structure], completed=step, note=note)
        self.progress.update(self.all, completed=sum(self.reached.values()))


def print_table(console: Console, records: Sequence[Record]) -> None:
    """Print the records as a table sorted by loss, what failed, and what the columns mean."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("structure", overflow="fold")
    for header, _, _ in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows(records):
        table.add_row(*map(escape, row), style="bold" if row[0] == "dense" else None)
    console.print(table)
    for line in failures(records):
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(f"\n{NOTES}\n", style="dim", markup=False, highlight=False)
