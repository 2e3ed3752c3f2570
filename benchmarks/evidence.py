"""What the modules of claims share: how the records of a file are found, and what a row finds in them."""

from __future__ import annotations

from pathlib import Path

from structlin.report import records
from structlin.report.records import Record

Finding = tuple[str, bool] | None
"""What was measured, in words, and whether that is what was claimed; None where a record is missing."""


def finished(path: Path) -> dict[str, Record]:
    """The finished records of a file by their name, none where the file is missing."""
    found = records.read(path) if path.exists() else []
    return {record["name"]: record for record in found if record["status"] == "ok"}
