"""Evaluation of language models: scores equal a plain reference for every architecture, tokenizer and batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import structlin as sl
from structlin import cli
from structlin.evaluate import blimp, kshot, loading, loss, metrics, tasks
from structlin.evaluate.score import Request, score
from structlin.evaluate.tokens import Encoder, encoder
from structlin.report import records

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("torchmetrics")

WORDS = [
    "the", "a", "cat", "cats", "dog", "dogs", "sees", "see", "sleeps", "sleep", "red",
    "big", "that", "not", "ever", "every", "no", "yes", "maybe", "good", "bad", "review",
]  # fmt: skip
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 48}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
CONFIGS: dict[str, Callable[[int], Any]] = {
    "opt": lambda vocabulary: transformers.OPTConfig(
        vocab_size=vocabulary, ffn_dim=32, word_embed_proj_dim=16, **SIZES, **ENDS
    ),
    "gpt2": lambda vocabulary: transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_head=2, n_layer=2, n_positions=48, **ENDS
    ),
    "llama": lambda vocabulary: transformers.LlamaConfig(
        vocab_size=vocabulary, intermediate_size=32, tie_word_embeddings=False, **SIZES, **ENDS
    ),
}

every_model = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Any:
    return loading.load_tokenizer(tokenizer_file)


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Encoder:
    return encoder(tokenizer, "<end>")


def build(name: str, tokenizer: Any) -> nn.Module:
    """A random model whose predictions differ enough to tell sentences apart; dropout shows a forgotten eval mode."""
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.train()


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    picks = [torch.randint(len(WORDS), (int(n),), generator=generator).tolist() for n in lengths]
    return [" ".join(WORDS[i] for i in pick) for pick in picks]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def plainly(model: nn.Module, ids: Sequence[int]) -> float:
    """Log-probability of all ``ids`` but the first, one sequence at a time, without anything of ours."""
    model.eval()
    logits = model(torch.tensor([list(ids)])).logits[0, :-1]
    return -float(F.cross_entropy(logits.double(), torch.tensor(list(ids[1:])), reduction="sum"))


@every_model
@pytest.mark.parametrize("batch_tokens", [None, 64, 1])
def test_scores_are_those_of_one_sequence_at_a_time(
    name: str, batch_tokens: int | None, tokenizer: Any, encode: Encoder
) -> None:
    model, texts = build(name, tokenizer), sentences(30)
    found = score(model, encode.wholes(texts), batch_tokens)
    end = tokenizer.convert_tokens_to_ids("<end>")
    wanted = [plainly(model, [end, *tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=0)
    assert len({round(value, 3) for value in wanted}) > 20


@every_model
def test_a_context_is_not_scored(name: str, tokenizer: Any, encode: Encoder) -> None:
    model = build(name, tokenizer)
    (whole,) = encode.wholes(["the cat sees a big dog"])
    parts = [Request(whole.context + whole.target[:cut], whole.target[cut:]) for cut in (2, 4)]
    found = score(model, [whole, *parts]).tolist()
    for value, part in zip(found[1:], parts, strict=True):
        assert value == pytest.approx(found[0] - plainly(model, part.context), rel=1e-4)


def test_any_module_can_be_scored_and_keeps_its_mode(encode: Encoder) -> None:
    model = nn.Sequential(nn.Embedding(400, 8), nn.Linear(8, 400)).train()
    assert score(model, encode.wholes(["the cat"])).shape == (1,)
    assert model.training
    with torch.no_grad():
        model[1].bias[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        score(model, encode.wholes(["the cat"]))


def test_what_cannot_be_scored_is_an_error(tokenizer: Any, encode: Encoder) -> None:
    model = build("llama", tokenizer)
    with pytest.raises(ValueError, match="has no tokens"):
        encode.wholes([""])
    with pytest.raises(ValueError, match="empty target"):
        score(model, [Request((0,), ())])
    with pytest.raises(ValueError, match="reads at most 48"):
        score(model, [Request((0,), (1,) * 49)])
    with pytest.raises(ValueError, match="allowed: 1 and more"):
        score(model, [], batch_tokens=0)


def test_the_prefix_stands_before_a_text_exactly_once(tokenizer: Any) -> None:
    """Also with a tokenizer that adds its own, as OPT's and Llama's do."""
    bare = encoder(tokenizer, "<end>").wholes(["the cat"])
    end = tokenizer.convert_tokens_to_ids("<end>")
    adding = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<end>")
    adding.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", end)]
    )
    try:
        assert adding("the cat")["input_ids"] == [end, *bare[0].target, end]
        assert encoder(adding).wholes(["the cat"]) == bare
        assert bare[0].context == (end,)
    finally:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A")


def test_a_tokenizer_without_a_prefix_asks_for_one(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"give bos \(--bos\); it has '<end>', '<pad>'"):
        encoder(tokenizer)
    with pytest.raises(ValueError, match="'<s>' is not a token"):
        encoder(tokenizer, "<s>")


def test_answers_follow_the_same_tokens(encode: Encoder, tokenizer: Any) -> None:
    """Also where an answer merges with the end of its prompt."""
    for context, answers in (("review: the", [" cat", " dogs"]), ("the c", ["at", "ow", "ats"])):
        requests = encode.choices(context, answers)
        assert len({request.context for request in requests}) == 1
        for request, answer in zip(requests, answers, strict=True):
            assert tokenizer.decode((*request.context[1:], *request.target)) == context + answer
            assert request.target


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, 8), (8, 8, 8), (20, 8, 8), (21, 8, 3), (30, 8, 1)])
def test_windows_predict_every_token_once(length: int, context: int, stride: int) -> None:
    ids = list(range(100, 100 + length))
    found = list(loss.windows(ids, 7, context, stride))
    assert [token for window in found for token in window.target] == ids
    assert len(found[0].target) == min(length, context)
    known = [7, *ids]
    for window in found:
        given = [*window.context, *window.target[:-1]]
        assert len(given) <= context
        start = known.index(given[0])
        assert given == known[start : start + len(given)]
        assert given[0] == 7 or len(given) == context


def test_loss_of_a_text(tokenizer: Any, encode: Encoder) -> None:
    model = build("opt", tokenizer)
    documents = [" ".join(sentences(30)), "the cat", "é no"]
    found = loss.text_loss(model, encode, documents, context=16)
    total, count = 0.0, 0
    for text in documents:
        ids = encode.encode([text])[0]
        known = [encode.prefix, *ids]
        for start in range(0, len(ids), 16):
            total -= plainly(model, known[start : start + 17])
        count += len(ids)
    assert found["tokens"] == count
    assert found["bytes"] == sum(len(text.encode()) for text in documents)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-5)
    # the same text twice: the same loss, and half the variance
    twice = loss.text_loss(model, encode, documents * 2, context=16)
    windows = found["windows"]
    shrinkage = math.sqrt((windows - 1) / (2 * windows - 1))
    assert twice["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert twice["loss_stderr"] == pytest.approx(found["loss_stderr"] * shrinkage, rel=1e-5)
    with pytest.raises(ValueError, match="stride=17"):
        loss.text_loss(model, encode, documents, context=16, stride=17)


def pairs_of(count: int) -> list[dict[str, Any]]:
    texts = sentences(2 * count, seed=1)
    rows = [
        {
            "sentence_good": texts[2 * i],
            "sentence_bad": texts[2 * i + 1],
            "UID": f"p{i % 4}",
            "field": ["syntax/semantics", "syntax_semantics", "syntax", "syntax"][i % 4],
            "linguistics_term": "binding" if i % 4 < 2 else "islands",
        }
        for i in range(count)
    ]
    rows[0]["sentence_bad"] = rows[0]["sentence_good"]
    return rows


def test_minimal_pairs(tmp_path: Path, tokenizer: Any, encode: Encoder) -> None:
    model = build("gpt2", tokenizer)
    pairs = blimp.read_pairs(write_rows(tmp_path / "pairs.jsonl", pairs_of(42)))
    found = blimp.blimp(model, encode, pairs, batch_tokens=64)
    points: dict[str, list[float]] = {}
    for pair in pairs:
        good, bad = (plainly(model, [encode.prefix, *encode.encode([text])[0]]) for text in (pair.good, pair.bad))
        points.setdefault(pair.paradigm, []).append(0.5 if pair.good == pair.bad else float(good > bad))
    means = {name: sum(values) / len(values) for name, values in points.items()}
    assert found["ties"] == 1
    assert found["paradigms"] == 4
    assert {name: found[f"paradigm/{name}"] for name in means} == pytest.approx(means)
    assert found["accuracy"] == pytest.approx(sum(means.values()) / 4)
    assert found["field/syntax_semantics"] == found["term/binding"] == pytest.approx((means["p0"] + means["p1"]) / 2)
    errors = {}
    for name, values in points.items():
        spread = sum((value - means[name]) ** 2 for value in values) / (len(values) - 1)
        errors[name] = math.sqrt(spread / len(values))
        assert found[f"paradigm/{name}_stderr"] == pytest.approx(errors[name])
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors.values())) / 4)


def test_pairs_that_are_none(tmp_path: Path) -> None:
    rows = pairs_of(4)
    with pytest.raises(ValueError, match=r"line 1: no UID"):
        blimp.read_pairs(write_rows(tmp_path / "a.jsonl", [{k: v for k, v in rows[0].items() if k != "UID"}]))
    with pytest.raises(ValueError, match="allowed: two sentences"):
        blimp.read_pairs(write_rows(tmp_path / "b.jsonl", [{**rows[0], "sentence_good": " "}]))
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"c.jsonl, line 1: not JSON"):
        blimp.read_pairs(tmp_path / "c.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no pairs"):
        blimp.read_pairs(tmp_path / "none")


@every_model
def test_scores_are_those_of_lm_eval(name: str, tokenizer: Any) -> None:
    """500 pairs through its model class, and its accuracy, which counts a tie as right."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    model = build(name, tokenizer)
    special = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<end>", pad_token="<pad>"
    )
    texts = sentences(1000, seed=2)
    pairs = [blimp.Pair(good, bad, "p") for good, bad in zip(texts[::2], texts[1::2], strict=True)]
    ours = blimp.score_pairs(model, encoder(special), pairs)
    theirs = huggingface.HFLM(pretrained=model.eval(), tokenizer=special, batch_size=32, device="cpu")
    asked = [Instance("loglikelihood", {}, ("", text), 0) for pair in pairs for text in (pair.good, pair.bad)]
    wanted = torch.tensor([value for value, _ in theirs.loglikelihood(asked, disable_tqdm=True)]).double().view(-1, 2)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    same = torch.tensor([pair.good == pair.bad for pair in pairs])
    right = (wanted[:, 0] >= wanted[:, 1]).double().mean() - 0.5 * same.double().mean()
    assert blimp.accuracy(pairs, ours)["accuracy"] == pytest.approx(float(right))


