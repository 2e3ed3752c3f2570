"""The record schema: what it accepts, what it refuses, and that a file is replaced whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script

from structlin import machine
from structlin.report import records

RECORD: dict[str, Any] = {
    "kind": "bench",
    "name": "dense",
    "created": "2026-01-31T12:00:00+00:00",
    "command": "structlin bench",
    "seed": 3,
    "device": {"type": "cpu", "threads": 1},
    "versions": {"torch": "2.13.0"},
    "commit": None,
    "config": {"anything": [1, {"deep": None}]},
    "metrics": {"loss": 1.5, "count": 3, "none": None},
    "series": {"loss": [2.0, 1.5], "empty": []},
    "status": "ok",
    "error": None,
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECORD), **fields}


def test_records_survive_the_file(tmp_path: Path) -> None:
    several = [RECORD, changed(name="other", status="failed", error="loss is nan at step 3", metrics={})]
    records.write(tmp_path / "results.json", several)
    assert records.read(tmp_path / "results.json") == several
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_series_may_be_absent() -> None:
    records.validate({name: value for name, value in RECORD.items() if name != "series"})


@pytest.mark.parametrize("field", [field for field in RECORD if field != "series"])
def test_every_other_field_must_be_there(field: str) -> None:
    with pytest.raises(ValueError, match=f"'{field}' is missing"):
        records.validate({name: value for name, value in RECORD.items() if name != field})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "guess"}, "kind is 'guess'; allowed: compare, bench, spike, train"),
        ({"status": "fine"}, "status is 'fine'; allowed: ok, failed"),
        ({"seed": "3"}, "'seed' holds '3'"),
        ({"seed": True}, "'seed' holds True"),
        ({"metrics": {"loss": float("nan")}}, "metric 'loss' holds nan"),
        ({"metrics": {"loss": float("inf")}}, "metric 'loss' holds inf"),
        ({"metrics": {"loss": True}}, "metric 'loss' holds True"),
        ({"metrics": {"loss": "1.5"}}, "metric 'loss' holds '1.5'"),
        ({"series": {"loss": [1.0, None]}}, "series 'loss' holds None"),
        ({"series": {"loss": 1.0}}, "series 'loss' is not a list"),
        ({"created": "yesterday"}, "created is 'yesterday'"),
        ({"created": "2026-01-31T12:00:00"}, "not an ISO-8601 time in UTC"),
        ({"created": "2026-01-31T12:00:00+02:00"}, "not an ISO-8601 time in UTC"),
        ({"device": {"name": "x"}}, "device has no 'type'"),
        ({"versions": {"torch": 2}}, "versions must be strings"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"status": "failed"}, "error must be given exactly when"),
        ({"error": "why"}, "error must be given exactly when"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        records.write(tmp_path / "results.json", [RECORD, changed(**fields)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "not a structlin.records document"),
        ('{"schema": "other"}', "not a structlin.records document"),
        ('{"schema": "structlin.records", "version": 2, "records": []}', "has version 2; this program reads version 1"),
        ('{"schema": "structlin.records", "version": 1, "records": {}}', "'records' is not a list"),
        ('{"schema": "structlin.records", "version": 1, "records": [{}]}', "'kind' is missing"),
    ],
)
def test_a_damaged_file_is_refused_with_its_path(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        records.read(path)
    assert str(caught.value).startswith(str(path))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    records.write(path, [RECORD])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        records.write(path, [RECORD, RECORD])
    assert caught.value.filename == str(path)
    assert records.read(path) == [RECORD]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/records.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "example.json").write_text(example, encoding="utf-8")
    (record,) = records.read(tmp_path / "example.json")
    documented = {
        name for line in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    assert set(records.FIELDS) | set(json.loads(example)) | set(record["metrics"]) <= documented


def test_the_commit_is_that_of_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "module.py"
    source.write_text("one", encoding="utf-8")
    monkeypatch.setattr(machine, "__file__", str(source))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert machine.commit() is None  # an untracked file: a package installed inside of some other checkout
    git("add", "module.py")
    git("commit", "-m", "first")
    commit = machine.commit()
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    source.write_text("two", encoding="utf-8")
    assert machine.commit() == f"{commit}+changes"


def test_provenance_fits_the_schema() -> None:
    records.validate({**RECORD, **machine.provenance("structlin bench", 3, torch.device("cpu"))})


def test_the_index_of_results_is_that_of_the_records() -> None:
    index = script("index")
    assert index.PAGE.read_text(encoding="utf-8") == index.page(), "run benchmarks/index.py"
