"""Encoders: similarity of sentences, fine-tuning on pairs, and folders that were converted or saved after training."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import structlin as sl
from structlin import cli
from structlin.evaluate import sts
from structlin.evaluate.finetune import Tuning, finetune
from structlin.evaluate.loading import is_encoder, load_model, load_tokenizer
from structlin.report.records import read, validate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of words."""
    path: Path = tmp_path_factory.mktemp("encoder") / "model"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    names = ("pad", "unk", "cls", "sep", "mask")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    made = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, **special)
    made.save_pretrained(path)
    return path


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(folder: Path) -> Path:
    texts = [("a b", "a b", 5.0), ("a b c", "a b", 3.0), ("c", "d d a", 1.0), ("b a", "c d", 0.0)]
    rows = [{"sentence1": a, "sentence2": b, "label": y, "split": s} for a, b, y in texts for s in ("train", "dev")]
    write(folder, "stsb", rows)
    return folder


def test_an_embedding_is_the_mean_over_a_sentence_whatever_is_beside_it(folder: Path) -> None:
    model, tokenizer = load_model(folder, body=True).train(), load_tokenizer(folder)
    sentences = ["a b c d", "a", "b c", "a"]
    found = sts.embed(model, tokenizer, sentences, batch_tokens=12)
    assert model.training
    with torch.no_grad():
        for sentence, row in zip(sentences, found, strict=True):
            ids = torch.tensor(tokenizer(sentence)["input_ids"])[None]
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, alone)
    assert torch.equal(found[1], found[3])


def test_the_command_measures_a_converted_folder(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rules = ["encoder.layer.*=low_rank:rank=32"]  # every rank that there is, so that nothing is lost
    assert cli.main(["convert", str(folder), str(tmp_path / "made"), "--rules", *rules]) == 0
    table = capsys.readouterr().out
    assert "pays" in table
    correlations = []
    for which in (folder, tmp_path / "made"):
        out = tmp_path / f"{which.name}.json"
        command = ["eval", str(which), "--tasks", "sts", "--data", f"sts={pairs(tmp_path)}", "--device", "cpu"]
        assert cli.main([*command, "--out", str(out)]) == 0
        (record,) = read(out)
        assert record["metrics"]["pairs"] == 4
        correlations.append(record["metrics"]["pearson"])
    assert record["config"]["structures"] == {"low_rank:rank=32": 6}
    assert correlations[1] == pytest.approx(correlations[0], abs=1e-4)
    assert "pearson" in capsys.readouterr().out


def test_what_an_encoder_cannot_do_is_said(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("a b")
    both = ["--tasks", "sts,loss", "--data", f"sts={pairs(tmp_path)}", f"loss={tmp_path / 'text.txt'}"]
    for options, message in (
        (["--tasks", "loss", "--data", f"loss={tmp_path / 'text.txt'}"], "holds an encoder; allowed: --tasks sts"),
        (both, "sts is about embeddings and runs alone"),
    ):
        assert cli.main(["eval", str(folder), *options, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds an encoder \(bert\); allowed: causal language models"):
        load_model(folder)
    with pytest.raises(ValueError, match="whose tokenizer knows what it starts with"):
        finetune(folder, "stsb", tmp_path, "a test", bos="[CLS]")
    assert is_encoder(folder)


def test_pairs_are_learned_and_the_result_is_kept(folder: Path, tmp_path: Path) -> None:
    texts = [("a", "b"), ("c", "d"), ("a", "d"), ("c", "b")]
    rows = [
        {
            "sentence1": a,
            "sentence2": f"{b} a " * (1 + 9 * (i == 0)),
            "label": int(a == "a"),
            "split": part,
        }
        for part in ("train", "dev")
        for i in range(4)
        for a, b in texts
    ]
    write(tmp_path, "mrpc", rows)
    model = load_model(folder, body=True)
    sl.to_structured_(model, {"*.intermediate.dense": sl.Monarch(nblocks=4)})
    sl.save(model, tmp_path / "structured")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "structured" / name).write_bytes((folder / name).read_bytes())
    tuning, kept = Tuning(lr=3e-3, steps=30, batch=8), tmp_path / "kept"
    record = finetune(tmp_path / "structured", "mrpc", tmp_path, "a test", tuning, device="cpu", save=kept)
    validate(record)
    assert record["metrics"]["accuracy"] == 1.0
    assert record["metrics"]["cut"] == 8
    assert record["config"]["structures"] == {"monarch:nblocks=4": 1}
    assert record["config"]["prefix"] is None
    importlib.import_module("structlin.hf")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(kept).eval()
    assert isinstance(again.bert.encoder.layer[0].intermediate.dense, sl.StructuredLinear)
    tokenizer = load_tokenizer(kept)
    with torch.no_grad():
        for first, second in texts:
            logits = again(**tokenizer(first, f"{second} a", return_tensors="pt")).logits
            assert int(logits.argmax()) == int(first == "a")
    with pytest.raises(ValueError, match="exists, and nothing is overwritten"):
        finetune(tmp_path / "structured", "mrpc", tmp_path, "a test", tuning, save=kept)
