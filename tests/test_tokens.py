"""Text on its way to tokens: every kind of file, the split, the cache, windows, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structlin.recipes import find
from structlin.train import documents, tokens, windows
from structlin.train.config import OptionError
from structlin.train.recipe import Recipe

LINES = [f"document {i}: the quick brown fox jumps over the lazy dog and été {i * 7}\n" for i in range(300)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in LINES), encoding="utf-8")
    return dataclasses.replace(
        find("tiny_opt"), data=(str(path),), cache=str(tmp_path / "cache"), vocabulary=300, context=16
    )


def pieces(path: Path | str) -> list[documents.Piece]:
    found, _ = documents.sources([str(path)])
    return [piece for source in found for piece in source.pieces()]


def decoded(made: tokens.Tokens, part: np.ndarray[Any, Any]) -> str:
    return str(tokens._load(made.tokenizer).decode(part.tolist(), skip_special_tokens=False))


def pack(path: Path, data: bytes) -> None:
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(data))


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_compressed_files_hold_the_same_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    pack(path, "".join(LINES).encode())
    found = pieces(path)
    assert "".join(text for text, _ in found) == "".join(LINES)
    assert len(found) > 2
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]
    assert all(text.endswith("\n") for text, _ in found)


def test_rows_of_json_and_parquet_are_documents(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": list(range(300)), "text": LINES}), tmp_path / "a.parquet")
    pack(tmp_path / "b.jsonl.xz", "\n".join(json.dumps({"text": line}) for line in LINES).encode())
    for name in ("a.parquet", "b.jsonl.xz"):
        assert pieces(tmp_path / name) == [(line, True) for line in LINES]
    parquet.write_table(arrow.table({"words": LINES}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r'c.parquet has no readable column "text"'):
        pieces(tmp_path / "c.parquet")


def save_dataset(folder: Path, lines: list[str]) -> None:
    """What ``datasets.Dataset.save_to_disk`` writes."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"id": list(range(len(lines))), "text": lines})
    folder.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table[:100], table[100:]), strict=True):
        with arrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(part, max_chunksize=30)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_read_by_its_rows(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", LINES)
    assert pieces(tmp_path / "saved") == [(line, True) for line in LINES]
    save_dataset(tmp_path / "splits" / "train", LINES)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert pieces(tmp_path / "splits") == [(line, True) for line in LINES]
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["dev"]}')
    with pytest.raises(ValueError, match=r'splits .* has the splits dev; allowed: one dataset, or the split "train"'):
        pieces(tmp_path / "splits")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="saved cannot be read as a saved dataset"):
        pieces(tmp_path / "saved")


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    table = datasets.table.InMemoryTable.from_pydict({"text": LINES})
    datasets.Dataset(table, fingerprint="lines").save_to_disk(tmp_path / "saved")
    assert pieces(tmp_path / "saved") == [(line, True) for line in LINES]