def task_rows(count: int) -> list[dict[str, Any]]:
    texts = sentences(count, seed=3)
    parts = ["train", "dev", "dev"]
    return [{"split": parts[i % 3], "sentence": text, "label": i % 2, "idx": i} for i, text in enumerate(texts)]


@every_model
def test_few_shot_answers(name: str, tmp_path: Path, tokenizer: Any, encode: Encoder) -> None:
    model, task = build(name, tokenizer), tasks.TASKS["sst2"]
    write_rows(tmp_path / "sst2.jsonl", task_rows(60))
    rows, _ = tasks.read_task(tmp_path, "sst2")
    found = kshot.kshot(model, encode, task, rows, shots=0, seed=0)
    right = []
    for row in rows["dev"]:
        prompt = f"Review: {row['sentence']}\nThe review is"
        scores = [plainly(model, [encode.prefix, *encode.encode([prompt + word])[0]]) for word in (" bad", " good")]
        right.append(float(scores[row["label"]] > scores[1 - row["label"]]))
    mean = sum(right) / len(right)
    assert found["accuracy"] == pytest.approx(mean)
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1)))
    assert found["examples"] == len(right) == 40
    assert found["fewer_shots"] == found["cut"] == 0


def test_shots_are_drawn_from_the_seed_and_dropped_where_they_do_not_fit(tokenizer: Any, encode: Encoder) -> None:
    model, task = build("llama", tokenizer), tasks.TASKS["sst2"]
    rows = {part: [row for row in task_rows(60) if row["split"] == part] for part in tasks.PARTS}
    text = kshot.prompt(task, rows["train"][:2], rows["dev"][0])
    assert text.count("\n\n") == 2
    assert text.endswith("The review is")
    assert "The review is good\n\n" in text or "The review is bad\n\n" in text
    runs = [
        kshot.kshot(model, encode, task, rows, 1, seed, limit=20, context=300, batch_tokens=4096) for seed in (0, 0)
    ]
    assert runs[0] == runs[1]
    # 48 tokens hold a question, and hardly a shot
    long = kshot.kshot(model, encode, task, rows, shots=4, seed=0, limit=20)
    assert long["fewer_shots"] == 20
    longer = {**rows, "dev": [{**row, "sentence": " ".join(WORDS * 4)} for row in rows["dev"][:5]]}
    assert kshot.kshot(model, encode, task, longer, shots=0, seed=0)["cut"] == 5
    with pytest.raises(ValueError, match="shots=21 is given; allowed: 0 to 20"):
        kshot.kshot(model, encode, task, rows, shots=21, seed=0)


