"""Swapping layers in place: what the rules name and nothing else, or an error that lists every obstacle."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import structlin as sl
from structlin.ops import choice
from structlin.testing import assert_close

MONARCH, DYAD, LOW_RANK = sl.Monarch(nblocks=2), sl.Dyad(nblocks=4), sl.LowRank(rank=4)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, width=16, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Twice(nn.Module):
    """One linear layer under two names, and one inside a module that has two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a
        self.inner = nn.Sequential(nn.Linear(16, 16))
        self.again = self.inner

    def forward(self, x):
        return self.again(self.b(self.inner(self.a(x))))


def kinds(model):
    return {
        name: str(module.spec) if isinstance(module, sl.StructuredLinear) else "dense"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | sl.StructuredLinear)
    }


def fingerprint(model):
    return str(model), {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}


def refusal(model, rules, **how):
    """The message of a conversion that is refused; the model must be untouched."""
    before = fingerprint(model)
    with pytest.raises(ValueError, match="cannot convert the model:") as error:
        sl.to_structured_(model, rules, **how)
    assert fingerprint(model) == before
    return str(error.value)


def tokens():
    return torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(1))


def test_the_first_matching_rule_wins_and_none_keeps_a_layer_dense():
    model = Decoder()
    conversion = sl.to_structured_(
        model, {"blocks.1.mlp.*": None, "*.mlp.0": MONARCH, "*.mlp.*": DYAD, "*.proj": LOW_RANK, "head": None}
    )
    assert kinds(model) == {
        "blocks.0.attn.qkv": "dense",
        "blocks.0.attn.proj": "low_rank:rank=4",
        "blocks.0.mlp.0": "monarch:nblocks=2",
        "blocks.0.mlp.2": "dyad:nblocks=4",
        "blocks.1.attn.qkv": "dense",
        "blocks.1.attn.proj": "low_rank:rank=4",
        "blocks.1.mlp.0": "dense",
        "blocks.1.mlp.2": "dense",
        "head": "dense",
    }
    assert [swap.name for swap in conversion] == [name for name, kind in kinds(model).items() if kind != "dense"]
    assert model(tokens()).shape == (2, 5, 32)


def test_rules_are_case_sensitive_and_match_whole_names():
    model = Decoder()
    assert "rule 'mlp' matches no linear layer" in refusal(model, {"mlp": MONARCH})
    assert "rule '*.MLP.*' matches no linear layer" in refusal(model, {"*.MLP.*": MONARCH})


def test_a_swap_says_what_it_costs():
    (swap,) = sl.to_structured_(nn.Sequential(nn.Linear(16, 24)), {"0": LOW_RANK})
    assert swap == sl.surgery.Swap("0", 16, 24, LOW_RANK, 4 * 40, 16 * 24, 2 * 4 * 40, 2 * 16 * 24)


def test_a_conversion_prints_as_a_table_with_totals():
    lines = str(sl.to_structured_(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)), {"*": LOW_RANK})).splitlines()
    assert lines[0].split() == ["layer", "shape", "spec", "params", "of", "dense", "FLOPs/token", "of", "dense", "pays"]
    assert lines[1].split()[:7] == ["0", "24x16", "low_rank:rank=4", "160", "41.7%", "320", "41.7%"]
    assert lines[-1].split() == ["total", "320", "41.7%", "640", "41.7%"]


def test_a_dry_run_reports_the_same_and_changes_nothing():
    model = Decoder()
    before, state = fingerprint(model), torch.get_rng_state()
    planned = sl.to_structured_(model, {"*.mlp.*": MONARCH}, dry_run=True)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert planned == sl.to_structured_(model, {"*.mlp.*": MONARCH})
    assert "monarch:nblocks=2" in kinds(model).values()


def test_a_dry_run_refuses_what_the_conversion_refuses():
    model = nn.Sequential(nn.Linear(16, 24))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert "NaN" in refusal(model, {"*": LOW_RANK}, weights="project", dry_run=True)


def test_every_problem_is_in_one_message():
    model = nn.Sequential(nn.Linear(16, 10), nn.Linear(10, 16), nn.Bilinear(2, 2, 2), nn.LazyLinear(4))
    message = refusal(model, {"0": DYAD, "1": sl.LowRank(99), "2": None, "nope.*": MONARCH, "3": sl.Kronecker()})
    assert message.splitlines() == [
        "cannot convert the model:",
        "  rule '2' matches no linear layer",
        "  rule 'nope.*' matches no linear layer",
        "  0 (10x16): nblocks=4 does not divide out_features=10; nblocks may be 1, 2; "
        "or pad=True, which pads 10x16 to 12x16, +20.0% entries",
        "  1 (16x10): rank=99 exceeds min(out_features, in_features); rank may be 1 to 10",
        "  3 (4x0): is a LazyLinear, whose owner may use its weight directly; keep it by a None rule",
    ]


