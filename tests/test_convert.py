"""Model folders converted and made dense again by the command: whole or not at all, resumed, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, dense, example
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import structlin as sl
import structlin.hf
from structlin import cli
from structlin.commands.convert import read_rules
from structlin.hf import stream
from structlin.testing import assert_close

RULES = ["*.mlp.*=monarch:nblocks=4", "*.q_proj=low_rank:rank=8"]


def run(*arguments: object) -> int:
    """Run the command in this process; the exit status, however it is delivered."""
    try:
        return cli.main([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**example(name)).logits


def contents(folder: Path) -> dict[str, object]:
    """File -> its text, or its tensors; safetensors orders the entries of its metadata at random."""
    tensors = {path.name: {k: v.tolist() for k, v in load_file(path).items()} for path in folder.glob("*.safetensors")}
    return tensors | {path.name: path.read_text() for path in folder.glob("*.json")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dense("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("name", MODELS)
def test_converting_a_folder_is_converting_the_model_and_densifying_brings_it_back(name, tmp_path):
    model, (cls, _, rules) = dense(name), MODELS[name]
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    there = structlin.hf.convert(tmp_path / "dense", tmp_path / "out", rules, part_bytes=20000)
    here = sl.to_structured_(model, rules, weights="project")
    assert [(s.name, s.spec, s.params) for s in there] == [(s.name, s.spec, s.params) for s in here]
    assert [s.error for s in there] == pytest.approx([s.error for s in here], rel=1e-4)
    loaded = cls.from_pretrained(tmp_path / "out")
    assert_close(logits(loaded, name), logits(model, name), 1e-5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert sorted(structlin.hf.densify(tmp_path / "out", tmp_path / "back")) == sorted(s.name for s in there)
    plain = cls.from_pretrained(tmp_path / "back")
    assert [type(m) for m in plain.modules()] == [type(m) for m in dense(name).modules()]
    assert_close(logits(plain, name), logits(model, name), 1e-5)
    assert "structlin" not in (tmp_path / "back" / "config.json").read_text()


def test_the_command_prints_progress_and_a_table_and_copies_the_other_files(source, tmp_path, capfd):
    (source / "notes.txt").write_text("kept")
    assert run("convert", source, tmp_path / "out", "--rules", *RULES) == 0
    out, err = capfd.readouterr()
    assert "[1/8] model.layers.0.mlp.down_proj  error 0." in err
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["layer", "model.layers.0.self_attn.q_proj"]
    assert out.splitlines()[0].split()[-1] == "error"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    }  # fmt: skip
    assert isinstance(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj, sl.StructuredLinear
    )
    assert run("densify", tmp_path / "out", tmp_path / "back") == 0
    assert "8 layers made dense" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "dense", "out"]


def test_a_dry_run_gives_the_same_table_and_writes_nothing(source, tmp_path, capfd):
    assert run("convert", source, tmp_path / "out", "--rules", *RULES, "--dry-run") == 0
    table = capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run("convert", source, tmp_path / "out", "--rules", *RULES) == 0
    assert capfd.readouterr().out.startswith(table)


def test_drawn_weights_depend_on_the_seed_alone(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        assert run("convert", source, tmp_path / name, "--rules", *RULES, "--weights", "init", "--seed", seed) == 0
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.layers.0.mlp.up_proj.first"], c["model.layers.0.mlp.up_proj.first"])
    assert not torch.equal(a["model.layers.0.mlp.up_proj.first"], a["model.layers.1.mlp.up_proj.first"])


def test_drawn_layers_begin_without_bias_and_projected_ones_keep_it(tmp_path):
    model = dense("bert")
    torch.nn.init.ones_(model.bert.encoder.layer[0].intermediate.dense.bias)
    model.save_pretrained(tmp_path / "dense")
    for weights, bias in (("init", 0), ("project", 1)):
        rules = {"*.intermediate.*": sl.Monarch(4)}
        structlin.hf.convert(tmp_path / "dense", tmp_path / weights, rules, weights)
        state = load_file(tmp_path / weights / "model.safetensors")
        assert state["bert.encoder.layer.0.intermediate.dense.bias"].unique().tolist() == [bias]


def test_an_interrupted_conversion_goes_on_and_ends_the_same(source, tmp_path, monkeypatch, capfd):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    structlin.hf.convert(source, whole, read_rules(RULES), part_bytes=20000)
    real, calls = stream.write_bytes, []

    def interrupted(path, data):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(stream, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        structlin.hf.convert(source, cut, read_rules(RULES), part_bytes=20000)
    assert not cut.exists()
    monkeypatch.setattr(stream, "write_bytes", real)
    with pytest.raises(ValueError, match=r"\.cut\.partial is unfinished work for .*cut with other settings"):
        structlin.hf.convert(source, cut, read_rules(RULES[:1]), part_bytes=20000)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".cut.partial").glob("*.safetensors")}
    assert len(kept) == 2
    lines = []
    done = structlin.hf.convert(source, cut, read_rules(RULES), part_bytes=20000, tell=lines.append)
    assert sum("was there" in line for line in lines) == 2
    assert all(swap.error is not None for swap in done)
    assert contents(cut) == contents(whole)
    assert not (tmp_path / ".cut.partial").exists()


def test_what_cannot_be_fitted_leaves_nothing(source, tmp_path):
    inputs = {"model.layers.0.mlp.up_proj": torch.randn(3, 7)}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: inputs must be finite and of width"):
        structlin.hf.convert(source, tmp_path / "out", {"*up_proj": sl.Monarch(4)}, inputs=inputs)
    assert not list(tmp_path.glob("*out*"))


def test_the_model_is_never_held_whole(source, tmp_path):
    """Every tensor is asked for once, and no more than a part lives at a time."""
    live, peak = [], []

    class Counted(structlin.hf.convert.__globals__["Weights"]):
        def __getitem__(self, name):
            live.append(name)
            return super().__getitem__(name)

    def flushed(path, data):
        peak.append(len(live))
        live.clear()
        real(path, data)

    real = stream.write_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "write_bytes", flushed)
        patch.setitem(structlin.hf.convert.__globals__, "Weights", Counted)
        structlin.hf.convert(source, tmp_path / "out", read_rules(RULES), part_bytes=1)
    assert max(peak) == 1
    assert sum(peak) == len(load_file(source / "model.safetensors"))


def test_calibration_lowers_the_error_on_the_text(source, tmp_path, capfd):
    words = {f"w{n}": n for n in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n * n % 7}" for n in range(300)))
    rules = ["model.layers.0.mlp.up_proj=low_rank:rank=2"]
    inputs = {}
    wanted = hf.AutoModelForCausalLM.from_pretrained(source)
    layer = wanted.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, given: inputs.update(x=given[0]))
    wanted(torch.tensor([tokenizer.encode(text.read_text()).ids[:64]]))
    errors = []
    for name, more in (("plain", ()), ("fitted", ("--calibrate", text, "--calibrate-tokens", 256))):
        assert run("convert", source, tmp_path / name, "--rules", *rules, *more) == 0
        made = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[0].mlp.up_proj
        errors.append(float((made(inputs["x"]) - layer(inputs["x"])).norm().detach()))
    assert errors[1] < 0.7 * errors[0]
    assert (tmp_path / "fitted" / "tokenizer.json").exists()
    assert run("convert", source, tmp_path / "x", "--rules", *rules, "--calibrate", text) == 2
    assert "the texts have 300 tokens, 2048 are asked for; give 1 to 300" in capfd.readouterr().err


def test_rules_come_from_text_and_json(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"a": "monarch:nblocks=2", "b": None, "c": sl.LowRank(3).to_dict()}))
    assert list(read_rules([str(path), "d.*=dyad:nblocks=8", "e=none"]).items()) == [
        ("a", sl.Monarch(2)), ("b", None), ("c", sl.LowRank(3)), ("d.*", sl.Dyad(8)), ("e", None),
    ]  # fmt: skip


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def lose(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, {"format": "pt"})


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def strange(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Mine"]}')


@pytest.mark.parametrize(
    ("damage", "rules", "message"),
    [
        (truncate, RULES, "model.safetensors is missing or damaged"),
        (lose, RULES, "model.norm.weight is missing"),
        (pickle, RULES, "has no model.safetensors"),
        (strange, RULES, "architectures=['Mine']"),
        (None, ["*.mlp.*=monarch:nblocks=5"], "nblocks may be 1, 2, 4"),
        (None, ["*.mpl.*=monarch:nblocks=4"], "rule '*.mpl.*' matches no linear layer"),
        (None, ["*=monach"], "--rules: '*': unknown structure 'monach'; did you mean 'monarch'?"),
        (None, ["monarch"], "--rules: 'monarch' is given; allowed: 'glob=spec'"),
        (None, ["a=none", "a=none"], "--rules: 'a' is given twice"),
        (None, ["absent.json"], "--rules: absent.json cannot be read"),
        (None, ['{"a": null, "b": null, "a": null}'], "cannot be read: 'a' is given twice"),
        (None, ['{"a": 5}'], "'a': 5 is given; allowed: a spec as text or as an object, or null"),
        (None, ['{"a": ["x"]}'], "'a': ['x'] is given; allowed: a spec as text"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(source, tmp_path, capfd, damage, rules, message):
    if damage:
        damage(source)
    for index, rule in enumerate(rules):
        if rule.startswith("{"):
            rules = [*rules[:index], str(source / "rules.json")]
            Path(rules[index]).write_text(rule, encoding="utf-8")
    capfd.readouterr()
    assert run("convert", source, tmp_path / "out", "--rules", *rules) == 2
    assert message in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_folders_that_exist_or_are_of_the_other_kind_are_refused(source, tmp_path, capfd):
    (tmp_path / "there").mkdir()
    assert run("convert", source, tmp_path / "there", "--rules", *RULES) == 2
    assert "there exists, and nothing is overwritten" in capfd.readouterr().err
    assert run("densify", source, tmp_path / "back") == 2
    assert "is not structured" in capfd.readouterr().err
    assert run("convert", source, tmp_path / "out", "--rules", *RULES) == 0
    assert run("convert", tmp_path / "out", tmp_path / "twice", "--rules", *RULES) == 2
    assert "is quantized or structured already" in capfd.readouterr().err
    assert run("convert", tmp_path / "nowhere", tmp_path / "x", "--rules", *RULES) == 2
    assert "nowhere has no config.json" in capfd.readouterr().err


MEMORY = """
import resource, sys
import structlin as sl, structlin.hf

folder = sys.argv[1]
structlin.hf.convert(folder + "/tiny", folder + "/first", {"*.up_proj": sl.Monarch(4)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
structlin.hf.convert(folder + "/dense", folder + "/out", {"*.mlp.*": sl.Monarch(16)}, "init", part_bytes=1 << 24)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux only")
def test_converting_takes_less_memory_than_the_model(tmp_path):
    dense("llama").save_pretrained(tmp_path / "tiny")
    config = hf.LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=8, vocab_size=4096
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense", max_shard_size="50MB")
    size = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken < size / 2


def test_mixtures_are_refused_by_name(tmp_path):
    dense("llama").save_pretrained(tmp_path / "dense")
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"up_proj: btt_moe.* is a mixture of experts, which no folder"):
            structlin.hf.convert(
                tmp_path / "dense", tmp_path / "made", {"*.up_proj": sl.btt_moe(experts=4)}, "init", dry_run=dry_run
            )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
