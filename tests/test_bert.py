"""Pretraining of BERT on masked tokens, and the way of such a run to transformers and to a task."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from structlin import StructuredLinear, cli
from structlin.recipes import find
from structlin.report import records
from structlin.train import loop, masked
from structlin.train import model as models
from structlin.train.recipe import Recipe
from structlin.train.settings import override
from structlin.train.tokens import prepare
from structlin.train.windows import Windows

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")

MASKING = masked.Masking(count=12, cls=1, mask=3, vocabulary=500)


def recipe(**fields: Any) -> Recipe:
    found = find("tiny_bert")
    assert isinstance(found, Recipe)
    return dataclasses.replace(found, **fields)


def windows(rows: int, context: int) -> torch.Tensor:
    return torch.randint(4, 500, (rows, context + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose to train on, and a task."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{i} was the best of times, {i} was the worst of times" for i in range(400)]
    (folder / "prose.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    rows = [
        {"sentence1": texts[i], "sentence2": texts[i - i % 2], "label": i % 2, "split": part}
        for i in range(4)
        for part in ("train", "dev")
    ]
    (folder / "mrpc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """The folders of a dense run and of one with Monarch in all layers of the blocks."""
    found = {name: data / name for name in ("dense", "monarch")}
    common = ["--data", data / "prose.jsonl", "--cache", data / "cache", "--steps", 3, "--device", "cpu"]
    given = {"dense": [], "monarch": ["--structure", "monarch:nblocks=4", "--layers", "all"]}
    for name, folder in found.items():
        command = ["train", "tiny_bert", *common, *given[name], "--out", folder]
        assert cli.main(list(map(str, command))) == 0
    return found


def test_chosen_places_are_hidden_by_the_rule_and_the_rest_stays() -> None:
    given = windows(600, 80)
    batch = MASKING(given, 7)
    inputs, places, targets = batch.split([80, 12, 12], 1)
    assert batch.dtype == torch.int64
    assert (inputs[:, 0] == MASKING.cls).all()
    assert (places[:, 1:] > places[:, :-1]).all()
    assert places.min() == 1
    assert places.max() == 79
    assert torch.equal(targets, given.gather(1, places))
    assert torch.equal(inputs.scatter(1, places, targets)[:, 1:], given[:, 1:-1])
    shown = inputs.gather(1, places)
    shares = [(shown == MASKING.mask).float().mean(), (shown == targets).float().mean()]
    assert [share.item() for share in shares] == pytest.approx([0.8, 0.1], abs=0.02)  # of 7200: 4 standard errors
    counts = places.flatten().bincount(minlength=80)[1:]
    assert counts.min() > 50  # of 91: no place is spared


def test_masks_follow_from_seed_and_step_alone() -> None:
    same = torch.full((4000,), 9).numpy()  # all windows are equal, so that batches differ in their masks alone
    first, again, other = (masked.MaskedWindows(Windows(same, 40, seed), MASKING) for seed in (0, 0, 1))
    first.batch(0, 4)
    assert torch.equal(first.batch(3, 4), again.batch(3, 4))
    assert not torch.equal(first.batch(3, 4), first.batch(4, 4))
    assert not torch.equal(first.batch(3, 4), other.batch(3, 4))


def test_validation_masks_are_those_of_every_run(data: Path) -> None:
    given = {"data": (str(data / "prose.jsonl"),), "cache": str(data / "cache")}
    found = [loop.batches(one, prepare(one))[1] for one in (recipe(**given), recipe(**given, seed=1, lr=1e-2))]
    assert torch.equal(*found)
    assert found[0].shape[1] == 64 + 2 * 10


@pytest.mark.parametrize("structure", ["dense", "monarch:nblocks=4"])
def test_the_loss_is_that_of_transformers_over_hidden_tokens(structure: str) -> None:
    model, _ = models.build(recipe(structure=structure, layers="all"), 500)
    batch = MASKING(windows(3, 64), 0)
    inputs, places, targets = batch.split([64, 12, 12], 1)
    labels = torch.full_like(inputs, -100).scatter(1, places, targets)
    own = models.LanguageModel(model)(batch)
    assert own.item() == pytest.approx(model(input_ids=inputs, labels=labels).loss.item(), rel=1e-5)
    changed = batch.clone()
    changed[:, 63] = 5
    assert models.LanguageModel(model)(changed).item() != own.item()  # attention sees what comes later


@pytest.mark.slow
def test_the_loss_compiles_to_one_graph() -> None:
    model, _ = models.build(recipe(structure="monarch:nblocks=4", layers="all", depth=1), 500)
    batch = MASKING(windows(2, 64), 0)
    compiled = torch.compile(models.loss, backend="eager", fullgraph=True)
    assert compiled(model, batch).item() == pytest.approx(models.loss(model, batch).item(), rel=1e-5)


def test_flops_are_those_of_blocks_and_of_the_head_where_it_runs() -> None:
    one = recipe()
    blocks = one.depth * (2 * (4 * 64 * 64 + 2 * 64 * 256) + 4 * 64 * 64)  # linear layers, attention
    head = 2 * (64 * 64 + 512 * 64) * 10 / 64
    assert models.flops_per_token(one, models.build(one, 512)[0]) == round(blocks + head)
    mlp = models.build(recipe(structure="monarch:nblocks=4"), 512)[1]
    names = [".intermediate.dense", ".output.dense"]
    assert sorted(swap.name for swap in mlp) == [f"bert.encoder.layer.{i}{name}" for i in (0, 1) for name in names]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tied": "false"}, "--tied: false is given; bert has one matrix"),
        ({"masked": "1"}, "--masked: 1.0 is given; allowed: between 0 and 1"),
        ({"context": "1"}, "--context: 1 is given; allowed for bert: 2 or more"),
        ({"kv_heads": "2"}, "--kv-heads: is for llama; the architecture is bert"),
    ],
)
def test_fields_that_bert_has_not_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(recipe(), fields)


def test_a_tokenizer_needs_the_tokens_of_an_encoder(data: Path, tmp_path: Path, capsys: Any) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "[SEP]": 1, "b": 2}, merges=[]))
    made.save(str(tmp_path / "bare.json"))
    common = ["train", "tiny_bert", "--data", str(data / "prose.jsonl"), "--cache", str(tmp_path), "--device", "cpu"]
    assert cli.main([*common, "--tokenizer", str(tmp_path / "bare.json"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "error: --tokenizer: has no [PAD], [CLS], [MASK]; allowed for bert: a tokenizer.json with [PAD]" in said
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_its_loss_is_and_its_tokenizer_frames_texts(runs: dict[str, Path]) -> None:
    (record,) = records.read(runs["monarch"] / "record.json")
    assert record["metrics"]["bits_per_byte"] is None
    assert record["metrics"]["valid_loss"] > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs["monarch"] / "model")
    given = tokenizer("a", "b")
    assert list(given) == ["input_ids", "attention_mask"]
    tokens = tokenizer.convert_ids_to_tokens(given["input_ids"])
    assert tokens == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert [tokenizer.pad_token, tokenizer.mask_token] == ["[PAD]", "[MASK]"]
    assert json.loads((runs["monarch"] / "model" / "tokenizer.json").read_text())["post_processor"]


@pytest.mark.parametrize("name", ["dense", "monarch"])
def test_transformers_loads_a_run(name: str, runs: dict[str, Path]) -> None:
    ours, _, _ = loop.load(runs[name])  # imports structlin.hf
    model = transformers.AutoModelForMaskedLM.from_pretrained(runs[name] / "model").eval()
    layer = model.bert.encoder.layer[1].attention.self.query
    assert isinstance(layer, StructuredLinear) == (name == "monarch")
    inputs = torch.arange(4, 44)[None]
    torch.testing.assert_close(model(inputs).logits, ours(inputs).logits)


def test_a_run_is_projected_and_tuned_by_commands(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    rules = ["--rules", "bert.encoder.layer.*=monarch:nblocks=4", "--weights", "project"]
    assert cli.main(["convert", str(runs["dense"] / "model"), str(tmp_path / "projected"), *rules]) == 0
    for folder in (runs["dense"] / "model", runs["monarch"] / "model", tmp_path / "projected"):
        kept, out = tmp_path / f"kept-{folder.parent.name}", tmp_path / "out.json"
        options = ["--data", str(data), "--steps", "1", "--batch", "4", "--device", "cpu", "--save", str(kept)]
        assert cli.main(["finetune", str(folder), "--task", "mrpc", *options, "--out", str(out)]) == 0
        (record,) = records.read(out)
        structures = {} if folder.parent.name == "dense" else {"monarch:nblocks=4": 12}
        assert record["config"]["structures"] == structures
        tuned = transformers.AutoModelForSequenceClassification.from_pretrained(kept)
        assert sum(isinstance(layer, StructuredLinear) for layer in tuned.modules()) == sum(structures.values())


def test_the_runs_of_the_benchmark_fit_their_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    jobs = importlib.import_module("bert").plan(smoke=False, steps=100)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 6 + 4 + 8
    for job in jobs:
        assert (job.after in names) == (not job.recipe)
        if job.recipe:
            one = override(find(job.recipe), {name: str(value) for name, value in job.fields.items()})
            assert isinstance(one, Recipe)
            if job.name == "scratch-s0":
                models.check(one)
