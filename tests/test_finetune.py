"""Fine-tuning on a task: a tiny model learns it, structures and rates stay, and the command writes a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import structlin as sl
from structlin import cli
from structlin.evaluate.finetune import Tuning, classifier, finetune
from structlin.evaluate.loading import load_model
from structlin.report.records import read, validate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny structured OPT with a byte-level tokenizer."""
    torch.manual_seed(0)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate(["<end>", *sorted(alphabet)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = transformers.OPTConfig(
        vocab_size=len(vocabulary), hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    sl.to_structured_(model, {"*.fc1": sl.Monarch(nblocks=4)})
    sl.save(model, tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_task_is_learned_at_our_rates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def groups(model: torch.nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        asked.append((lr, weight_decay))
        return sl.param_groups(model, lr, weight_decay)

    monkeypatch.setattr("structlin.evaluate.finetune.param_groups", groups)
    words = ["zzzz", "aaaa"]
    labels = [int(i % 3 == 1) for i in range(60)]
    rows = [
        {"sentence": words[label] * (1 + i % 5), "label": label, "split": "train" if i < 40 else "dev"}
        for i, label in enumerate(labels)
    ]
    write(tmp_path / "sst2.jsonl", rows)
    before = (folder / "model.safetensors").read_bytes()
    tuning = Tuning(lr=3e-3, steps=30, batch=8, warmup_steps=0.1)
    record = finetune(folder, "sst2", tmp_path, "a test", tuning, bos="<end>")
    validate(record)
    assert asked == [(3e-3, 0.01)]
    assert record["name"] == "finetune/sst2"
    assert record["metrics"]["accuracy"] == 1.0
    assert record["metrics"]["examples"] == 20
    assert record["config"]["structures"] == {"monarch:nblocks=4": 1}
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_number_is_predicted_and_long_texts_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"sentence1": "a" * (1 + i % 9), "sentence2": "b" * 50 * (i == 0), "label": float(i % 9), "split": part}
        for i in range(12)
        for part in ("train", "dev")
    ]
    write(tmp_path / "stsb.jsonl", rows)
    record = finetune(folder, "stsb", tmp_path, "a test", Tuning(steps=1, batch=4), bos="<end>")
    assert set(record["metrics"]) >= {"pearson", "pearson_stderr", "spearman"}
    assert record["metrics"]["cut"] == 2
    with pytest.raises(ValueError, match="batch=0 is given"):
        Tuning(batch=0)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"sentence": "ab" * (1 + i), "label": i % 2, "split": part} for i in range(4) for part in ("train", "dev")]
    write(tmp_path / "cola.jsonl", rows)
    options = ["finetune", str(folder), "--data", str(tmp_path), "--bos", "<end>", "--device", "cpu", "--steps", "1"]
    assert cli.main([*options, "--task", "cola", "--out", str(tmp_path / "out.json")]) == 0
    (record,) = read(tmp_path / "out.json")
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("finetune/cola: examples 4, cut 0")
    assert second.split()[0] == "matthews"
    assert record["config"]["steps"] == 1
    assert cli.main([*options, "--task", "glue"]) == 2
    assert "error: task 'glue' is unknown; allowed: boolq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4", "--warmup-steps", "4"], "warmup_steps=4 is given; allowed: below the 4 steps of the run"),
        (["--epochs", "nan"], "--epochs: 'nan' is given; allowed: numbers"),
        (["--epochs", "0"], "epochs=0.0 is given; allowed: above 0"),
        (["--lr", "inf"], "--lr: 'inf' is given; allowed: numbers"),
        (["--save", "text.txt/model"], "text.txt/model is given, below a file; allowed: a new folder"),
        (["--out", "."], "--out: . is given; allowed: a file in a folder that exists"),
    ],
)
def test_bad_options_are_one_line_before_any_training(
    options: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.txt").touch()
    write_numbers(tmp_path / "stsb.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.Trainer.train", lambda *given, **more: pytest.fail("it trains"))
    common = ["finetune", str(folder), "--data", str(tmp_path), "--bos", "<end>", "--device", "cpu", "--task", "stsb"]
    try:
        status = cli.main([*common, *options])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", "stsb.jsonl"}


def test_a_model_that_went_wrong_is_neither_reported_nor_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_numbers(tmp_path / "stsb.jsonl")
    common = ["finetune", str(folder), "--data", str(tmp_path), "--bos", "<end>", "--device", "cpu", "--task", "stsb"]
    save, out = tmp_path / "tuned", tmp_path / "out.json"
    assert cli.main([*common, "--steps", "3", "--lr", "1e30", "--save", str(save), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "6 of 6 outputs of the model are not finite; nothing is written" in said.err
    assert "pearson" not in said.out
    assert not save.exists()
    assert not out.exists()


def test_labels_are_numbers(folder: Path, tmp_path: Path) -> None:
    write_numbers(tmp_path / "stsb.jsonl", label="nan")
    with pytest.raises(ValueError, match="label is 'nan'; allowed: numbers"):
        finetune(folder, "stsb", tmp_path, "a test", Tuning(steps=2), bos="<end>")


def write_numbers(path: Path, label: Any = 1.0) -> None:
    rows = [{"sentence1": "a" * i, "sentence2": "b", "label": float(i)} for i in range(1, 6)]
    rows.append({"sentence1": "c", "sentence2": "d", "label": label})
    write(path, [{**row, "split": part} for row in rows for part in ("train", "dev")])


def test_pads_do_not_change_what_the_classifier_says(folder: Path) -> None:
    model = classifier(load_model(folder), 2, pad=0).eval()
    ids = torch.tensor([[0, 5, 6, 7]])
    padded = torch.tensor([[0, 5, 6, 7, 0, 0]])
    with torch.no_grad():
        alone, beside = (model(x, attention_mask=torch.arange(x.shape[1])[None] < 4).logits for x in (ids, padded))
    torch.testing.assert_close(alone, beside)
