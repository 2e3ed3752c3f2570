"""Text from wherever it lies, read piece by piece so that no file has to fit into memory.

A source is a file of text, JSON lines or parquet, each possibly compressed, a dataset of Hugging Face ``datasets`` on
disk or of its hub, or the source of Python's standard library. Every source on disk has a hash of its bytes, so a text
that changes is noticed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from .data import files, jsonl, read_text

PIECE = 1 << 12
"""Characters of a piece of a long text, at least; it ends with a line."""
KINDS = (".txt", ".text", ".md", ".jsonl", ".parquet")
PACKED = (".xz", ".gz", ".zst")
VARIABLE = "STRUCTLIN_DATA"
SAVED = ("dataset_dict.json", "state.json")  # one of these is in a folder that datasets wrote

Piece = tuple[str, bool]
"""Text, and whether the document ends with it."""


@dataclass(frozen=True)
class Source:
    """One place of text: its name, a hash of its content, and its pieces."""

    name: str
    identity: str
    pieces: Callable[[], Iterator[Piece]]


def sources(paths: Sequence[str]) -> tuple[list[Source], int]:
    """The sources behind ``paths``, and how many files in folders were left out since their name is not of text.

    Raises:
        ValueError: for a path that is missing or holds no text, naming it and what is allowed.
    """
    found: dict[str, Source] = {}
    skipped = 0
    for given in paths:
        before = len(found)
        for source in _sources(given):
            if source is None:
                skipped += 1
            else:
                found.setdefault(source.name, source)
        if len(found) == before:
            raise ValueError(f"{given} holds no text that is not given already; files of text end in {_kinds()}")
    return list(found.values()), skipped


def given(paths: Sequence[str]) -> tuple[str, ...]:
    """``paths``, or else those in the variable STRUCTLIN_DATA.

    Raises:
        ValueError: where there is neither.
    """
    found = tuple(paths) or tuple(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))
    if not found:
        raise ValueError(
            f"no text is given; allowed: files and folders ({_kinds()}), hf:NAME[:CONFIG], stdlib for the source of "
            f"Python's standard library, or paths in {VARIABLE}"
        )
    return found


def _sources(given: str) -> Iterator[Source | None]:
    path = Path(given)
    if given == "stdlib":
        text = read_text()
        whole = (text.train + text.valid).decode(errors="replace")
        yield Source("stdlib", hashlib.sha256(whole.encode()).hexdigest(), lambda: _pieces(io.StringIO(whole)))
    elif given.startswith("hf:"):
        yield Source(given, given, lambda: _rows(given, _hub(given)))
    elif not path.exists():
        raise ValueError(f"{given} does not exist; a dataset of the Hugging Face hub is written hf:{given}")
    elif path.is_dir() and any((path / name).exists() for name in SAVED):
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        identity = hashlib.sha256("".join(map(_digest, inside)).encode()).hexdigest()
        yield Source(str(path.resolve()), identity, lambda: _saved(path))
    else:
        for _, file in files(path, source=False):
            if path.is_dir() and not _stem(file).endswith(KINDS):
                yield None
            else:
                # bound now: the pieces are read later
                yield Source(str(file.resolve()), _digest(file), lambda file=file: _file(file))  # type: ignore[misc]


def _file(path: Path) -> Iterator[Piece]:
    """Pieces of one file; ValueError when it is not what its name says."""
    try:
        with _open(path) as stream:
            if _stem(path).endswith(".parquet"):
                yield from _parquet(path, stream)
                return
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            yield from ((line, True) for line in jsonl(path, text)) if _stem(path).endswith(".jsonl") else _pieces(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is binary ({error.reason}); allowed: UTF-8 text") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _pieces(text: Any) -> Iterator[Piece]:
    """Whole lines of an open text, at least `PIECE` characters at a time."""
    following = text.read(PIECE) + text.readline()
    while following:
        piece, following = following, text.read(PIECE) + text.readline()
        if "\0" in piece:
            raise ValueError(f"{getattr(text, 'name', 'a text')} is binary (has a zero byte); allowed: UTF-8 text")
        yield piece, not following


def _parquet(path: Path, stream: BinaryIO) -> Iterator[Piece]:
    _need("pyarrow", path)
    from pyarrow import ArrowInvalid, parquet

    try:
        for batch in parquet.ParquetFile(stream).iter_batches(columns=["text"]):
            yield from ((text, True) for text in batch.column("text").to_pylist())
    except (ArrowInvalid, KeyError) as error:
        raise ValueError(f'{path} has no readable column "text": {" ".join(str(error).split())}') from None


def _saved(path: Path) -> Iterator[Piece]:
    """Rows of what ``save_to_disk`` of datasets wrote: Arrow streams, listed in a JSON file."""
    _need("pyarrow", path)
    from pyarrow import ArrowInvalid, ipc, memory_map

    try:
        if (path / "dataset_dict.json").exists():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            if "train" not in splits:
                raise ValueError(f'has the splits {", ".join(splits)}; allowed: one dataset, or the split "train"')
            path = path / "train"
        for file in json.loads((path / "state.json").read_bytes())["_data_files"]:
            with memory_map(str(path / file["filename"])) as stream:
                for batch in ipc.open_stream(stream):
                    yield from _rows(str(path), batch.to_pylist())
    except (OSError, KeyError, ValueError, ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as a saved dataset: {_line(error)}") from None


def _hub(given: str) -> Iterable[Any]:
    _need("datasets", given)
    import datasets

    _, name, *config = given.split(":")
    try:
        return cast(Iterable[Any], datasets.load_dataset(name, *config[:1], split="train", streaming=True))
    except Exception as error:  # of many kinds, all of which mean that there is no such text here
        raise ValueError(f"{given} cannot be read from the hub (is there a network?): {_line(error)}") from None


def _rows(name: str, rows: Iterable[Any]) -> Iterator[Piece]:
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'{name}, row {number}: has no string "text", but {", ".join(row)}')
        yield row["text"], True


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        _need("zstandard", path)
        import zstandard

        return cast(BinaryIO, io.BufferedReader(zstandard.open(path, "rb")))
    return open(path, "rb")


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _need(package: str, what: object) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{what} needs the package {package}; install with: pip install 'structlin[train]'")


def _kinds() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(PACKED)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