def test_a_rule_that_earlier_rules_shadow_is_named_as_such():
    message = refusal(Decoder(), {"*": MONARCH, "head": None})
    assert "rule 'head' is never used: earlier rules match all its layers" in message


@pytest.mark.parametrize("value", ["monarch:nblocks=2", sl.Monarch, 4])
def test_a_rule_gives_a_spec_or_none(value):
    message = refusal(Decoder(), {"*": value})
    assert f"rule '*' gives {value!r}; a rule gives a spec" in message


def test_an_unknown_way_to_weights_is_refused():
    with pytest.raises(ValueError, match=r"weights='random' is unknown; allowed: 'init', 'project'"):
        sl.to_structured_(Decoder(), {"*": MONARCH}, weights="random")


def test_the_root_is_not_a_layer_of_itself():
    assert "rule '*' matches no linear layer" in refusal(nn.Linear(16, 16), {"*": MONARCH})


def test_a_tied_weight_is_refused_and_the_rest_can_be_converted_without_it():
    model = Decoder(tied=True)
    message = refusal(model, {"*": LOW_RANK})
    assert "head (32x16): shares its weight with embed; untie it first" in message
    assert message.count("\n") == 1
    sl.to_structured_(model, {"head": None, "*": LOW_RANK})
    assert model.head.weight is model.embed.weight


def test_a_shared_module_is_replaced_under_all_its_names():
    model = Twice()
    conversion = sl.to_structured_(model, {"*": MONARCH})
    assert model.a is model.b
    assert model.again is model.inner
    assert set(kinds(model).values()) == {"monarch:nblocks=2"}
    assert [swap.name for swap in conversion] == ["a", "inner.0"]
    assert sum(p.numel() for p in model.parameters()) == sum(s.params for s in conversion) + 2 * 16
    dense = sl.to_dense_(copy.deepcopy(model))
    assert dense == ["a", "b", "inner.0", "again.0"]


def test_a_shared_module_that_rules_treat_differently_is_refused():
    message = refusal(Twice(), {"a": MONARCH, "inner.0": LOW_RANK})
    assert "a, b are one layer, but the rules treat them differently" in message
    assert "inner.0, again.0 are one layer, but the rules treat them differently" in message


class Special(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def patched():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


def burdened():
    layer = nn.Linear(16, 16)
    layer.register_buffer("mask", torch.ones(16, 16))
    return layer


def quantized():
    layer = nn.Linear(16, 16, bias=False)
    layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Special(16, 16), "is a Special, whose owner may use its weight directly"),
        (lambda: nn.MultiheadAttention(16, 2).out_proj, "is a NonDynamicallyQuantizableLinear"),
        (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), "is parametrized; remove the parametrization first"),
        (lambda: weight_norm(nn.Linear(16, 16)), "has hooks or tensors of its own, which would be lost"),
        (lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "has hooks or tensors of its own"),
        (hooked, "has hooks or tensors of its own"),
        (patched, "has hooks or tensors of its own"),
        (burdened, "has hooks or tensors of its own"),
        (quantized, "has a weight of dtype torch.int8"),
    ],
)
def test_what_is_more_than_a_plain_linear_is_refused(make, reason):
    message = refusal(nn.Sequential(nn.Linear(16, 16), make()), {"*": MONARCH})
    assert f"1 (16x16): {reason}" in message
    assert message.count("\n") == 1


