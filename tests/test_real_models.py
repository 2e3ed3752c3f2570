"""The benchmark of pretrained models on tiny ones: every stage runs, goes on where it stopped, and says what it did."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script

import structlin as sl
from structlin.report import records

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")

FILE = Path(__file__).parents[1] / "benchmarks" / "real_models.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "a", "b", "c", "d"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def bench() -> Any:
    return script("real_models")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = ["a b", "b c d", "c", "d a"] * 4
    for name in ("sick", "mrpc", "qqp", "sst2", "stsb", "mnli", "qnli"):
        labels = ["neutral", "entailment"] if name == "sick" else [0, 1]
        rows = [
            {"sentence": text, "sentence1": text, "sentence2": text[::-1], "question1": text, "question2": text[:1],
             "question": text, "premise": text, "hypothesis": text[::-1],
             "label": labels[i % 2], "split": ("train", "dev")[i % 4 // 2]}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        write(tmp_path / "data" / "glue" / f"{name}.jsonl.xz", rows)
    for part in ("train", "test"):
        write(tmp_path / "data" / "text" / f"{part}.jsonl.xz", [{"text": " ".join(texts)}] * 3)
    pairs = [{"sentence_good": "a b", "sentence_bad": "b d", "UID": name} for name in ("x", "x", "y")]
    write(tmp_path / "data" / "blimp" / "blimp.jsonl.xz", pairs)
    return tmp_path / "data"


@pytest.fixture(params=["minilm", "smollm2"])
def folder(request: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / request.param
    if request.param == "minilm":
        config = transformers.BertConfig(intermediate_size=64, max_position_embeddings=32, **SIZES)
        transformers.BertModel(config).save_pretrained(path)
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        made = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, **special)
        made.save_pretrained(path)
    else:
        config = transformers.LlamaConfig(intermediate_size=64, max_position_embeddings=32, **SIZES)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        words = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
        )
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.add_special_tokens(["<|endoftext|>"])
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(path)
    return path


def test_the_nearest_member_of_a_family_is_found(bench: Any) -> None:
    assert bench.nearest("dyad", 1536, 384, 0.5) == sl.Dyad(nblocks=4)
    assert bench.nearest("dyad", 1536, 384, 0.75) == sl.Dyad(nblocks=3)
    for family in ("monarch", "low_rank", "blast"):
        for share in (0.75, 0.5, 0.25):
            spec = bench.nearest(family, 1536, 384, share)
            assert sl.analysis.num_params(spec.plan(1536, 384)) / (1536 * 384) == pytest.approx(share, abs=0.01)


def test_an_encoder_is_distilled_by_sentences_or_by_the_tokens_of_pairs(
    bench: Any, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for match in ("sentences", "tokens") if folder.name == "minilm" else ():
        monkeypatch.setattr(sys, "argv", ["x", "out", "--model", str(folder), "--data", str(data), "--match", match])
        options = bench.parsed()
        options.device = "cpu"
        made = bench.Bench(folder, options, bench.load_tokenizer(folder), True)
        batch = next(made.batches(made.text("train", 10**6), 8))
        types = batch["token_type_ids"] * batch["attention_mask"]
        assert (types.sum(1) > 0).all() if match == "tokens" else not types.any()
        found = bench.outputs(made, made.dense(), batch)
        assert found.shape == (8 if match == "sentences" else batch["attention_mask"].sum(), 32)


def test_claims_follow_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = script("claims_convert")
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert all(measure() is None for *_, measure in claims.ROWS)
    common = records.read(FILE.parents[1] / "results" / "minilm-d2s-h200.json")[0]

    def tuned(case: str, task: str, rate: str, score: float) -> Any:
        config, metrics = {**common["config"], "task": task, "rate": rate}, {"score": score}
        return {**common, "name": f"tasks {task} {case} at {rate}", "config": config, "metrics": metrics}

    scores = {"dense": (0.8, 0.7), "monarch 50%": (0.6, 0.797), "monarch 75%": (0.795, 0.6)}
    tasks = [tuned(case, task, rate, score) for case, pair in scores.items()
             for rate, score in zip(("5e-5", "2e-4"), pair, strict=True) for task in ("rte", "stsb")]  # fmt: skip
    records.write(tmp_path / "minilm-d2s-h200.json", tasks)
    for model, ratio in (("minilm", 2.0), ("smollm2", 1.4)):
        steps = [{**common, "name": f"speed {case}", "metrics": {"compiled_step_ms": ms}}
                 for case, ms in (("dense", ratio), ("monarch 50%", 1.0))]  # fmt: skip
        records.write(tmp_path / f"{model}-speed-h200.json", steps)
    assert [measure()[1] for *_, measure in claims.ROWS] == [True, False, False]


@pytest.mark.slow
def test_every_stage_runs_and_goes_on(
    bench: Any, data: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stages = "project,recover,tasks,speed" if folder.name == "minilm" else "project,recover"
    arguments = [
        "real_models.py", str(tmp_path / "out.json"), "--model", str(folder), "--data", str(data), "--stages", stages,
        "--structures", "low_rank", "--shares", "0.5", "--tasks", "mrpc,stsb", "--device", "cpu", "--pairs", "3",
        "--context", "16", "--fit", "both", "--fit-tokens", "20", "--train-tokens", "200", "--steps", "3",
        "--batch", "2", "--speed-shape", "2", "4", "--distilled",
        "--task-lrs", "5e-5,1e-3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    found = records.read(tmp_path / "out.json")
    names = [record["name"] for record in found]
    assert names[:5] == [
        "project dense", "project low_rank 50%", "project low_rank 50% fitted",
        "recover low_rank 50%", "recover low_rank 50% fitted",
    ]  # fmt: skip
    assert all(record["status"] == "ok" for record in found)
    dense, projected, fitted, recovered = (record["metrics"] for record in found[:4])
    assert projected["params"] == pytest.approx(0.5, abs=0.05)
    assert projected["error"] > fitted["error"] > 0
    assert projected["weight_bytes"] < dense["weight_bytes"]
    assert recovered["distil_seconds"] > 0
    if folder.name == "minilm":
        cases = ["dense", "low_rank 50%", "low_rank 50% fitted"]
        assert names[5:11] == [f"tasks mrpc {case} at {rate}" for rate in ("5e-5", "1e-3") for case in cases]
        assert found[6]["metrics"]["distil_seconds"] == recovered["distil_seconds"], "distilled once"
        assert found[9]["metrics"]["error"] == recovered["error"]
        assert found[5]["metrics"]["score"] == found[5]["metrics"]["f1"]
        assert names[-2:] == ["speed dense", "speed low_rank 50%"]
        assert {"step_ms", "compiled_step_ms", "forward_ms", "compiled_forward_ms"} < found[-1]["metrics"].keys()
    else:
        assert dense["pairs"] == 3
    capsys.readouterr()
    bench.main()
    assert capsys.readouterr().out == ""
