"""The records of a run in words: a table, what failed, and where dense wins. Reads records only.

The lines are plain text; rich, where it is installed, colours them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

from ..ops import BACKENDS
from ..report.records import Record
from .contenders import MODES

MODE_NAMES = dict(zip(MODES, ("forward", "forward+backward"), strict=True))
NOTHING = "-"
NOTES = (
    "Times: median in ms, spread (90th less 10th percentile, of the median), speed-up over linear by the same means. "
    "TFLOP/s, GB/s and roofline: of the last mode, in a graph where there is one, counting only what the "
    "structure needs. docs/bench.md describes every column."
)
MEANS_NAMES = {"eager": "launched from Python", "graph": "as a CUDA graph"}

Cell = Callable[[Record], str]
Line = tuple[str, str]
"""Text and style, as rich names it."""


def columns(records: Sequence[Record]) -> list[tuple[str, Cell]]:
    """Header and content of the columns of the table; those that would be empty for all records are left out."""
    found: list[tuple[str, Cell]] = [
        (f"{mode_name}{suffix}", partial(_time, key=f"{means}_{mode}"))
        for mode, mode_name in MODE_NAMES.items()
        for means, suffix in (("eager", ""), ("graph", ", graph"))
    ]
    last = MODES[1] if any(f"eager_{MODES[1]}_ms" in record["metrics"] for record in records) else MODES[0]
    found += [
        ("TFLOP/s", partial(_number, key=f"{last}_tflops", form="{:.3g}")),
        ("GB/s", partial(_number, key=f"{last}_gbps", form="{:.3g}")),
        ("roofline", partial(_number, key=f"{last}_roofline", form="{:.0%}")),
        ("peak MB", partial(_number, key=f"{last}_peak_bytes", form="{:.0f}", scale=1e-6)),
    ]
    return [(header, cell) for header, cell in found if any(cell(record) != NOTHING for record in records)]


def table(records: Sequence[Record]) -> list[Line]:
    """The records as lines of a table, a block for each problem, the yardstick first."""
    shown = columns(records)
    header = ["", *(name for name, _ in shown)]
    blocks = {
        problem: [[_config(record, "backend"), *(cell(record) for _, cell in shown)] for record in group]
        for problem, group in by_problem(records).items()
    }
    rows = [header, *(row for block in blocks.values() for row in block)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells))

    lines = [(line(header), "bold")]
    for problem, block in blocks.items():
        lines += [("", ""), (problem, "bold cyan")]
        lines += [(line(row), "" if row[0] in BACKENDS else "dim") for row in block]
    return [*lines, ("", ""), (NOTES, "dim")]


def show(lines: Sequence[Line]) -> None:
    """Print to standard output, in colour where it is a terminal and rich is installed."""
    if find_spec("rich"):
        from rich.console import Console

        console = Console()
        for text, style in lines:
            console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
    else:
        print("\n".join([*(text for text, _ in lines), "(rich is not installed: no colours)"]))


def head(records: Sequence[Record]) -> str:
    """Where and how it was measured, in two lines."""
    first = records[0]
    device, config, metrics = first["device"], first["config"], _metrics(records)
    lines = [
        f"{device['name']}, {device['threads']} CPU threads, torch {first['versions']['torch']}; "
        f"{config['tokens']} tokens, {config['dtype']}, no bias"
    ]
    if metrics:
        lines.append(
            f"measured ceilings: {metrics['ceiling_tflops']:.3g} TFLOP/s (matrix product), "
            f"{metrics['ceiling_gbps']:.4g} GB/s (copy)"
        )
    return "\n".join(lines)


def failures(records: Sequence[Record]) -> list[str]:
    """A line for each contender without a time, and for each without a CUDA graph on a device that has them."""
    lines = [f"{record['name']}: {record['error']}" for record in records if record["status"] == "failed"]
    lines += [
        f"{record['name']}: {graph}" for record in records if "not captured" in (graph := record["config"]["graph"])
    ]
    return lines


def break_even(records: Sequence[Record]) -> list[str]:
    """Where dense wins, in plain words: a line for each problem at which the best of our backends is slower.

    The backend that multiplies the factors into one dense weight does not count as ours here, nor does the choice among
    all, which may run it, where another was measured.
    """
    lines: list[str] = []
    for mode, mode_name in MODE_NAMES.items():
        for means, means_name in MEANS_NAMES.items():
            key = f"{means}_{mode}_speedup"
            best = {
                problem: max(found)
                for problem, group in by_problem(records).items()
                if (found := [(r["metrics"][key] or 0, _config(r, "backend")) for r in _ours(group, key)])
            }
            lost = {problem: found for problem, found in best.items() if found[0] < 1}
            if best and not lost:
                lines.append(f"{mode_name} {means_name}: dense wins nowhere.")
            elif best:
                where = "; ".join(f"{problem} ({name} {speedup:.2f}x)" for problem, (speedup, name) in lost.items())
                lines.append(f"{mode_name} {means_name}: dense wins at {len(lost)} of {len(best)} problems: {where}.")
    return lines


def by_problem(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each problem, in the order of the run."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_config(record, "problem"), []).append(record)
    return groups


def _ours(records: Sequence[Record], key: str) -> list[Record]:
    names = [name for name in BACKENDS if name != "dense"]
    found = [r for r in records if _config(r, "backend") in names and r["metrics"].get(key) is not None]
    return [r for r in found if _config(r, "backend") != "auto"] or found


def _metrics(records: Sequence[Record]) -> dict[str, float | int | None]:
    return next((record["metrics"] for record in records if "ceiling_tflops" in record["metrics"]), {})


def _config(record: Record, key: str) -> str:
    return str(record["config"][key])


def _number(record: Record, key: str, form: str, scale: float = 1) -> str:
    value = record["metrics"].get(key)
    return NOTHING if value is None else form.format(value * scale)


def _time(record: Record, key: str) -> str:
    """Milliseconds, spread and speed-up: ``"0.347  3%  1.71x"``."""
    metrics = record["metrics"]
    median, low, high = (metrics.get(f"{key}_{name}") for name in ("ms", "p10_ms", "p90_ms"))
    if median is None or low is None or high is None:
        return NOTHING
    return f"{median:.3f} {(high - low) / median:4.0%} {_number(record, f'{key}_speedup', '{:5.2f}x')}"