def test_a_dataset_of_the_hub_without_network_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,), _ = documents.sources(["hf:nobody/nothing"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"^hf:nobody/nothing (needs the package datasets|cannot be read from the hub)"
    ):
        list(source.pieces())


def test_a_folder_leaves_out_and_counts_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.md", "c.png", "deep/d.bin"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    found, skipped = documents.sources([str(tmp_path)])
    assert sorted(Path(source.name).name for source in found) == ["a.txt", "b.md"]
    assert skipped == 2
    with pytest.raises(ValueError, match="holds no text that is not given already"):
        documents.sources([str(tmp_path), str(tmp_path / "a.txt")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", "latin.txt is binary"),
        ("zero.txt", b"text\0text", "is binary"),
        ("cut.txt.xz", lzma.compress(b"text" * 100)[:-10], "is not a whole .xz file"),
        ("cut.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-10], "is not a whole .gz file"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", b'{"text": "fine"}\n\n{"txt": "x"}', 'line 3: allowed are objects with a string "text"'),
    ],
)
def test_bad_files_are_named(recipe: Recipe, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=f"--data: .*{name}.*{message.removeprefix(name + ' ')}"):
        tokens.prepare(dataclasses.replace(recipe, data=(str(tmp_path / name),)))
    assert not list(Path(recipe.cache).glob("*tokens*"))


def test_no_text_is_an_error_that_names_the_ways(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path
) -> None:
    monkeypatch.delenv("STRUCTLIN_DATA", raising=False)
    with pytest.raises(OptionError, match=r"--data: no text is given; allowed: .*hf:NAME.*stdlib.*STRUCTLIN_DATA"):
        tokens.prepare(dataclasses.replace(recipe, data=()))
    monkeypatch.setenv("STRUCTLIN_DATA", recipe.data[0])
    assert tokens.prepare(dataclasses.replace(recipe, data=())).about["sources"] == [recipe.data[0]]
    with pytest.raises(
        OptionError, match="wikitext does not exist; a dataset of the Hugging Face hub is written hf:wiki"
    ):
        tokens.prepare(dataclasses.replace(recipe, data=("wikitext",)))


def test_tokens_are_the_text_split_by_documents(recipe: Recipe) -> None:
    made = tokens.prepare(recipe)
    assert made.train.dtype == np.uint16
    assert made.vocabulary == 300
    sides = [
        decoded(made, part).removesuffix("<|endoftext|>").split("<|endoftext|>") for part in (made.train, made.valid)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(LINES)
    assert 0.04 < len(sides[1]) / len(LINES) < 0.2
    assert made.about["train"]["documents"] == len(sides[0])
    assert made.about["train"]["bytes"] + made.about["valid"]["bytes"] == len("".join(LINES).encode())


def test_text_of_its_own_for_validation(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("held out " * 50, encoding="utf-8")
    made = tokens.prepare(dataclasses.replace(recipe, valid=(str(tmp_path / "valid.txt"),)))
    assert decoded(made, made.valid) == "held out " * 50 + "<|endoftext|>"
    assert made.about["train"]["documents"] == len(LINES)


def test_a_long_text_that_the_split_cuts_ends_on_both_sides(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(LINES * 8), encoding="utf-8")
    made = tokens.prepare(dataclasses.replace(recipe, data=(str(path),), valid_share=0.3))
    ends = [decoded(made, part).count("<|endoftext|>") for part in (made.train, made.valid)]
    assert decoded(made, made.valid).endswith("<|endoftext|>")
    assert abs(ends[0] - ends[1]) <= 1
    assert ends[1] > 1
    assert sum(part["bytes"] for name, part in made.about.items() if name in tokens.PARTS) == path.stat().st_size


def test_tokens_are_made_once_and_anew_for_other_text(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens.prepare(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda *_: pytest.fail("made again"))
        patch.setattr(tokens, "_train", lambda *_: pytest.fail("trained again"))
        assert np.array_equal(tokens.prepare(recipe).train, first.train)
    path = Path(recipe.data[0])
    path.write_text(path.read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    assert not np.array_equal(tokens.prepare(recipe).train, first.train)
    assert not list(Path(recipe.cache).glob(".*"))


def test_runs_that_start_together_make_tokens_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write, begun, going_on, calls = tokens._write, threading.Event(), threading.Event(), []

    def slowly(*given: Any) -> None:
        calls.append(given)
        begun.set()
        assert going_on.wait(60)
        write(*given)

    monkeypatch.setattr(tokens, "_write", slowly)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(tokens.prepare, recipe)
        assert begun.wait(60)
        others = [pool.submit(tokens.prepare, recipe) for _ in range(2)]
        time.sleep(0.2)
        assert not any(other.done() for other in others)
        going_on.set()
        found = [run.result(60).train for run in (first, *others)]
    assert len(calls) == 1
    assert all(np.array_equal(found[0], other) for other in found)
    assert not list(Path(recipe.cache).glob(".*"))


def test_damaged_tokens_are_refused(recipe: Recipe) -> None:
    tokens.prepare(recipe)
    (path,) = Path(recipe.cache).glob("tokens-*/train.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(OptionError, match=r"train.bin is damaged; remove .*tokens-"):
        tokens.prepare(recipe)


def test_a_given_tokenizer_is_used(recipe: Recipe, tmp_path: Path) -> None:
    made = tokens.prepare(recipe)
    pack(tmp_path / "given.json.xz", made.tokenizer.encode())
    again = tokens.prepare(dataclasses.replace(recipe, tokenizer=str(tmp_path / "given.json.xz"), vocabulary=400))
    assert again.vocabulary == 300
    assert np.array_equal(again.train, made.train)
    for name, content, message in (
        ("gone.json", None, "No such file"),
        ("bad.json", "{}", "is not a tokenizer"),
        ("endless.json", made.tokenizer.replace("<|endoftext|>", "<|stop|>"), "has no token that ends a document"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(OptionError, match=f"--tokenizer: .*{message}"):
            tokens.prepare(dataclasses.replace(recipe, tokenizer=str(tmp_path / name)))


def test_too_little_text_and_too_few_entries(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(OptionError, match="0 to validate on; at least 17 each are needed: give more text, or --valid"):
        tokens.prepare(dataclasses.replace(recipe, data=(str(tmp_path / "short.txt"),)))
    with pytest.raises(OptionError, match="--vocabulary: 200 is given; allowed: 258 or more"):
        tokens.prepare(dataclasses.replace(recipe, vocabulary=200))


@pytest.mark.parametrize("length", [17, 18, 32, 33, 160, 175])
def test_an_epoch_reads_every_window_once(length: int) -> None:
    text = np.arange(length, dtype=np.uint16)
    found = windows.Windows(text, context=16, seed=3)
    epochs = [
        torch.cat([found.batch(step, 1) for step in range(e * found.count, (e + 1) * found.count)]) for e in (0, 1)
    ]
    for rows in epochs:
        assert torch.equal(rows - rows[:, :1], torch.arange(17).expand(found.count, 17))
        starts = sorted(rows[:, 0].tolist())
        assert starts == list(range(starts[0], starts[0] + 16 * found.count, 16))
    if found.count > 3:
        assert not torch.equal(epochs[0], epochs[1])


def test_windows_do_not_depend_on_how_one_got_there() -> None:
    text = np.arange(1000, dtype=np.uint16)
    straight = windows.Windows(text, 16, seed=1)
    rows = torch.cat([straight.batch(step, 8) for step in range(30)])
    jumped = windows.Windows(text, 16, seed=1)
    assert torch.equal(jumped.batch(29, 8), rows[-8:])
    assert torch.equal(jumped.batch(3, 8), rows[24:32])
    assert torch.equal(torch.cat([jumped.batch(step, 16) for step in range(15)]), rows)
    assert not torch.equal(windows.Windows(text, 16, seed=2).batch(0, 8), rows[:8])


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def fetch(step: int) -> torch.Tensor:
        if step == 5:
            raise ValueError("step 5")
        return torch.tensor([step])

    device = torch.device("cpu")
    assert [int(batch) for batch in windows.ahead(fetch, 1, 5, device)] == [1, 2, 3, 4]
    assert list(windows.ahead(fetch, 3, 3, device)) == []
    with pytest.raises(ValueError, match="step 5"):
        list(windows.ahead(fetch, 3, 7, device))


def test_text_is_tokenised_in_chunks_of_so_many_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHUNK", 5)
    pieces = [("abc", True), ("de", False), ("f", True), ("ghijkl", True), ("m", True)]
    assert list(tokens._chunks(iter(pieces))) == [pieces[:2], pieces[2:4], pieces[4:]]
