"""Text: what is read, how it is split, and that a batch depends on nothing but seed and step."""

from __future__ import annotations

import json
import lzma
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from structlin.train import data

WORDS = "the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 files of different text, in two folders."""
    for i in range(40):
        path = tmp_path / "text" / f"part{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i}: {WORDS}" * 20, encoding="utf-8")
    return tmp_path / "text"


def test_default_text_is_the_standard_library() -> None:
    text = data.read_text()
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert (source in text.train) != (source in text.valid)
    assert text.sources[0].startswith("standard library of Python 3.")
    assert len(text.train) > 4_000_000
    assert 0.05 < len(text.valid) / (len(text.train) + len(text.valid)) < 0.15


def test_whole_files_go_to_one_side(folder: Path) -> None:
    text = data.read_text([str(folder)])
    for i in range(40):
        document = f"file {i}: ".encode()
        assert (document in text.train) != (document in text.valid)
    assert text.files == 40
    assert 0.05 < len(text.valid) / (len(text.train) + len(text.valid)) < 0.15


def test_the_split_depends_on_names_not_on_place_or_order(folder: Path, tmp_path: Path) -> None:
    documents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.txt")}
    backwards = data.split(dict(reversed(documents.items())))
    moved = folder.rename(tmp_path / "moved")
    text = data.read_text([str(moved)])
    assert sorted(backwards[1].split(b"\n")) == sorted(text.valid.split(b"\n"))
    assert text.describe()["sha256"] == data.read_text([str(moved)]).describe()["sha256"]


def test_a_change_of_the_text_changes_its_hash(folder: Path) -> None:
    before = data.read_text([str(folder)]).describe()["sha256"]
    (folder / "part0" / "0.txt").write_text("something else", encoding="utf-8")
    assert data.read_text([str(folder)]).describe()["sha256"] != before


def test_the_tail_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    text = data.read_text([str(path)])
    assert text.train + text.valid == path.read_bytes()
    assert len(text.valid) == 950


def test_a_file_that_outweighs_the_rest_is_cut(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text(WORDS * 1000, encoding="utf-8")
    (tmp_path / "little.txt").write_text(WORDS, encoding="utf-8")
    text = data.read_text([str(tmp_path)])
    assert len(text.valid) == pytest.approx(len(WORDS) * 100, rel=0.05)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.txt.xz", "a.txt", "no_suffix"])
def test_kinds_of_files(name: str, tmp_path: Path) -> None:
    lines = [f"line {i} é {WORDS}" for i in range(10)]
    content = "\n".join(lines)
    if ".jsonl" in name:
        content = "\n".join(json.dumps({"id": i, "text": line}) for i, line in enumerate(lines)) + "\n"
    raw = content.encode()
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    text = data.read_text([str(tmp_path / name)])
    assert text.train + text.valid == "\n".join(lines).encode()


def test_a_folder_leaves_out_and_counts_what_is_not_text(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("secret", encoding="utf-8")
    text = data.read_text([str(folder)])
    assert (text.files, text.skipped) == (40, 3)
    assert b"secret" not in text.train + text.valid


def test_no_file_is_read_twice(folder: Path) -> None:
    once, twice = data.read_text([str(folder)]), data.read_text([str(folder / "part0"), str(folder)])
    assert twice.files == once.files == 40
    assert len(twice.train + twice.valid) == len(once.train + once.valid)


def test_same_text_twice_would_leak_into_validation(folder: Path) -> None:
    file = str(folder / "part0" / "0.txt")
    with pytest.raises(ValueError, match="holds no text that is not given already"):
        data.read_text([str(folder), file])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist; allowed: files and folders of text, .jsonl and .xz files"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("zero.txt", b"text\0text", "is binary \\(byte 4 is zero\\)"),
        ("latin.txt", b"caf\xe9", "is binary \\(byte 3 is not UTF-8\\)"),
        ("cut.txt.xz", lzma.compress(b"text" * 100)[:-10], "is not a whole .xz file"),
        ("empty.xz", lzma.compress(b""), "is empty"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", b'{"text": "fine"}\n\n{"txt": "x"}', 'line 3: allowed are objects with a string "text"'),
        ("list.jsonl", b"[1]", 'line 1: allowed are objects with a string "text"'),
        ("void.jsonl", b'{"text": ""}', "is empty"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_text([str(path)])
    assert str(caught.value).startswith(str(path))


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match="holds no text"):
        data.read_text([str(tmp_path)])


def test_text_beyond_the_limit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LIMIT", 5000)
    with pytest.raises(ValueError, match="more than 5,000 bytes"):
        data.read_text([str(folder)])


def test_batches_are_a_function_of_seed_and_step() -> None:
    text = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    torch.manual_seed(1)
    first = data.batch(text, seed=7, step=5, size=4, context=16)
    torch.manual_seed(2)
    assert torch.equal(first, data.batch(text, seed=7, step=5, size=4, context=16))
    assert not torch.equal(first, data.batch(text, seed=8, step=5, size=4, context=16))
    assert not torch.equal(first, data.batch(text, seed=7, step=6, size=4, context=16))
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64


def test_windows_are_cut_from_the_text() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    for window in data.batch(text, seed=0, step=0, size=64, context=9):
        assert torch.equal(window, torch.arange(int(window[0]), int(window[0]) + 10))
    starts = {int(window[0]) for step in range(100) for window in data.batch(text, 0, step, 64, context=9)}
    assert starts == set(range(91))


@pytest.mark.parametrize("count", [1, 3, 10, 50])
def test_validation_windows_are_spread_without_overlap(count: int) -> None:
    text = torch.arange(100, dtype=torch.uint8)
    found = data.spread(text, count, context=9)
    starts = found[:, 0].tolist()
    assert len(found) == min(count, 10)
    assert all(later - sooner >= 10 for sooner, later in pairwise(starts))
    assert torch.equal(found - found[:, :1], torch.arange(10).expand(len(found), 10))
    assert count == 1 or starts[-1] == 90