def test_every_task_has_a_prompt_and_answers(encode: Encoder) -> None:
    assert len(tasks.TASKS) == 15
    for name, task in tasks.TASKS.items():
        text = task.text({field: f"<{field}>" for field in task.fields})
        assert all(f"<{field}>" in text for field in task.fields), name
        assert text == text.rstrip(), name
        assert set(task.metrics) <= set(metrics.METRICS), name
        assert all(word.startswith(" ") for word in task.words.values()), name
        assert len(set(task.words.values())) == len(task.words), name


def test_tasks_in_tables_and_folders(tmp_path: Path) -> None:
    rows = task_rows(6)
    (tmp_path / "sst2").mkdir()
    for part in tasks.PARTS:
        lines = [f"{row['sentence']}\t{row['label']}\n" for row in rows if row["split"] == part]
        (tmp_path / "sst2" / f"{part}.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    found, paths = tasks.read_task(tmp_path, "sst2")
    assert [path.name for path in paths] == ["train.tsv", "dev.tsv"]
    assert [(row["sentence"], int(row["label"])) for row in found["dev"]] == [
        (row["sentence"], row["label"]) for row in rows if row["split"] == "dev"
    ]
    assert tasks.present(tmp_path) == ["sst2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "label is 2; allowed: 0, 1"),
        ({"split": "test"}, "split is 'test'; allowed: train, dev"),
        ({"sentence": None}, "no sentence; it has"),
    ],
)
def test_rows_that_do_not_fit_their_task(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = task_rows(4)
    rows[1] = {key: value for key, value in {**rows[1], **change}.items() if value is not None}
    write_rows(tmp_path / "sst2.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        tasks.read_task(tmp_path, "sst2")
    with pytest.raises(ValueError, match=r"holds no cola; allowed: cola\.jsonl"):
        tasks.read_task(tmp_path, "cola")
    with pytest.raises(ValueError, match="task 'glue' is unknown; allowed: boolq"):
        tasks.read_task(tmp_path, "glue")


def test_metrics_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (50,), generator=generator)
    predicted = torch.where(torch.rand(50, generator=generator) < 0.7, labels, 1 - labels)
    tp, tn = (float(((predicted == k) & (labels == k)).sum()) for k in (1, 0))
    fp, fn = (float(((predicted == k) & (labels == 1 - k)).sum()) for k in (1, 0))
    found = metrics.measure(["accuracy", "f1", "matthews"], predicted, labels)
    assert found["accuracy"] == pytest.approx((tp + tn) / 50)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(wanted, rel=1e-5)
    for name, metric in metrics.METRICS.items():
        # the jackknife without any shortcut
        left_out = [metric(*(torch.cat([x[:i], x[i + 1 :]]) for x in (predicted, labels))) for i in range(50)]
        mean = sum(left_out) / 50
        wanted = math.sqrt(sum((value - mean) ** 2 for value in left_out) * 49 / 50)
        assert metrics.standard_error(metric, predicted, labels) == pytest.approx(wanted, rel=1e-4), name
    assert metrics.matthews(torch.ones(50, dtype=torch.long), labels) == 0
    assert metrics.pearson(labels, labels.double() * 3 + 1) == pytest.approx(1)


@every_model
def test_folders_load_with_and_without_structures(name: str, tmp_path: Path, tokenizer: Any, encode: Encoder) -> None:
    model = build(name, tokenizer).eval()
    plain, structured = tmp_path / "plain", tmp_path / "structured"
    model.save_pretrained(plain)
    requests = encode.wholes(sentences(5))
    torch.testing.assert_close(score(loading.load_model(plain), requests), score(model, requests))
    if name != "gpt2":  # whose linear layers are no nn.Linear
        sl.to_structured_(model, {"*layers.*.fc1": sl.Monarch(nblocks=4)} if name == "opt" else {"*_proj": sl.Dyad()})
    sl.save(model, structured)
    model.config.save_pretrained(structured)
    torch.testing.assert_close(score(loading.load_model(structured), requests), score(model, requests))
    half = score(loading.load_model(structured, dtype="bfloat16"), requests)
    torch.testing.assert_close(half, score(model, requests), rtol=0.05, atol=0)


def test_weights_that_are_missing_are_no_random_ones(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    build("llama", tokenizer).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model.layers.0.mlp.up_proj.weight"):
        loading.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        loading.load_model(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        loading.load_model(tmp_path / "nowhere")


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any, tokenizer_file: Path) -> Path:
    build("opt", tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return tmp_path / "model"


def run(*options: Any) -> int:
    try:
        return cli.main(["eval", *map(str, options)])
    except SystemExit as end:
        return int(end.code or 0)


def test_the_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(" ".join(sentences(20)), encoding="utf-8")
    write_rows(tmp_path / "pairs.jsonl", pairs_of(12))
    write_rows(tmp_path / "sst2.jsonl", task_rows(12))
    data = [f"loss={tmp_path / 'text.txt'}", f"blimp={tmp_path / 'pairs.jsonl'}", f"kshot={tmp_path}"]
    out = tmp_path / "eval.json"
    options = ["--tasks", "loss,blimp,kshot", "--bos", "<end>", "--shots", 1, "--device", "cpu", "--out", out]
    assert run(model_folder, *options, "--data", *data) == 0
    printed = capsys.readouterr().out
    found = {record["name"]: record for record in records.read(out)}
    assert list(found) == ["loss", "blimp", "kshot/sst2"]
    for record in found.values():
        assert record["kind"] == "eval"
        assert record["config"]["prefix"] == "<end>"
        assert len(record["config"]["data"]["sha256"]) == 64
        assert f"{record['name']}: " in printed
    shown = found["loss"]["metrics"]
    assert f"{shown['loss']:.4f} +- {shown['loss_stderr']:.4f}" in " ".join(printed.split())
    assert f"{100 * found['blimp']['metrics']['accuracy']:.2f}% +- " in " ".join(printed.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "glue", "--data", "loss=x"], "--tasks: glue is given; allowed: loss, blimp, kshot"),
        (["--data", "text.txt"], "--data: text.txt is given; allowed: TASK=PATH, with TASK of loss"),
        (["--tasks", "loss,blimp", "--data", "loss=x"], "nothing is given for blimp"),
        (["--data", "loss=nowhere.txt"], "nowhere.txt cannot be read"),
        (["--data", "loss=nowhere.txt", "--context", "49"], "--context: 49 is given; allowed: 1 to 48"),
        (["--data", "loss=x", "--tokenizer", "nowhere.json"], "nowhere.json does not exist"),
        (["--data", "loss=x", "--out", "nowhere/x.json"], "allowed: a file in a folder that exists"),
        (["--data", "loss=x", "--device", "tpu"], "--device: tpu is given; allowed: cpu"),
        (["--data", "loss=x", "--dtype", "int8"], "dtype='int8' is given; allowed: float32, bfloat16"),
        (["--data", "loss=x", "--context", "0"], "--context: 0 is given; allowed: 1 or more"),
        (["--data", "loss=x", "--stride", "0"], "--stride: 0 is given; allowed: 1 or more"),
        (["--data", "loss=x", "--batch-tokens", str(2**70)], "--batch-tokens: '1180591620717411303424' is given"),
        (["--data", "loss=x", "loss=y"], "--data: loss is given twice, x and y; allowed: one path for each task"),
        (["--data", "loss=x", "--shots", "0"], "--shots: is for the task kshot; given: --tasks loss"),
        (["--data", "loss=x", "--leading-space"], "--leading-space: is for the task blimp; given: --tasks loss"),
        (
            ["--tasks", "kshot", "--data", "kshot=x", "--kshot-tasks", "rte,rte"],
            "rte is given twice; allowed: each once",
        ),
    ],
)
def test_bad_input_is_one_line(
    model_folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_folder, "--bos", "<end>", "--device", "cpu", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith("structlin eval: error: ") for line in error.splitlines()) == 1
