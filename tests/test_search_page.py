"""The page of a search: that it stands alone, and in a browser that it draws, sorts, filters and shows a trial."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from structlin.report import records, search
from structlin.report.records import Record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def record(name: str, trial: int, loss: float | None, params: int = 1000, **fields: Any) -> Record:
    failed = "error" in fields
    made = {
        "kind": "search",
        "name": name,
        "created": f"2026-01-31T12:00:{trial + 11}+00:00",
        "command": "structlin search --data '</script><b>.txt'",
        "seed": 0,
        "device": {"type": "cpu", "name": "A <fast> processor", "threads": 1},
        "versions": {"torch": "2.13.0"},
        "commit": None,
        "config": {
            "task": "teacher", "equal": "flops", "grow": "width", "spend": 2e9, "about": {"teacher": "</script>"},
            "trial": trial, "attempt": 1, "width": 64 + 8 * trial, "factors": "first 8x8",
            "stopped": loss is None and not failed,
        },
        "metrics": {
            "valid_loss": loss, "train_loss": 0.5, "model_params": params, "flops_per_example": 10,
            "train_flops": 10**9,
            "train_seconds": 1.5, "steps": 100, "examples": 12800, "budget_share": 0.99, "peak_memory_bytes": None,
            "omega": 0.0, "psi": 1.0, "nu": 0.5,
        },
        "series": {name: [1.0, 2.0] for name in ("step", "seconds", "flops", "train_loss", "valid_loss")},
        "status": "failed" if failed else "ok",
        "error": None,
        **fields,
    }  # fmt: skip
    records.validate(made)
    return made  # type: ignore[return-value]


@pytest.fixture
def results() -> list[Record]:
    return [
        record("dense", -1, 0.5, 4000),
        record("monarch:nblocks=4", 0, 0.4, 2000),
        record("low_rank:rank=4", 1, 0.9, 1500),
        record("low_rank:rank=8", 2, None, 1800),
        record("low_rank:rank=9999", 3, None, 0, error="</script> fits <no> width", series={}),
        record("dyad:nblocks=8", 4, 0.95, 3000),
    ]


def test_rows_and_the_frontier(results: list[Record]) -> None:
    rows = search.rows(results)
    names = ["monarch:nblocks=4", "dense", "low_rank:rank=4", "dyad:nblocks=8", "low_rank:rank=8", "low_rank:rank=9999"]
    assert [row[0] for row in rows] == names
    assert rows[0] == ["monarch:nblocks=4", "64", "100", "0.4000", "1.00G", "1.5", "2.00k", "0.00", "1.00", "0.50"]
    assert [row[3] for row in rows[-2:]] == ["stopped", "failed"]
    assert len(search.HEADERS) == len(rows[0])
    front = search.frontier(results, "model_params")
    assert [found["name"] for found in front] == ["low_rank:rank=4", "monarch:nblocks=4"]
    assert search.summary(results) == (
        "Task teacher, 6 runs with the same 2.00G FLOPs in training: what a structure saves goes into the width of the "
        "model. Lowest loss: monarch:nblocks=4, 0.4000. Dense: 0.5000."
    )


def test_the_page_stands_alone(results: list[Record], tmp_path: Path) -> None:
    search.write_search(tmp_path, results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", page)  # a name, which nothing fetches
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(|fetch\(|import\(", outside)
    assert page.count("</script>") == 2
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert [trial["name"] for trial in data["trials"]] == [found["name"] for found in results]
    assert [trial["state"] for trial in data["trials"]] == ["ok", "ok", "ok", "stopped", "failed", "ok"]
    assert "peak_memory_bytes" not in dict(data["columns"])  # nothing has one
    assert len(page) < 40_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the path")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, results: list[Record], tmp_path: Path) -> Iterator[Any]:
    """The page, opened from the disk without a network; anything on the console or any request is an error."""
    search.write_search(tmp_path, results)
    context = browser.new_context(offline=True)
    opened, problems = context.new_page(), []
    opened.set_default_timeout(10_000)
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: problems.append(request.url))
    url = (tmp_path / "report.html").as_uri()
    opened.goto(url)
    yield opened
    context.close()
    assert problems == [url]


def names(page: Any) -> list[str]:
    return [row.split("\t")[0] for row in page.locator("#trials tbody tr").all_inner_texts()]


def test_a_click_on_a_point_shows_its_trial(page: Any) -> None:
    assert page.locator("circle.point").count() == 4  # those with a loss
    assert page.locator("polyline.front").get_attribute("points").count(",") == 2
    page.locator('circle.point[data-id="0"]').click()
    shown = page.locator("#trial").inner_text()
    assert "monarch:nblocks=4" in shown
    assert "first 8x8" in shown
    assert "A <fast> processor" in shown
    assert page.locator("#trial polyline.curve").count() == 2  # its own, and the dense model's
    assert page.locator("circle.point.chosen").get_attribute("data-id") == "0"
    assert page.locator("tr.chosen").get_attribute("data-id") == "0"
    page.locator('tr[data-id="3"]').click()  # a failure has no point, and says why
    assert "</script> fits <no> width" in page.locator("#trial").inner_text()


def test_the_table_sorts_and_filters(page: Any) -> None:
    assert names(page)[0] == "monarch:nblocks=4"
    header = page.get_by_role("button", name="params")
    header.click()
    assert names(page)[:3] == ["low_rank:rank=9999", "low_rank:rank=4", "low_rank:rank=8"]
    page.get_by_role("button", name="params").click()
    assert names(page)[0] == "dense"
    page.get_by_role("button", name="valid loss").click()
    page.get_by_role("button", name="valid loss").click()
    assert names(page)[0] == "dyad:nblocks=8"  # and what has no loss is still last
    page.locator("#family").select_option("low_rank")
    assert set(names(page)) == {"low_rank:rank=4", "low_rank:rank=8", "low_rank:rank=9999"}
    assert page.locator("circle.point").count() == 1
    page.locator("#state").select_option("stopped")
    assert names(page) == ["low_rank:rank=8"]
    page.locator("#state").select_option("")
    page.locator("#filter").fill("RANK=4")
    assert names(page) == ["low_rank:rank=4"]
    assert page.locator("#count").inner_text() == "1 of 6 trials, 1 in the plot"
    page.locator("#filter").fill("none of them")
    assert names(page) == []


def test_axes_and_colours_change(page: Any) -> None:
    before = page.locator("circle.point").first.get_attribute("cx")
    page.locator("#x").select_option("width")
    assert page.locator("circle.point").first.get_attribute("cx") != before
    page.locator("#colour").select_option("model_params")
    assert "hsl(" in page.locator('circle.point[data-id="1"]').get_attribute("fill")
    assert page.locator("#legend").inner_text().split("\n")[:2] == ["dense", "params 1500"]
    page.locator("#log").check()
    assert page.locator("circle.point").count() == 4
    assert page.locator("#plot text").count() > 6
    page.locator("#y").select_option("model_params")
    page.locator("#log").uncheck()
    assert page.locator("circle.point").count() == 6
    assert page.locator("polyline.front").get_attribute("points").count(",") == 3  # of those that ended well
    page.locator("#log").check()
    page.locator("#x").select_option("omega")  # which has no logarithm at 0
    assert page.locator("circle.point").count() == 0