def test_a_transformer_encoder_layer_needs_its_fast_path_off():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    message = refusal(model, {"linear?": LOW_RANK})
    assert message.count("set_fastpath_enabled(False) first") == 2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        sl.to_structured_(model, {"linear?": LOW_RANK})
        with torch.no_grad():
            assert model.eval()(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_failure_in_the_middle_leaves_the_model_whole(monkeypatch):
    model = Decoder()
    before = fingerprint(model)
    built = []

    def fail_late(*arguments):
        built.append(arguments)
        if len(built) == 3:
            raise MemoryError
        return real(*arguments)

    real = sl.surgery._build
    monkeypatch.setattr(sl.surgery, "_build", fail_late)
    with pytest.raises(MemoryError):
        sl.to_structured_(model, {"*": LOW_RANK})
    assert fingerprint(model) == before


def test_fresh_layers_keep_device_dtype_flags_and_have_a_zero_bias():
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16, bias=False)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    sl.to_structured_(model, {"*": LOW_RANK})
    first, second = model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [first.down.requires_grad, first.up.requires_grad, first.bias.requires_grad] == [False, False, True]
    assert (first.training, second.training) == (True, False)
    assert first.bias.abs().max() == 0
    assert second.bias is None
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("spec", [LOW_RANK, MONARCH, sl.Kronecker(), sl.BlockDiagonal(4), sl.BTT(2)], ids=str)
def test_projecting_a_member_keeps_the_function_the_bias_and_the_flags(spec):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(16, 24, spec, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(layer.to_dense().requires_grad_(False).eval())
    model[0].bias.requires_grad_(True)
    sl.to_structured_(model, {"*": spec}, weights="project")
    assert_close(model[0].to_dense().weight, layer.to_dense().weight)
    assert torch.equal(model[0].bias, layer.bias)
    flags = {name: p.requires_grad for name, p in model[0].named_parameters()}
    assert flags == {name: name == "bias" for name in flags}
    assert not model[0].training


def test_a_meta_model_converts_and_does_not_project():
    model = Decoder().to("meta")
    assert "meta device" in refusal(model, {"*.mlp.*": LOW_RANK}, weights="project")
    sl.to_structured_(model, {"*.mlp.*": LOW_RANK})
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dense_again_computes_the_same_with_the_same_flags(dtype):
    model = Decoder().to(dtype)
    sl.to_structured_(model, {"*.mlp.*": MONARCH, "*.attn.*": LOW_RANK, "head": DYAD})
    for module in model.modules():
        if isinstance(module, sl.StructuredLinear) and module.bias is not None:
            nn.init.normal_(module.bias)
    model.blocks[0].mlp.requires_grad_(False).eval()
    wanted = model(tokens())
    names = [name for name, kind in kinds(model).items() if kind != "dense"]
    assert sl.to_dense_(model) == names
    assert set(kinds(model).values()) == {"dense"}
    assert_close(model(tokens()), wanted, 1e-10 if dtype == torch.float64 else 0.03)
    assert not any(p.requires_grad for p in model.blocks[0].mlp.parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    assert not model.blocks[0].mlp[0].training
    assert model.blocks[1].mlp[0].training
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_dense_again_without_structured_layers_does_nothing():
    model = Decoder()
    before = fingerprint(model)
    assert sl.to_dense_(model) == []
    assert fingerprint(model) == before


def test_dense_again_refuses_what_it_would_lose():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    sl.to_structured_(model, {"*": LOW_RANK})
    model[1].down = model[0].down
    model[2].register_forward_pre_hook(lambda module, inputs: None)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="cannot make the model dense:") as error:
        sl.to_dense_(model)
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == ["  0", "  1", "  2"]
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match=r"itself a StructuredLinear .* use its to_dense\(\)"):
        sl.to_dense_(model[0])


def test_a_converted_model_can_be_copied_pickled_and_trained():
    model = Decoder()
    sl.to_structured_(model, {"*": LOW_RANK})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()), model(tokens()))
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_layer_deep_inside_is_found_and_replaced():
    model = core = nn.Sequential()
    for _ in range(100):
        core.add_module("next", nn.Sequential())
        core = core[0]
    core.add_module("last", nn.Linear(16, 16))
    (swap,) = sl.to_structured_(model, {"*.last": MONARCH})
    assert swap.name.count(".") == 100
    assert isinstance(core.last, sl.StructuredLinear)


def test_the_table_says_what_pays_here_and_how_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    choice.forget()
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(64, 48), nn.Linear(8, 8))
    rules = {"0": sl.LowRank(rank=64), "1": sl.LowRank(rank=40), "2": sl.MoE(sl.LowRank(rank=2), 4, 1)}
    planned = sl.to_structured_(model, rules, dry_run=True)
    assert [swap.known_by for swap in planned] == ["rule", "rule", None]
    assert planned[0].speedup > 1 > planned[1].speedup
    yes, no, unknown = str(planned).splitlines()[1:4]
    assert f"yes: {planned[0].speedup:.2f}x by the rule" in yes
    assert f"no: {planned[1].speedup:.2f}x by the rule" in no
    assert unknown.endswith("  -")
    layer = sl.StructuredLinear(64, 48, sl.LowRank(rank=40))
    (tuned,) = sl.tune(layer, 256, training=False)
    times = tuned.choice.numbers["eager"]
    choice.forget()  # it stays on disk
    measured = sl.to_structured_(model, rules, dry_run=True)
    assert [swap.known_by for swap in measured] == ["rule", "measured", None]
    assert measured[1].speedup == pytest.approx(times["dense"] / times["bmm"])
    choice.forget()


def test_a_model_without_values_is_judged_for_the_device_there_is():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512))
    (swap,) = sl.to_structured_(model, {"0": sl.Monarch(nblocks=4)}, dry_run=True)
    assert swap.known_by in ("rule", "measured")
    assert swap.speedup > 0
