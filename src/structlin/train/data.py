"""Text for byte-level training: found, checked and split here; cut into windows by a pure function of (seed, step).

Without paths the text is the source of Python's own standard library, which every machine that can run this has. A
byte is a token, so there is no vocabulary to learn or download. Whole files go to either side of the split, chosen by
the hash of their name, so that the same files always give the same split.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 2 * 1024**3
"""Bytes of text that are read at most, since they are held in memory."""

VALID_SHARE = 0.1

# tables and tests: hardly prose, and not part of every installation
NOT_SOURCE = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
              "tests", "turtledemo"}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Training and validation text as UTF-8 bytes, and where they came from."""

    train: bytes
    valid: bytes
    sources: tuple[str, ...]
    files: int
    skipped: int = 0

    def describe(self) -> dict[str, Any]:
        """Sources, sizes in bytes, number of files read and skipped, and a hash of both parts; JSON-ready."""
        digest = hashlib.sha256(b"%d\n" % len(self.train) + self.train + self.valid).hexdigest()
        return {
            "sources": list(self.sources),
            "files": self.files,
            "skipped_files": self.skipped,
            "train_bytes": len(self.train),
            "valid_bytes": len(self.valid),
            "sha256": digest,
        }


def read_text(paths: Sequence[str] = ()) -> Text:
    """The text in ``paths``, split; of the standard library of the running Python without paths.

    A path is a UTF-8 file, a folder (every file below it that holds text; hidden ones are left out), a ``.jsonl`` file
    whose lines are objects with a string "text", or any of these compressed as ``.xz``. No file is read twice.

    Raises:
        ValueError: when a path is missing, empty or binary, naming it and what is allowed.
    """
    documents: dict[str, bytes] = {}
    seen: set[Path] = set()
    total = skipped = 0
    for given in paths or (sysconfig.get_path("stdlib"),):
        before = len(seen)
        for name, path in files(Path(given), source=not paths):
            if path.resolve() in seen:
                continue
            data = _read(path, optional=Path(given).is_dir())
            if data is None:
                skipped += 1
                continue
            seen.add(path.resolve())
            documents[f"{given}/{name}" if name in documents else name] = data
            total += len(data)
            if total > LIMIT:
                raise ValueError(f"{given} brings the text to more than {LIMIT:,} bytes, the most that is read")
        if len(seen) == before:
            raise ValueError(f"{given} holds no text that is not given already; allowed: files and folders of text")
    sources = tuple(paths) or (f"standard library of Python {platform.python_version()}",)
    return Text(*split(documents), sources, len(documents), skipped)


def split(documents: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Training and validation bytes; whole documents, by the hash of their name, make about a tenth for validation.

    Where they cannot (there is one, or one that outweighs the rest), the last tenth of each document is held out.
    """
    room = VALID_SHARE * sum(map(len, documents.values()))
    held_out: set[str] = set()
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()):
        if len(documents[name]) <= room:
            held_out.add(name)
            room -= len(documents[name])
    if room > VALID_SHARE / 2 * sum(map(len, documents.values())):
        cuts = {name: round(len(data) * (1 - VALID_SHARE)) for name, data in documents.items()}
    else:
        cuts = {name: 0 if name in held_out else len(data) for name, data in documents.items()}
    train = b"\n".join(data[: cuts[name]] for name, data in documents.items() if cuts[name])
    valid = b"\n".join(data[cuts[name] :] for name, data in documents.items() if cuts[name] < len(data))
    return train, valid


def batch(text: Tensor, seed: int, step: int, size: int, context: int) -> Tensor:
    """Random windows of ``text`` (uint8), int64 ``[size, context + 1]``; equal arguments give equal windows."""
    starts = random.Random(f"{seed}:{step}")
    return windows(text, [starts.randrange(len(text) - context) for _ in range(size)], context)


def spread(text: Tensor, count: int, context: int) -> Tensor:
    """Windows evenly spread over ``text`` (uint8), int64 ``[at most count, context + 1]``, without overlap."""
    count = min(count, len(text) // (context + 1))
    return windows(text, [i * (len(text) - context - 1) // max(1, count - 1) for i in range(count)], context)


def windows(text: Tensor, starts: Sequence[int], context: int) -> Tensor:
    """The ``context + 1`` bytes of ``text`` after each start, int64 ``[len(starts), context + 1]``."""
    return text[torch.tensor(starts)[:, None] + torch.arange(context + 1)].long()


def files(path: Path, source: bool) -> Iterator[tuple[str, Path]]:
    """Files at or below a path, with the names that decide the split; only Python source if ``source``."""
    if path.is_file():
        yield path.name, path
    elif not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; allowed: files and folders of text, .jsonl and .xz files")
    for root, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if name[0] != "." and not (source and name in NOT_SOURCE))
        for name in sorted(files):
            # _sysconfigdata is generated, and lists the paths of the machine that built this Python
            wanted = name.endswith(".py") and not name.startswith("_sysconfigdata") if source else name[0] != "."
            if wanted and (file := Path(root, name)).is_file():
                yield file.relative_to(path).as_posix(), file


def _read(path: Path, optional: bool) -> bytes | None:
    """Bytes of the text in a file; None instead of an error if it is ``optional``."""
    try:
        data = _decode(path)
        if not data.strip():
            raise ValueError(f"{path} is empty; allowed: files with text in them")
    except (OSError, ValueError) as error:
        if optional:
            return None
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        raise
    return data


def _decode(path: Path) -> bytes:
    """Bytes of the text in a file, whatever its wrapping; ValueError when it is not text."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has more than {LIMIT:,} bytes, the most that is read")
    data = path.read_bytes()
    name = path.name
    if name.endswith(".xz"):
        name = name.removesuffix(".xz")
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ValueError(f"{path} is not a whole .xz file: {error}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is binary (byte {error.start} is not UTF-8); allowed: UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"{path} is binary (byte {data.index(0)} is zero); allowed: UTF-8 text")
    return "\n".join(jsonl(path, text.split("\n"))).encode() if name.endswith(".jsonl") else data


def jsonl(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The strings under ``"text"`` of the lines of the JSONL file ``path``; ValueError naming a bad line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise ValueError(f'{path}, line {number}: allowed are objects with a string "text"')
        # a lone half of a surrogate pair is JSON, but no text
        yield value["text"].encode("utf-8", "replace").decode()
