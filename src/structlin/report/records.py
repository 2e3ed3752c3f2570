"""The one schema of everything this project measures, and the only functions that read or write it.

A record is a plain dictionary that says what was run, where, with which versions, and which numbers came out. A file
is one JSON document holding a list of records, replaced as a whole so that a reader never sees half of one.
docs/records.md describes every field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

SCHEMA = "structlin.records"
VERSION = 1
KINDS = ("compare", "bench", "spike", "train", "eval", "search")
STATUSES = ("ok", "failed")


class Record(TypedDict):
    """One run. ``metrics`` are single numbers, ``series`` lists of numbers; a number that does not exist is None."""

    kind: Literal["compare", "bench", "spike", "train", "eval", "search"]
    name: str
    created: str
    command: str
    seed: int
    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    config: dict[str, Any]
    metrics: dict[str, float | int | None]
    series: NotRequired[dict[str, list[float]]]
    status: Literal["ok", "failed"]
    error: str | None


FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "name": str,
    "created": str,
    "command": str,
    "seed": int,
    "device": dict,
    "versions": dict,
    "commit": (str, type(None)),
    "config": dict,
    "metrics": dict,
    "series": dict,
    "status": str,
    "error": (str, type(None)),
}
"""Fields of a record and the JSON types they hold; only ``series`` may be absent."""


def validate(record: Mapping[str, Any]) -> None:
    """Check one record against the schema.

    Raises:
        ValueError: naming the record, the field, what it holds and what is allowed.
    """
    where = f"record {record.get('name', '?')!r}"
    for field in record:
        if field not in FIELDS:
            raise ValueError(f"{where}: unknown field {field!r}; allowed: {', '.join(FIELDS)}")
    for field, kinds in FIELDS.items():
        if field not in record:
            if field != "series":
                raise ValueError(f"{where}: field {field!r} is missing")
        elif not isinstance(record[field], kinds) or isinstance(record[field], bool):
            raise ValueError(f"{where}: field {field!r} holds {record[field]!r}, which has the wrong type")
    for field, allowed in (("kind", KINDS), ("status", STATUSES)):
        if record[field] not in allowed:
            raise ValueError(f"{where}: {field} is {record[field]!r}; allowed: {', '.join(allowed)}")
    if (record["status"] == "failed") != bool(record["error"]):
        raise ValueError(f"{where}: error must be given exactly when status is 'failed'")
    _check_time(where, record["created"])
    _check_types(where, record)
    for name, value in record["metrics"].items():
        if value is not None:
            _check_number(f"{where}: metric {name!r}", value)
    for name, values in record.get("series", {}).items():
        if not isinstance(values, list):
            raise ValueError(f"{where}: series {name!r} is not a list")
        for value in values:
            _check_number(f"{where}: series {name!r}", value)


def write(path: str | Path, records: Sequence[Record]) -> None:
    """Replace the file at ``path`` by these records; a crash leaves the old file or the new one.

    Raises:
        ValueError: when a record does not fit the schema; nothing is written.
        OSError: when the disk is full or the folder cannot be written; the old file stays.
    """
    for record in records:
        validate(record)
    document = {"schema": SCHEMA, "version": VERSION, "records": list(records)}
    write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def read(path: str | Path) -> list[Record]:
    """The records in a file.

    Raises:
        ValueError: when the file is not a document of this schema and version, with the path and the reason.
        OSError: when it cannot be read.
    """
    try:
        document = json.loads(Path(path).read_bytes())
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"not a {SCHEMA} document")
        if document.get("version") != VERSION:
            raise ValueError(f"has version {document.get('version')!r}; this program reads version {VERSION}")
        records = document.get("records")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("'records' is not a list of objects")
        for record in records:
            validate(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return cast(list[Record], records)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at ``path`` in one step: a temporary file beside it, flushed to the disk, then renamed.

    Raises:
        OSError: naming ``path``; the old file stays and the temporary one is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _check_number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} holds {value!r}, not a finite number")


def _check_time(where: str, text: str) -> None:
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        offset = None
    if offset is None or offset.total_seconds():
        raise ValueError(f"{where}: created is {text!r}, not an ISO-8601 time in UTC")


def _check_types(where: str, record: Mapping[str, Any]) -> None:
    if not isinstance(record["device"].get("type"), str):
        raise ValueError(f"{where}: device has no 'type'")
    if not all(isinstance(version, str) for version in record["versions"].values()):
        raise ValueError(f"{where}: versions must be strings")
