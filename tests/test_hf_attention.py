"""Pixelated attention in models of transformers: the numbers of a softmax, with a cache or padding too, or errors."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_models import DECODERS, MODELS, VOCABULARY, dense, structured
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import structlin.hf
from structlin import cli
from structlin.evaluate.loading import load_model
from structlin.hf import attention
from structlin.hf.attention import ATTENTION, WHOLE
from structlin.nn import PixelatedAttention
from structlin.recipes import find
from structlin.report import records
from structlin.testing import assert_close
from structlin.train import loop
from structlin.train import model as models
from structlin.train.config import OptionError
from structlin.train.settings import override

every_model = pytest.mark.parametrize("name", MODELS)
every_decoder = pytest.mark.parametrize("name", DECODERS)


def spec_for(name):
    return PixelatedAttention(2, 1, 1, causal=name in DECODERS)


def pixelated(name):
    return structlin.hf.pixelate_attention_(dense(name), spec_for(name))


def example(name, tokens=23):
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, tokens), generator=generator)}


def logits(model, **given):
    with torch.no_grad():
        return model(**given).logits


def by_softmax(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """The definition, in float64."""
    spec = PixelatedAttention.parse(module.config.structlin_attention)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query.double() @ key.double().mT * (scaling or query.shape[-1] ** -0.5)).masked_fill(
        ~spec.mask(query.shape[2]), float("-inf")
    )
    return (scores.softmax(-1) @ value.double()).to(query.dtype).transpose(1, 2), None


@every_model
def test_a_model_attends_under_the_mask(name):
    hf.AttentionInterface.register("structlin_by_softmax", by_softmax)
    hf.AttentionMaskInterface.register("structlin_by_softmax", lambda *_, **__: None)
    model, inputs = pixelated(name), example(name)
    found = logits(model, **inputs)
    assert (found - logits(dense(name), **inputs)).abs().max() > 1e-5
    model.set_attn_implementation("structlin_by_softmax")
    assert_close(found, logits(model, **inputs), 2e-6)
    if name not in DECODERS:
        return
    model.set_attn_implementation(WHOLE)
    assert_close(logits(model, **inputs), found, 2e-6)


@every_model
def test_one_block_is_dense_attention_and_training_has_gradients(name):
    inputs = example(name)
    model = structlin.hf.pixelate_attention_(dense(name), PixelatedAttention(32, 0, 0, causal=name in DECODERS))
    assert_close(logits(model, **inputs), logits(dense(name), **inputs), 2e-6)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model.config, "attention_probs_dropout_prob"):
        model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        for dropout in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    model.train()(**inputs).logits.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) > 10


@every_decoder
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_that_without(name, cache):
    model, ids = pixelated(name), example(name, 9)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **options), without)


@every_decoder
def test_a_row_that_is_padded_computes_what_it_computes_alone(name):
    model, ids = pixelated(name), example(name, 9)["input_ids"]
    alone = logits(model, input_ids=ids)
    pads = torch.zeros(2, 3, dtype=torch.long)
    ones = torch.ones_like(ids)
    right = logits(model, input_ids=torch.cat([ids, pads], 1), attention_mask=torch.cat([ones, pads], 1))
    assert_close(right[:, :9], alone, 2e-6)
    position = torch.cat([pads, torch.arange(9).expand(2, 9)], 1)
    given = {} if name == "opt" else {"position_ids": position}  # OPT counts them itself
    left = logits(model, input_ids=torch.cat([pads, ids], 1), attention_mask=torch.cat([pads, ones], 1), **given)
    assert_close(left[:, 3:], alone, 2e-6)


def test_padding_of_an_encoder_is_not_seen():
    model, ids = pixelated("bert"), example("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    other = torch.where(mask.bool(), ids, 5)
    one, two = (logits(model, input_ids=some, attention_mask=mask)[:, :15] for some in (ids, other))
    assert torch.equal(one, two)
    assert_close(one, logits(model, input_ids=ids[:, :15]), 2e-6)


@every_model
def test_the_setting_is_saved_and_loaded(name, tmp_path):
    model, inputs = pixelated(name), example(name)
    model.save_pretrained(tmp_path)
    twin = MODELS[name][0].from_pretrained(tmp_path)
    assert twin.config._attn_implementation == ATTENTION
    assert twin.config.structlin_attention == str(spec_for(name))
    assert torch.equal(logits(twin.eval(), **inputs), logits(model, **inputs))
    again = type(model)._from_config(hf.AutoConfig.from_pretrained(tmp_path))
    assert again.config._attn_implementation == ATTENTION
    plain = MODELS[name][0].from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert_close(logits(plain, **inputs), logits(dense(name), **inputs), 2e-6)


def test_structured_layers_and_attention_are_kept_together(tmp_path):
    model = structlin.hf.pixelate_attention_(structured("llama"), spec_for("llama"))
    model.save_pretrained(tmp_path)
    twin = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(twin, **example("llama")), logits(model, **example("llama")))
    with pytest.raises(ValueError, match="push_to_hub=True would upload before"):
        pixelated("llama").save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


def test_without_structlin_loading_is_an_error_that_names_the_attention(tmp_path, monkeypatch):
    pixelated("gpt2").save_pretrained(tmp_path)
    monkeypatch.delitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, ATTENTION)
    with pytest.raises(ValueError, match=ATTENTION):
        hf.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_what_has_no_such_mask_is_refused():
    model, ids = pixelated("llama"), example("llama")["input_ids"]
    packed = torch.arange(23).expand(2, 23) % 12
    four = torch.ones(2, 1, 23, 23, dtype=torch.bool)
    for given, message in (
        ({"position_ids": packed, "use_cache": False}, "masks in its own way; allowed: plain causal or full attention"),
        ({"attention_mask": four}, r"attention_mask is torch.bool \[2, 1, 23, 23\]; allowed .* \[batch, tokens\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **given)
    model.set_attn_implementation(WHOLE)
    with pytest.raises(ValueError, match=f"an attention_mask is given; allowed with {WHOLE}: whole sequences"):
        model(input_ids=ids, attention_mask=torch.arange(23).ge(2).expand(2, 23))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=f"a cache is given; allowed with {WHOLE}"):
        model.generate(ids[:, :5], max_new_tokens=2, do_sample=False)


def test_dropout_and_other_kinds_of_attention_are_refused():
    bert = pixelated("bert").train()
    with pytest.raises(ValueError, match=r"attention dropout 0.1 is given; allowed with structlin_pixelated: 0"):
        bert(**example("bert"))
    config = hf.MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                              num_attention_heads=4, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    mistral = structlin.hf.pixelate_attention_(hf.MistralForCausalLM(config).eval(), spec_for("llama"))
    with pytest.raises(ValueError, match="masks in its own way"):
        mistral(**example("llama"))


def test_models_and_specs_that_do_not_fit_are_refused_unchanged():
    gpt2 = dense("gpt2")
    before = gpt2.config.to_dict()
    with pytest.raises(ValueError, match="the causality of the model, and GPT2LMHeadModel has layers with causal=true"):
        structlin.hf.pixelate_attention_(gpt2, PixelatedAttention(causal=False))
    with pytest.raises(ValueError, match="is no attention; allowed: pixelated"):
        structlin.hf.pixelate_attention_(gpt2, "sdpa")
    assert gpt2.config.to_dict() == before
    assert gpt2.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="ResNetModel takes no attention functions"):
        structlin.hf.pixelate_attention_(
            hf.ResNetModel(hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])), spec_for("bert")
        )
    model = hf.AutoModelForCausalLM.from_config(dense("gpt2").config, attn_implementation=ATTENTION)
    with pytest.raises(ValueError, match=r"structlin_attention=None; allowed: a spec such as 'pixelated:"):
        model.eval()(**example("gpt2"))
    changed = pixelated("bert")
    changed.config.structlin_attention = "pixelated:causal=true"
    with pytest.raises(ValueError, match="the model attends with causal=false; allowed: the same"):
        changed(**example("bert"))


def test_a_gpu_gets_the_mask_of_flex_attention_where_it_can(monkeypatch):
    """Without a GPU: which mask is made there."""
    monkeypatch.setattr(attention, "runs_flex", lambda device: True)
    config = pixelated("llama").config

    def kind(queries, keys, **given):
        return type(attention.pixelated_mask(2, queries, keys, config=config, **given)).__name__

    left, right = torch.ones(2, 9), torch.ones(2, 9)
    left[0, 0], right[0, 8] = 0, 0
    assert kind(9, 9) == kind(9, 9, attention_mask=torch.ones(2, 9)) == kind(9, 9, attention_mask=right) == "BlockMask"
    assert kind(9, 9, attention_mask=left) == kind(1, 9, q_offset=8) == kind(9, 9, q_offset=torch.tensor(0)) == "Tensor"


# recipes


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])
def test_a_recipe_trains_with_it_and_its_folder_is_read(name, tmp_path):
    text = tmp_path / "prose.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"{i} was the best of times, {i} was the worst"}) for i in range(300))
    )
    options = [
        "--data",
        str(text),
        "--cache",
        str(tmp_path / "cache"),
        "--steps",
        "6",
        "--device",
        "cpu",
        "--lr",
        "1e-2",
    ]
    setting = "pixelated:block_size=8:nfactors=1:nglobal=1"
    assert cli.main(["train", name, *options, "--attention", setting, "--out", str(tmp_path / "run")]) == 0
    (record,) = records.read(tmp_path / "run" / "record.json")
    assert record["config"]["attention"] == setting
    assert record["metrics"]["valid_loss"] < record["series"]["valid_loss"][0] + 1e-6
    assert record["metrics"]["valid_loss"] < 6.0
    ours, _, recipe = loop.load(tmp_path / "run")
    twin = load_model(tmp_path / "run" / "model")
    windows = torch.arange(40)[None]
    assert twin.config._attn_implementation == ours.config._attn_implementation == ATTENTION
    assert torch.equal(logits(twin, input_ids=windows), logits(ours, input_ids=windows))
    twin.set_attn_implementation("sdpa")
    assert (logits(twin, input_ids=windows) - logits(ours, input_ids=windows)).abs().max() > 1e-4
    assert recipe.attention == setting


def test_flops_count_the_pairs_that_are_seen():
    recipe = find("tiny_gpt2")
    less = override(recipe, {"attention": "pixelated:block_size=8:nfactors=1:nglobal=0"})
    model, _ = models.build(recipe, 512)
    cost = PixelatedAttention(8, 1, 0).cost(64)
    saved = models.flops_per_token(recipe, model) - models.flops_per_token(less, model)
    assert saved == recipe.depth * 4 * 64 * (cost.dense_pairs - cost.pairs) / 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "flash"}, "--attention: 'flash' is no attention; allowed: pixelated.*, or dense"),
        ({"attention": "pixelated:causal=false"}, "--attention: .* allowed: causal=true, as the models are decoders"),
        ({"attention": "pixelated", "dropout": "0.1"}, "--dropout: 0.1 is given; allowed with pixelated: 0"),
    ],
)
def test_recipes_refuse_what_does_not_fit(fields, message):
    with pytest.raises(OptionError, match=message):
        override(find("tiny_gpt2"), fields)
