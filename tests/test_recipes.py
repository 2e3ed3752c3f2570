"""Recipes, the models that they stand for, and the command that trains them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structlin import StructuredLinear, analysis, cli, load
from structlin.evaluate.loading import load_model, load_tokenizer
from structlin.evaluate.tokens import encoder
from structlin.recipes import LANGUAGE, RECIPES, find
from structlin.report import records
from structlin.train import loop
from structlin.train import model as models
from structlin.train.config import OptionError
from structlin.train.recipe import Recipe
from structlin.train.settings import kinds, option, override

TINY = [name for name in LANGUAGE if name.startswith("tiny_")]
# as published, with the published vocabulary and 1024 positions (BERT 128 of 512); OPT has two more rows of positions
SIZES = {
    "opt125m": (50272, 125_239_296 - 1024 * 768),
    "opt350m": (50272, 331_196_416 - 1024 * 1024),
    "pythia160m": (50304, 162_322_944),
    "gpt2_small": (50257, 124_439_808),
    "gpt2_medium": (50257, 354_823_168),
    "bert_base": (30522, 109_514_298 - 384 * 768),
    "bert_large": (30522, 335_174_458 - 384 * 1024),
}


def train(*options: Any) -> int:
    """Run ``structlin train`` in this process; the exit status, however it is delivered."""
    try:
        return cli.main(["train", *map(str, options)])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{i} was the best of times, {i} was the worst of times"}) for i in range(400))
    )
    return path


# recipes


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_recipe_is_its_json_and_has_its_name(name: str) -> None:
    recipe = find(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    models.check(dataclasses.replace(recipe, structure="dyad:nblocks=4"))


@pytest.mark.parametrize("name", SIZES)
def test_models_have_their_published_sizes(name: str) -> None:
    vocabulary, size = SIZES[name]
    with torch.device("meta"):
        model = models.dense(dataclasses.replace(find(name), pad_vocabulary=1), vocabulary)
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_fields_from_the_command_line_have_their_types() -> None:
    recipe = override(
        find("gpt2_small"),
        {"lr": "2e-3", "steps": "50", "tied": "false", "tokenizer": "none", "data": ["a", "b"], "kv_heads": "none"},
    )
    assert (recipe.lr, recipe.steps, recipe.tied, recipe.tokenizer, recipe.data) == (2e-3, 50, False, None, ("a", "b"))
    assert all(field.metadata["help"] for field in dataclasses.fields(Recipe))


BAD = [
    (
        {"lr": "fast", "steps": "1.5"},
        ["--lr: 'fast' is given; allowed: numbers", "--steps: '1.5' is given; allowed: whole"],
    ),
    ({"lr": "-1", "depth": "0"}, ["--depth: 0 is given; allowed: 1 or more", "--lr: -1.0 is given; allowed: positive"]),
    ({"lr": "nan"}, ["--lr: nan"]),
    ({"tied": "perhaps"}, ["--tied: 'perhaps' is given; allowed: true, false"]),
    ({"schedule": "sine"}, ["--schedule: 'sine' is given; allowed: cosine, linear, constant"]),
    ({"heads": "5"}, ["--heads: 5 heads do not divide the width 768"]),
    ({"kv_heads": "4"}, ["--kv-heads: is for llama; the architecture is gpt2"]),
    ({"post_norm": "true"}, ["--post-norm: is for opt"]),
    ({"lm_head": "btt"}, ["--lm-head: btt cannot be tied to the embedding; give --tied false too"]),
    ({"method": "self_guided"}, ["--method: self_guided needs a structure"]),
    ({"trackers": ["tensorbord"]}, ["--trackers: tensorbord is unknown; allowed: tensorboard, trackio, wandb"]),
    ({"warmup": "1"}, ["--warmup: 1.0 is given; allowed: 0 to below 1"]),
]


@pytest.mark.parametrize(("texts", "parts"), BAD, ids=[" ".join(texts) for texts, _ in BAD])
def test_all_that_is_wrong_is_one_message(texts: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        override(find("gpt2_small"), texts)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_rise_and_fall(schedule: Any) -> None:
    recipe = dataclasses.replace(find("gpt2_small"), schedule=schedule, steps=100, warmup=0.1, final_lr=0.2)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(1 if schedule == "constant" else 0.2)
    assert rates[55] == pytest.approx(1 if schedule == "constant" else 0.6)


# models


@pytest.mark.parametrize("name", TINY)
def test_layers_that_are_chosen_become_structured(name: str) -> None:
    recipe = find(name)
    dense, _ = models.build(recipe, 500)
    mlp, in_mlp = models.build(dataclasses.replace(recipe, structure="monarch:nblocks=4"), 500)
    every, in_all = models.build(dataclasses.replace(recipe, structure="monarch:nblocks=4", layers="all"), 500)
    linears = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    assert {swap.name for swap in in_all} == {n for n in linears if n.startswith(models.BLOCKS[recipe.architecture])}
    names = {swap.name for swap in in_mlp}
    assert names < {swap.name for swap in in_all}
    assert not any("att" in n for n in names)
    assert sum(isinstance(layer, StructuredLinear) for layer in every.modules()) == len(in_all)
    assert len(names) == recipe.depth * (3 if recipe.architecture == "llama" else 2)
    # what stays has the same weights, and the embedding its padding to a multiple of 64
    stay = {n: t for n, t in mlp.state_dict().items() if n.rpartition(".")[0] not in names}
    state = dense.state_dict()
    assert all(torch.equal(state[n], t) for n, t in stay.items() if n in state)
    assert dense.get_input_embeddings().weight.shape == (512, 64)
    tied = mlp.get_input_embeddings().weight is mlp.get_output_embeddings().weight
    assert tied == recipe.tied


def test_explicit_globs_choose_layers() -> None:
    layers = "transformer.h.0.mlp.* *.c_attn"
    recipe = dataclasses.replace(find("tiny_gpt2"), structure="dyad:nblocks=4", layers=layers)
    names = [swap.name.removeprefix("transformer.h.") for swap in models.build(recipe, 500)[1]]
    assert names == ["0.attn.c_attn", "0.mlp.c_fc", "0.mlp.c_proj", "1.attn.c_attn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "dyed"}, "--structure: .*'dyed'.*did you mean 'dyad'"),
        ({"structure": "dyad:nblocks=7"}, r"h.0.mlp.c_fc \(256x64\): nblocks=7 .*may be 1, 2, 4.* \(and 3 more\)"),
        ({"structure": "dyad", "layers": "*.fc1"}, r"--structure, --layers: rule '\*.fc1' matches no linear layer"),
    ],
)
def test_structures_that_do_not_fit_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        models.check(dataclasses.replace(find("tiny_gpt2"), **options))


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny_bert"])
def test_the_loss_is_that_of_transformers_and_sees_no_future(name: str) -> None:
    recipe = find(name)
    model, _ = models.build(recipe, 500)
    windows = torch.randint(500, (3, 17), generator=torch.Generator().manual_seed(1))
    own = models.LanguageModel(model)(windows)
    assert own.item() == pytest.approx(model(input_ids=windows, labels=windows).loss.item(), rel=1e-5)
    model.eval()
    changed = windows.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 500
    same = torch.isclose(model(windows).logits, model(changed).logits, atol=1e-6).all(dim=-1)
    assert same[:, :9].all()
    assert not same[:, 9:].any()


def test_linears_in_place_of_conv1d_compute_the_same() -> None:
    from transformers import AutoModelForCausalLM

    recipe = find("tiny_gpt2")
    torch.manual_seed(recipe.seed)
    published = AutoModelForCausalLM.from_config(models.configuration(recipe, 500), dtype=torch.float32).eval()
    model, _ = models.build(recipe, 500)
    windows = torch.arange(40)[None] * 7 % 500
    assert torch.allclose(published(windows).logits, model.eval()(windows).logits, atol=1e-6)


@pytest.mark.parametrize(("name", "sizes"), [("opt350m", {"embedding_width": 32}), ("bert_base", {})])
def test_norms_behind_the_residual_sum_leave_the_tokens_in_it(name: str, sizes: dict[str, Any]) -> None:
    recipe = dataclasses.replace(find(name), width=64, heads=2, mlp_width=256, context=16, **sizes)
    with_dyad = dataclasses.replace(recipe, structure="dyad:nblocks=4", layers="all")
    dense, structured = models.build(recipe, 500)[0], models.build(with_dyad, 500)[0]
    for name, layer in structured.named_modules():
        if isinstance(layer, StructuredLinear):
            drawn = dense.get_submodule(name).weight
            assert layer.matrix().norm().item() == pytest.approx(drawn.norm().item(), rel=1e-3), name
    windows = torch.randint(500, (8, 16), generator=torch.Generator().manual_seed(0))
    for model in (dense, structured):
        states = model(windows, output_hidden_states=True).hidden_states
        first, last = states[1].flatten(0, 1), states[-2].flatten(0, 1)
        kept = nn.functional.cosine_similarity(first, last).mean().item()
        assert kept > 0.9, f"of the first block's output {kept:.2f} is left at the end, 0.03 with usual branches"


def test_groups_decay_matrices_only_and_scale_factors_and_embeddings() -> None:
    recipe = dataclasses.replace(find("tiny_opt"), structure="monarch:nblocks=4", embedding_lr=8.0)
    model, _ = models.build(recipe, 500)
    groups = models.groups(recipe, model)
    found = {id(p): group for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {p.ndim > 1 for group in groups for p in group["params"] if group["weight_decay"]} == {True}
    assert {p.ndim > 1 for group in groups for p in group["params"] if not group["weight_decay"]} == {False}
    assert found[id(model.get_input_embeddings().weight)]["lr"] == 8 * recipe.lr
    layer = model.get_submodule("model.decoder.layers.0.fc1")
    assert isinstance(layer, StructuredLinear)
    for factor in layer.plan.factors:
        rate = found[id(layer.get_parameter(factor))]["lr"]
        assert rate == pytest.approx(recipe.lr * analysis.lr_scale(layer.plan, factor))
    assert found[id(named["model.decoder.layers.0.self_attn.k_proj.weight"])]["lr"] == recipe.lr


def test_flops_are_counted_by_plans() -> None:
    recipe = find("tiny_opt")
    dense, _ = models.build(recipe, 512)
    blocks = 2 * recipe.depth * (4 * 64 * 64 + 2 * 64 * 256) + 2 * 512 * 64
    assert models.flops_per_token(recipe, dense) == blocks + recipe.depth * 2 * 64 * 65
    half = dataclasses.replace(recipe, structure="block_diagonal:nblocks=2")
    less = models.flops_per_token(recipe, dense) - models.flops_per_token(half, models.build(half, 512)[0])
    assert less == recipe.depth * 2 * 64 * 256


# the command


def check_that_transformers_builds_it(run: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ours, tokenizer, _ = loop.load(run)  # imports structlin.hf, without which no structure fits a Conv1D
    config = AutoConfig.from_pretrained(run / "model")
    built = load(AutoModelForCausalLM.from_config(config, dtype=torch.float32), run / "model").eval()
    windows = torch.arange(40)[None]
    assert torch.equal(built(windows).logits, ours(windows).logits)
    assert built.config._attn_implementation == ours.config._attn_implementation == "sdpa"
    assert (run / "model" / "tokenizer.json").read_text(encoding="utf-8") == tokenizer


@pytest.mark.parametrize("options", [["--structure", "dyad:nblocks=4"], ["--lm-head", "btt:rank=2", "--tied", "false"]])
def test_the_folder_of_a_gpt2_is_one_that_transformers_builds(options: list[str], prose: Path, tmp_path: Path) -> None:
    common = ["--data", prose, "--cache", tmp_path / "cache", "--steps", 2, "--device", "cpu"]
    assert train("tiny_gpt2", *common, *options, "--out", tmp_path / "run") == 0
    check_that_transformers_builds_it(tmp_path / "run")
    model = load_model(tmp_path / "run" / "model")
    ours, _, _ = loop.load(tmp_path / "run")
    windows = torch.arange(40)[None]
    assert torch.equal(model(windows).logits, ours(windows).logits)
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert encoder(tokenizer).prefix == tokenizer.eos_token_id, "what stood before a text in training"
    (record,) = records.read(tmp_path / "run" / "record.json")
    assert sum(p.numel() for p in model.parameters()) == record["metrics"]["model_params"]


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_gpt2", "tiny_pythia", "tiny_llama"])
def test_the_output_layer_of_every_decoder_takes_a_structure(name: str) -> None:
    recipe = dataclasses.replace(find(name), depth=1, tied=False, lm_head="btt:rank=2")
    models.check(recipe)
    head = models.build(recipe, 500)[0].get_output_embeddings()
    assert isinstance(head, StructuredLinear)
    assert head.out_features == 512


def test_the_command_trains_lists_and_refuses(prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", prose, "--cache", tmp_path / "cache", "--steps", 4, "--device", "cpu", "--valid-every", 2]
    assert train("tiny_llama", *common, "--structure", "dyad:nblocks=4", "--out", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    (record,) = records.read(tmp_path / "run" / "record.json")
    assert f"validation loss {record['metrics']['valid_loss']:.4f}" in out
    assert "step 4 of 4" in err
    assert record["command"].startswith("structlin train tiny_llama --data")
    assert record["config"]["structure"] == "dyad:nblocks=4"
    assert record["config"]["steps"] == 4
    check_that_transformers_builds_it(tmp_path / "run")
    assert train("tiny_llama", *common, "--structure", "dyad:nblocks=4", "--out", tmp_path / "run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == record
    assert train("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(RECIPES)


def test_bad_options_are_one_line_and_leave_nothing(
    prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, part in (
        (["tiny_gtp2"], "RECIPE: 'tiny_gtp2' is unknown; did you mean 'tiny_gpt2'?"),
        ([], "RECIPE: is not given; allowed: opt125m"),
        (["tiny_gpt2", "--lr", "0"], "--lr: 0.0 is given"),
        (["tiny_gpt2", "--structure", "dyad:nblocks=7", "--data", prose], "nblocks=7"),
        (["tiny_gpt2", "--data", "gone"], "--data: gone does not exist"),
        (["tiny_gpt2", "--out", prose, "--data", prose], "--out: "),
        (["tiny_gpt2", "--colour", "red"], "the argument --colour is unknown; allowed: those of"),
        (["tiny_gpt2", "--strukture", "dyad"], "the argument --strukture is unknown; did you mean --structure?"),
        (["tiny_gpt2", "--structure", "dyad:nblocks=4", "--init", "spektral", "--data", prose], "--init: "),
        (["tiny_gpt2", "--guided", "0.3"], "--guided: is for --method self_guided; the method is scratch"),
        (["tiny_gpt2", "--switch", "0.3"], "--switch: is for --method sparsify_reverse; the method is scratch"),
        (["tiny_gpt2", "--data", prose, "--trackers", "trackio"], "--trackers: trackio is not installed; install with"),
    ):
        assert train(*options) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert part in said.err
        assert [path.name for path in tmp_path.iterdir()] == ["prose.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("run.json", "[]", "run.json is not of a run of this version"),
        ("run.json", '{"format": 1}', "run.json is not of a run of this version"),
        ("model", "a file", "model is a file, and the model goes there"),
        ("record.json", '{"schema": "structlin.records", "version": 1, "records": []}', "record.json: holds 0 records"),
    ],
)
def test_a_damaged_folder_is_named_and_left_alone(
    name: str, text: str, part: str, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(text)
    common = ["--data", prose, "--cache", tmp_path / "cache", "--steps", 1, "--device", "cpu", "--out", folder]
    assert train("tiny_gpt2", *common) == 2
    said = capsys.readouterr().err
    assert f"structlin train: error: --out: {folder / part}" in said
    assert (folder / name).read_text() == text
    assert not (folder / "checkpoints").exists()


def test_nothing_is_said_to_be_kept_where_nothing_is(
    prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = ["--data", prose, "--cache", tmp_path / "file" / "cache", "--out", tmp_path / "run", "--device", "cpu"]
    assert train("tiny_gpt2", *options, "--steps", 1) == 1
    assert "is kept" not in capsys.readouterr().err


def test_every_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--help") == 0
    text = capsys.readouterr().out
    assert all(option(name) in text for name in kinds(Recipe))
