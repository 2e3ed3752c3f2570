"""Models of Hugging Face transformers: the same function comes back from a folder, or an error says why it does not."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import DECODERS, MODELS, dense, example, structured
from transformers.quantizers import auto

import structlin as sl
import structlin.hf
import structlin.quantization
from structlin.hf.quantizer import GUARD
from structlin.testing import assert_close

every_model = pytest.mark.parametrize("name", MODELS)


def logits(model, name):
    with torch.no_grad():
        return model(**example(name)).logits


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@every_model
def test_a_structured_model_comes_back_the_same(name, tmp_path):
    model = structured(name)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    twin = MODELS[name][0].from_pretrained(tmp_path)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert torch.equal(logits(twin, name), logits(model, name))
    twin.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


@every_model
def test_the_densified_model_computes_the_same_and_saves_as_any_dense_one(name, tmp_path):
    model = structured(name)
    wanted = logits(model, name)
    names = sl.to_dense_(model)
    assert len(names) > 3
    assert_close(logits(model, name), wanted, 1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense(name).modules()]
    model.save_pretrained(tmp_path)
    assert "structlin" not in (tmp_path / "config.json").read_text()
    assert_close(logits(MODELS[name][0].from_pretrained(tmp_path), name), wanted, 1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_that_of_the_densified_model(name, tmp_path):
    model = structured(name)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    sl.to_dense_(model)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True, **example(name)}
    ours, theirs = loaded.generate(**how, use_cache=True), model.generate(**how, use_cache=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), 1e-5)
    assert torch.equal(ours.sequences, loaded.generate(**how, use_cache=False).sequences)


def test_loading_where_transformers_does_not_know_the_method_raises_and_names_the_import(tmp_path, monkeypatch):
    structured("llama").save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "structlin")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "structlin")
    for cls in (hf.AutoModelForCausalLM, hf.AutoModel, hf.LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"run `import structlin.hf` before loading it"):
            cls.from_pretrained(tmp_path)


@pytest.mark.slow
def test_loading_without_the_import_raises_and_names_it(tmp_path):
    structured("llama").save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert re.search("ValueError: .*import structlin.hf", run.stderr)


def test_a_loaded_model_is_a_plain_one(tmp_path):
    structured("llama").save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "transformers_weights")
    assert torch.equal(logits(copy.deepcopy(model), "llama"), logits(model, "llama"))
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    placed = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    program = torch.export.export(placed, (), {**example("llama"), "use_cache": False})
    assert torch.equal(program.module()(**example("llama"), use_cache=False).logits, placed(**example("llama")).logits)
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_shards_heads_and_bases_load(tmp_path):
    model = structured("bert")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    base = hf.AutoModel.from_pretrained(tmp_path)
    ids = example("bert")["input_ids"]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    headed = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(headed.bert.encoder.layer[0].intermediate.dense, sl.StructuredLinear)
    headless = structured("llama")
    headless.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="a LlamaModel has no layer lm_head"):
        hf.AutoModel.from_pretrained(tmp_path / "llama")


def test_normalised_factors_and_masks_come_back(tmp_path):
    model = dense("llama")
    sl.to_structured_(model, {"*.gate_proj": sl.Gblr(), "*.up_proj": sl.Monarch(4)})
    for layer in model.modules():
        if isinstance(layer, sl.StructuredLinear) and layer.spec.name == "monarch":
            sl.normalise_(layer)
    model.save_pretrained(tmp_path)
    twin = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))


def test_a_guide_and_push_to_hub_and_a_foreign_quantization_are_refused(tmp_path):
    model = structured("llama")
    with pytest.raises(ValueError, match="save, then push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    sl.guide_(model, steps=4)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj: has a guide; drop it first"):
        model.save_pretrained(tmp_path)
    dense("llama").save_pretrained(tmp_path)
    config = structlin.hf.StructlinConfig({"lm_head": sl.LowRank(4).to_dict()})
    with pytest.raises(ValueError, match="cannot structure a dense model"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_tied_head_is_refused_by_name_and_kept_by_a_none_rule(tmp_path):
    model = dense("gpt2")
    with pytest.raises(ValueError, match=r"lm_head \(64x32\): shares its weight with transformer.wte"):
        sl.to_structured_(model, {"*": sl.LowRank(4)})
    sl.to_structured_(model, {"lm_head": None, "*": sl.LowRank(4)})
    model.save_pretrained(tmp_path)
    twin = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    untied = dense("gpt2")
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    sl.to_structured_(untied, {"lm_head": sl.LowRank(4)})
    with pytest.raises(ValueError, match=r"lm_head: the config of the model ties its weight; set tie_word_embeddings"):
        untied.save_pretrained(tmp_path / "untied")


def drop(key):
    def change(tensors):
        del tensors[key]

    return change


def cut(key):
    def change(tensors):
        tensors[key] = tensors[key][:-1].contiguous()

    return change


def rank(values):
    values["quantization_config"]["layers"]["lm_head"]["rank"] = 4


def spelled(values):
    values["quantization_config"]["layers"]["lm_head"]["structure"] = "low_rnk"


def newer(values):
    values["quantization_config"] |= {"format": 2, "version": "9.0"}


def other(values):
    values["quantization_config"] |= {"streams": 3, "version": "9.0"}


def renamed(values):
    layers = values["quantization_config"]["layers"]
    layers["head"] = layers.pop("lm_head")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (drop("lm_head.up"), None, "lm_head.up is missing"),
        (drop("model.norm.weight"), None, "model.norm.weight is missing"),
        (cut("lm_head.down"), None, r"lm_head.down is \[7, 32\], its structure wants \[8, 32\]"),
        (cut("model.norm.weight"), None, r"model.norm.weight is \[31\], the model wants \[32\]"),
        (None, rank, r"lm_head.down is \[8, 32\], its structure wants \[4, 32\]"),
        (None, spelled, "lm_head: unknown structure 'low_rnk'; did you mean 'low_rank'"),
        (None, newer, r"written by structlin 9.0 and has format=2; .* pip install -U"),
        (None, other, r"written by structlin 9.0 and has entries streams; .* pip install -U"),
        (None, renamed, "a LlamaForCausalLM has no layer head, which the saved model has"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, tensors, config, message):
    structured("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if tensors:
        state = load_file(path)
        tensors(state)
        save_file(state, path, {"format": "pt"})
    if config:
        edit(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=message):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [-1, 100, 4, 0])
def test_a_truncated_file_is_named(tmp_path, keep):
    structured("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    model = structured("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a safetensors file, and nothing else is read"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_older_config_loads(tmp_path):
    """The entries that format 1 began with."""
    model = structured("llama")
    model.save_pretrained(tmp_path)

    def older(values):
        del values["quantization_config"]["normalised"]
        values["quantization_config"]["version"] = "0.0.1"

    edit(tmp_path / "config.json", older)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), logits(model, "llama"))


def test_training_resumed_from_a_folder_is_bit_equal(tmp_path):
    def train(model, optimizer, steps):
        model.train()
        for step in steps:
            ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = structured("llama")
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-2))
    train(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    twin = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    resumed = torch.optim.AdamW(sl.param_groups(twin, lr=1e-2))
    resumed.load_state_dict(torch.load(io.BytesIO(state.getvalue()), weights_only=True))
    train(model, optimizer, range(3, 6))
    train(twin, resumed, range(3, 6))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_guard_is_one_line_and_no_file_name():
    assert "import structlin.hf" in GUARD
    assert not GUARD.endswith((".safetensors", ".safetensors.index.json"))


def test_the_trainer_trains_and_saves_a_structured_model(tmp_path):
    model = structured("llama")
    before = logits(model, "llama")
    ids = torch.randint(64, (8, 8), generator=torch.Generator().manual_seed(0))
    options = hf.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="steps", save_steps=1, activation_checkpointing=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    hf.Trainer(model=model, args=options, train_dataset=data).train()
    model.eval()
    assert not torch.equal(logits(model, "llama"), before)
    twin = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))
    # from a checkpoint on, which the trainer reads by itself
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    resumed = hf.Trainer(model=again, args=options, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(again.eval(), "llama"), logits(model, "llama"))


def test_mixtures_and_odd_factors_are_not_saved_as_what_would_be_lost(tmp_path):
    model = dense("llama")
    sl.to_structured_(model, {"*.up_proj": sl.btt_moe(experts=4), "*.q_proj": sl.LowRank(rank=4)})
    with pytest.raises(ValueError, match="up_proj: is a mixture of experts, which transformers would load as a fresh"):
        model.save_pretrained(tmp_path / "mixed")
    model = dense("llama")
    sl.to_structured_(model, {"*.q_proj": sl.LowRank(rank=4)})
    structlin.quantization.quantize_factors_(model)
    with pytest.raises(ValueError, match="q_proj: down is parametrized by LowBit"):
        model.save_pretrained(tmp_path / "quantized")
    assert not list(tmp_path.glob("*/*.safetensors"))
