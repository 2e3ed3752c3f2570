"""Structured layers inside other tools: 8-bit weights, LoRA adapters, whole models traced and checkpointed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.quantization import quantize_factors_
from structlin.testing import assert_close

SPECS = [sl.Monarch(nblocks=4), sl.LowRank(rank=6), sl.Dyad(nblocks=4), sl.Blast(nblocks=2, rank=6)]


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def model(spec=SPECS[0]):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    sl.to_structured_(made, {"4": None, "*": spec})
    return made.eval()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_factors_in_8_bits_compute_nearly_the_same(spec, dtype):
    made = model(spec)
    x = torch.randn(64, 16)
    wanted = made(x)
    assert quantize_factors_(made, dtype) == ["0", "2"]
    assert (made(x) - wanted).norm() < (0.02 if dtype == torch.int8 else 0.06) * wanted.norm()
    state = made.state_dict()
    assert sum(value.dtype == dtype for value in state.values()) == 2 * len(made[0].plan.factors)
    assert_close(made[0].to_dense()(x), made[0](x), 1e-5)
    kept = {name: value for name, value in state.items() if name.endswith("original0")}
    assert all(value.element_size() == 1 and not value.requires_grad for value in kept.values())
    other = model(spec)
    quantize_factors_(other, dtype)
    other.load_state_dict(state)
    assert torch.equal(other(x), made(x))
    with torch.no_grad():
        for layer in (made[0], made[2]):
            layer.backend = "dense"  # follows a factor that is worked out anew each time
    assert_close(made(x), other(x), 1e-5)


def test_quantized_factors_follow_half_precision_and_compile():
    made = model().bfloat16()
    x = torch.randn(64, 16).bfloat16()
    wanted = made(x)
    quantize_factors_(made)
    assert made(x).dtype == torch.bfloat16
    assert (made(x) - wanted).norm() < 0.03 * wanted.norm()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), made(x), 0.02)


def test_small_factors_in_half_precision_keep_their_digits():
    made = model().half()
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.mul_(1e-3)
    wanted = made[0].matrix().float()
    quantize_factors_(made)
    assert (made[0].matrix().float() - wanted).norm() < 0.02 * wanted.norm()


def test_what_cannot_be_quantized_is_refused_and_left_alone():
    normalised = model()
    sl.normalise_(normalised)
    twice = model()
    quantize_factors_(twice)
    for made, message in (
        (normalised, "0: its factors are normalised"),
        (twice, "quantized, and cannot"),
        (nn.Sequential(sl.StructuredLinear(16, 16, SPECS[0], dtype=torch.complex64)), "is complex"),
        (nn.Sequential(nn.Linear(4, 4)), "no structured layer"),
    ):
        before = list(made.state_dict())
        with pytest.raises(ValueError, match=message):
            quantize_factors_(made)
        assert list(made.state_dict()) == before
    with pytest.raises(ValueError, match=r"dtype=torch.float16 is given; allowed: torch.int8, torch.float8_e4m3fn"):
        quantize_factors_(model(), torch.float16)


@needs("torchao")
def test_torchao_takes_the_dense_layers_and_its_rounding_is_ours():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    made = model(sl.LowRank(rank=6))
    down, x = made[0].down.detach().clone(), torch.randn(64, 16)
    wanted = made(x)
    quantize_(made, Int8WeightOnlyConfig())
    assert type(made[4].weight) is not nn.Parameter
    assert type(made[0].down) is nn.Parameter
    quantize_factors_(made)
    assert (made(x) - wanted).norm() < 0.02 * wanted.norm()
    values, scales = made[0].parametrizations.down.original0, made[0].parametrizations.down.original1
    block = (1, down.shape[1])
    theirs, zero = choose_qparams_affine(down, MappingType.SYMMETRIC, block, torch.int8, -127, 127)
    assert torch.equal(values, quantize_affine(down, block, 127 / 127 * scales[:, 0], zero, torch.int8, -127, 127))
    assert (theirs / scales[:, 0] - 1).abs().max() < 0.01


@needs("peft")
def test_lora_adapts_structured_and_dense_layers_alike(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    from structlin.peft import lora

    base, x = model(), torch.randn(8, 16)
    wanted = base(x)
    adapted = get_peft_model(base, lora(LoraConfig(r=2, target_modules=["0", "2", "4"])))
    assert torch.equal(adapted(x), wanted)
    before = {name: value.clone() for name, value in adapted.state_dict().items() if "lora" not in name}
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 6
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(adapted.state_dict()[name], value) for name, value in before.items())
    assert not torch.allclose(adapted(x), wanted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(), str(tmp_path), config=lora(LoraConfig.from_pretrained(str(tmp_path))))
    assert_close(again(x), adapted(x), 1e-6)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), wanted)
    with pytest.raises(ValueError, match=r"monarch:nblocks=4 plus an adapter is no longer monarch:nblocks=4"):
        adapted.merge_and_unload()
    convolution = nn.Sequential(nn.Conv1d(16, 16, 1))
    sl.to_structured_(convolution, {"0": sl.Monarch(nblocks=4)})
    with pytest.raises(ValueError, match="StructuredConv1d has no LoRA adapter"):
        get_peft_model(convolution, lora(LoraConfig(target_modules=["0"])))


@needs("transformers")
def test_a_whole_model_compiles_exports_and_checkpoints_its_activations():
    from tiny_models import example, structured

    made, given = structured("bert"), example("bert")
    wanted = made(**given).logits
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**given).logits, wanted, 1e-5)
    ids = given["input_ids"]
    program = torch.export.export(made, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert_close(program.module()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted, 1e-5)
    grads = []
    for on in (False, True):
        made = structured("bert").train()
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if on:
            newer = getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)
            newer({"use_reentrant": False})
        made(**given).logits.square().mean().backward()
        grads.append([parameter.grad for parameter in made.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-6)
