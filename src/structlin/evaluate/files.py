"""Data files of evaluations: lines of JSON, tables with a header, and plain text, each also as ``.xz``.

Every reader raises ValueError that names the file, the line and what is allowed; nothing is skipped.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".tsv", ".jsonl.xz", ".tsv.xz")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file.

    Raises:
        ValueError: for a file that is missing, not whole, not text, or empty.
    """
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is not a whole .xz file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file, or the lines of a ``.tsv`` file under its header, each with ``fields``.

    A ``.tsv`` file has no quoting, as GLUE's have none: a line is cut at its tabs.

    Raises:
        ValueError: see `read_text`; for a line that is not an object or has too many or few cells, and missing fields.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is given; allowed: files that end in {', '.join(SUFFIXES)}")
    lines = read_text(path).split("\n")
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    rows = _table(path, numbered) if ".tsv" in path.suffixes else _objects(path, numbered)
    for number, row in rows:
        if missing := [field for field in fields if field not in row]:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}; it has {', '.join(row)}")
    return [row for _, row in rows]


def source(paths: Sequence[Path]) -> dict[str, Any]:
    """Names, size in bytes and a hash of the files together; JSON-ready, for a record."""
    digest, size = hashlib.sha256(), 0
    for path in paths:
        data = path.read_bytes()
        digest.update(b"%d\n" % len(data) + data)
        size += len(data)
    return {"files": [path.name for path in paths], "bytes": size, "sha256": digest.hexdigest()}


def _objects(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is not an object")
        rows.append((number, row))
    return rows


def _table(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    cells = [line.split("\t") for _, line in lines]
    rows = []
    for (number, _), row in zip(lines[1:], cells[1:], strict=True):
        if len(row) != len(cells[0]):
            raise ValueError(f"{path}, line {number}: {len(row)} cells under a header of {len(cells[0])}")
        rows.append((number, dict(zip(cells[0], row, strict=True))))
    return rows
