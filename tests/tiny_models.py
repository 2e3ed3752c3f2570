"""Tiny models of Hugging Face architectures, made from configurations, with rules that structure many layers."""

from __future__ import annotations

import copy

import torch
import transformers as hf

import structlin as sl

WIDTH, VOCABULARY = 32, 64
DECODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}

MONARCH, LOW_RANK, DYAD = sl.Monarch(nblocks=4), sl.LowRank(rank=8), sl.Dyad(nblocks=4)

MODELS = {
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**DECODER, **SIZES, ffn_dim=64, word_embed_proj_dim=WIDTH),
        {"*.fc?": MONARCH, "*_proj": LOW_RANK},
    ),
    "pythia": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**DECODER, **SIZES, intermediate_size=64),
        {"*.mlp.*": DYAD, "*.attention.*": MONARCH},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4),
        {"*.mlp.*": MONARCH, "*.attn.c_*": LOW_RANK},
    ),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**DECODER, **SIZES, num_key_value_heads=2, intermediate_size=64),
        {"*.mlp.*": sl.BTT(2), "*.[qo]_proj": MONARCH, "lm_head": LOW_RANK},
    ),
    "bert": (
        hf.BertForMaskedLM,
        hf.BertConfig(**DECODER, **SIZES, intermediate_size=64),
        {"*.attention.*": LOW_RANK, "*.intermediate.*": MONARCH, "bert.*.output.dense": DYAD},
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**SIZES, intermediate_size=64, image_size=16, patch_size=8),
        {"vit.layers.*": MONARCH},
    ),
}
DECODERS = ["opt", "pythia", "gpt2", "llama"]


def dense(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The dense model, in evaluation mode."""
    torch.manual_seed(seed)
    cls, config, _ = MODELS[name]
    return cls(copy.deepcopy(config)).eval()  # a model may change its config


def structured(name: str, seed: int = 0, **how: str) -> hf.PreTrainedModel:
    """The model with structured layers, drawn anew unless ``how`` says otherwise."""
    model = dense(name, seed)
    assert len(sl.to_structured_(model, MODELS[name][2], **how)) > 3
    return model


def example(name: str) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}
