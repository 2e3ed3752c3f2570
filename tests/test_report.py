"""Tables, plots and pages from records: the order of rows, what stands for nothing, and that a page needs no other."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from structlin.report import html, live, plots, records, tables
from structlin.report.records import Record


def record(name: str, loss: float | None, flops: int = 1000, seconds: float = 2.0, **fields: Any) -> Record:
    made = {
        "kind": "compare",
        "name": name,
        "created": "2026-01-31T12:00:00+00:00",
        "command": "structlin compare --data '<b>.txt'",
        "seed": 0,
        "device": {"type": "cpu", "name": "A <fast> processor", "threads": 1},
        "versions": {"torch": "2.13.0"},
        "commit": None,
        "config": {"where": "mlp", "steps": 20, "model": {"width": 64}, "structures": ["dense"], "structure": name},
        "metrics": {
            "swapped_params": 65536, "model_params": 1234567, "flops_per_token": flops, "valid_loss": loss,
            "bits_per_byte": None if loss is None else loss / math.log(2), "tokens_per_second": 12345.6,
            "train_seconds": seconds, "peak_memory_bytes": 256_000_000, "seconds_to_dense_loss": None,
        },
        "series": {"step": [10, 20], "seconds": [1.0, seconds], "valid_loss": [3.5, loss or 3.4]},
        "status": "ok",
        "error": None,
        **fields,
    }  # fmt: skip
    records.validate(made)
    return made  # type: ignore[return-value]


@pytest.fixture
def results() -> list[Record]:
    return [
        record("dense", 2.5, flops=2000),
        record("dead", None, status="failed", error="killed <here>", metrics={}, series={}),
        record("monarch:nblocks=4", 2.25, flops=1500, seconds=4.0),
        record("nan", None, status="failed", error="loss is nan at step 3 of 20"),
    ]


def test_rows_are_sorted_by_loss_and_failures_come_last(results: list[Record]) -> None:
    rows = tables.rows(results)
    assert [row[0] for row in rows] == ["monarch:nblocks=4", "dense", "dead", "nan"]
    assert rows[0] == ["monarch:nblocks=4", "65.5k", "1.23M", "1.50k", "2.250", "3.246", "12,346", "256 MB", "-"]
    assert rows[2] == ["dead", "-", "-", "-", "failed", "-", "-", "-", "-"]
    assert len(tables.HEADERS) == len(rows[0])
    assert tables.failures(results) == ["dead failed: killed <here>", "nan failed: loss is nan at step 3 of 20"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.00k"), (65536, "65.5k"), (262144, "262k"), (1.5e9, "1.50G")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert tables.short(number) == text


def test_markdown_is_one_table(results: list[Record]) -> None:
    lines = tables.markdown(results).splitlines()
    assert lines[0].startswith("| structure | swapped params | model params | FLOPs/token | valid loss | bits/byte |")
    assert {line.count("|") for line in lines[:6]} == {len(tables.HEADERS) + 1}
    assert lines[-1] == "nan failed: loss is nan at step 3 of 20"


def test_the_terminal_table_fits_80_columns(results: list[Record]) -> None:
    console = Console(file=io.StringIO(), width=80)
    live.print_table(console, results)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    for row in tables.rows(results):
        (line,) = [line for line in shown.splitlines() if line.startswith(row[0] + " ") and "failed:" not in line]
        assert line.split() == [cell for value in row for cell in value.split()]
    assert "dead failed: killed <here>" in shown


def test_progress_without_a_terminal_is_a_line_per_structure(results: list[Record]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with live.Live(console, ["dense", "nan", "dead", "before"], ["before"], steps=20) as shown:
        shown.update("dense", {"start": 20})
        shown.update("dense", {"step": 1, "loss": 5.5})
        shown.update("dense", {"valid_loss": 2.5})
        shown.update("dense", {"record": results[0]})
        shown.update("nan", {"record": results[3]})
        shown.update("dead", {"error": RuntimeError("its process was killed by SIGKILL")})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "dense: validation 3.607 bits/byte",
        "nan: failed: loss is nan at step 3 of 20",
        "dead: failed: its process was killed by SIGKILL",
    ]


def test_progress_on_a_terminal_shows_losses_and_the_time_left(results: list[Record]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with live.Live(console, ["dense", "before"], ["before"], steps=20) as shown:
        shown.update("dense", {"start": 20})
        shown.update("dense", {"note": "dense starts anew: [why]"})
        shown.update("dense", {"step": 20, "loss": math.log(2)})
        shown.progress.refresh()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "training 1.00 bits/byte" in text
    assert "dense starts anew: [why]" in text
    assert "done before" in text
    assert [task.percentage for task in shown.progress.tasks] == [100, 100, 100]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert plots.front([(3, 1), (1, 3), (2, 2), (2, 2.5), (4, 1), (5, 0.5)]) == ([1, 2, 3, 5], [3, 2, 1, 0.5])
    assert plots.front([]) == ([], [])


@pytest.mark.parametrize("plot", [plots.curves, plots.pareto])
def test_plots_are_pictures_of_the_records(plot: Any, results: list[Record]) -> None:
    picture = image.imread(io.BytesIO(plot(results)))
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    moved = [record("dense", 2.5, flops=2000, seconds=3.0), *results[1:]]
    assert not np.array_equal(picture, image.imread(io.BytesIO(plot(moved))))
    assert np.array_equal(picture, image.imread(io.BytesIO(plot(results))))


@pytest.mark.parametrize("plot", [plots.curves, plots.pareto])
def test_plots_of_failures_alone_do_not_fail(plot: Any, results: list[Record]) -> None:
    assert plot([results[1]]).startswith(b"\x89PNG")


def test_the_page_stands_alone(results: list[Record], tmp_path: Path) -> None:
    html.write_report(tmp_path, results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert pictures == [(tmp_path / "pareto.png").read_bytes(), (tmp_path / "curves.png").read_bytes()]
    assert page.count("<img") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|<script|@import|url\(", page)
    for row in tables.rows(results):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "structlin compare --data &#39;&lt;b&gt;.txt&#39;" in page
    assert "A &lt;fast&gt; processor" in page
    assert "dead failed: killed &lt;here&gt;" in page
    assert "<th>model.width</th><td>64</td>" in page
    assert "<th>torch</th><td>2.13.0</td>" in page
