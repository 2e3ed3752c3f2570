"""Mixtures of experts: against the formula of the paper, at their faults, in models, and without reading the device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import structlin as sl
from structlin.models.gpt import GPT, GPTConfig, flops_per_token
from structlin.nn import (
    MoEFFN,
    RoutedLinear,
    routing_load,
    routing_loss,
    share_router_,
    update_balance_,
)
from structlin.ops.ragged import blocked_mm, blocked_outer, ragged_mm, ragged_outer
from structlin.spec import MIXTURES, Spec, find, parse
from structlin.testing import assert_close, check, inputs, make, mixture_examples, plain

FLOAT = torch.float64


def gradients(y, layer, x):
    return torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))


def by_the_paper(layer, x):
    """BTT of rank E, its rank axis gated between the cores (Potapczynski et al. 2024): ``sum_r B_r (g_r A_r x)``."""
    logits = x @ layer.router.weight.T
    kept, chosen = logits.topk(layer.spec.top_k, -1)
    gate = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
    first, second = layer.first[:, :, :, 0], layer.second[..., 0]  # E c f a and E f e c
    z = torch.einsum("tca,Ecfa->tcfE", x.view(-1, first.shape[1], first.shape[3]), first) * gate[:, None, None]
    return torch.einsum("tcfE,Efec->tfe", z, second).flatten(1) + layer.bias


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(16, 16), (24, 16), (16, 36), (12, 18)]), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40),
    st.integers(0, 9),
)  # fmt: skip
def test_is_btt_with_a_gated_rank(shape, experts, top_k, tokens, seed):
    layer = make(sl.btt_moe(experts, min(top_k, experts)), shape, "cpu")
    torch.manual_seed(seed)
    x = torch.randn(tokens, shape[1], dtype=FLOAT, requires_grad=True)
    y, wanted = layer(x), by_the_paper(layer, x)
    assert_close(y, wanted)
    for a, b in zip(gradients(y, layer, x), gradients(wanted, layer, x), strict=True):
        assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["dyad", "kronecker", "block_dense:nblocks=2:rank=4", "btt:cores=3", "blast:nblocks=2:rank=3"]),
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 30),
)  # fmt: skip
def test_experts_of_any_structure(of, experts, top_k, tokens):
    layer = make(sl.MoE(parse(of), experts, min(top_k, experts)), (16, 24), "cpu")
    x = inputs(layer, tokens).requires_grad_()
    y, wanted = layer(x), plain(layer, x)
    assert_close(y, wanted)
    for a, b in zip(gradients(y, layer, x), gradients(wanted, layer, x), strict=True):
        assert_close(a, b)


def test_block_sparse_experts():
    """Blocks looked up by a table, before the tokens are sorted and after they are added up."""
    for spec in (sl.Pixelfly(block_size=4, rank=2), sl.Pixelfly(block_size=4, rank=2).T):
        layer = make(sl.MoE(spec, 3, 2), (16, 16), "cpu")
        x = inputs(layer, 9)
        assert_close(layer(x), plain(layer, x))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 3))
def test_blocks_of_fixed_shape_do_the_same(counts, groups):
    ends, rows = torch.tensor(counts).cumsum(0).int(), sum(counts)
    x, y = torch.randn(groups, rows, 3, dtype=FLOAT), torch.randn(groups, rows, 2, dtype=FLOAT)
    w = torch.randn(groups, len(counts), 3, 2, dtype=FLOAT)
    assert_close(blocked_mm(x, w, ends), ragged_mm(x, w, ends))
    assert_close(blocked_outer(x, y, ends), ragged_outer(x, y, ends))


def test_products_pass_opcheck():
    x, w = (torch.randn(size, dtype=FLOAT, requires_grad=True) for size in ((2, 7, 3), (2, 3, 3, 4)))
    y, ends = torch.randn(2, 7, 4, dtype=FLOAT, requires_grad=True), torch.tensor([2, 2, 7], dtype=torch.int32)
    torch.library.opcheck(torch.ops.structlin.ragged_mm.default, (x, w, ends))
    torch.library.opcheck(torch.ops.structlin.ragged_outer.default, (x, y, ends))


@pytest.mark.parametrize("spec", [sl.btt_moe(1, 1), sl.btt_moe(4, 4), sl.dense_moe(1, 1)], ids=str)
def test_one_expert_and_all(spec):
    layer = make(spec, (24, 16), "cpu")
    x = inputs(layer, 9)
    assert_close(layer(x), plain(layer, x))
    if spec.experts == 1:
        assert_close(layer(x), layer.expert(0)(x) + layer.bias)


def test_experts_without_a_token():
    """All tokens to one expert: the others' gradients are zero, not NaN."""
    layer = make(sl.btt_moe(4, 1), (24, 16), "cpu")
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1
    x = inputs(layer, 9).abs().requires_grad_()
    assert_close(layer(x), layer.expert(2)(x) + layer.bias)
    layer(x).sum().backward()
    assert routing_load(layer)["router"].load.tolist() == [0, 0, 1, 0]
    for name in ("first", "second"):
        used = getattr(layer, name).grad.flatten(1).abs().sum(1)
        assert used[2] > 0
        assert used[[0, 1, 3]].tolist() == [0, 0, 0]


def test_no_tokens_have_a_loss():
    layer = make(sl.btt_moe(4, 2), (24, 16), "cpu")
    layer(inputs(layer, 0)).sum().backward()
    assert routing_loss(layer) == 0
    assert routing_load(layer)["router"].load.sum() == 0


def test_logits_that_are_not_finite():
    layer = make(sl.btt_moe(4, 2), (24, 16), "cpu")
    x = inputs(layer, 5)
    x[3] = torch.nan
    assert layer(x)[[0, 1, 2, 4]].isfinite().all()
    assert layer(x)[3].isnan().all()
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(ValueError, match="not finite for 1 of 5 tokens"),
    ):
        layer(x)


def test_losses_are_those_of_the_paper():
    layer = make(sl.btt_moe(4, 2), (24, 16), "cpu")
    x = inputs(layer, 9)
    layer(x)
    logits = x @ layer.router.weight.T
    chosen = F.one_hot(logits.topk(2).indices, 4).sum((0, 1)).double() / 18
    balance = 4 * (logits.softmax(1).mean(0) * chosen).sum()
    wanted = 0.01 * balance + 0.001 * logits.logsumexp(1).square().mean()
    with torch.no_grad():
        assert_close(routing_loss(layer), wanted)
    ours, theirs = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (routing_loss(layer), wanted))
    assert_close(ours, theirs)
    assert not layer.router.last.logits.requires_grad  # a graph that is kept stands in the way of a CUDA graph
    assert not layer.router.last.gate.requires_grad
    with pytest.raises(ValueError, match="once after each forward"):
        routing_loss(layer)
    load = routing_load(layer)["router"]
    assert_close(load.load, chosen.float())
    assert_close(load.entropy, torch.distributions.Categorical(logits=logits).entropy().mean())
    both = nn.Sequential(layer, copy.deepcopy(layer))
    with pytest.raises(ValueError, match=r"1.router did not run"):
        routing_loss(both)
    with pytest.raises(ValueError, match="no router"):
        routing_loss(nn.Linear(2, 2))


def test_large_logits_have_a_finite_loss():
    layer = make(sl.btt_moe(4, 2), (24, 16), "cpu")
    layer(1e4 * inputs(layer, 9))
    assert routing_loss(layer).isfinite()


def test_a_bias_balances_what_is_chosen_and_not_the_gate():
    layer = make(sl.MoE(sl.BTT(), 4, 1, balance="bias"), (24, 16), "cpu")
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2, 0] = 1e-2
    x = torch.ones(9, 16, dtype=FLOAT)
    for _ in range(12):
        y = layer(x)
        update_balance_(layer)
    assert layer.router.bias_steps[2] < layer.router.bias_steps[0]
    assert not torch.equal(y, layer.expert(2)(x) + layer.bias)  # others are chosen by now
    assert (layer.router.last.gate == 1).all()
    assert routing_loss(layer, z=0) == 0
    assert layer.half().router.bias_steps.dtype == torch.int32
    with pytest.raises(ValueError, match="balanced by a bias"):
        update_balance_(_ran(make(sl.btt_moe(4, 1), (24, 16), "cpu")))


def _ran(layer):
    layer(inputs(layer, 3))
    return layer


def test_a_router_for_a_block():
    block = nn.Sequential(make(sl.btt_moe(4, 2), (24, 16), "cpu"), nn.GELU(), make(sl.btt_moe(4, 2), (16, 24), "cpu"))
    assert share_router_(block) == ["2"]
    x = inputs(block[0], 9)
    y = block(x)
    assert len([name for name, _ in block.named_parameters() if "router" in name]) == 1
    torch.autograd.grad(y.sum() + routing_loss(block), list(block.parameters()))
    hidden, routing = F.gelu(block[0](x)), block[0].router.last
    gate = torch.zeros(9, 4, dtype=FLOAT).scatter(1, routing.logits.topk(2).indices, routing.gate)
    wanted = sum(gate[:, e, None] * block[2].expert(e)(hidden) for e in range(4)) + block[2].bias
    assert_close(block[2](hidden), wanted)
    with pytest.raises(ValueError, match="5 tokens follow a shared router that last saw 9"):
        block[2](hidden[:5])
    with pytest.raises(ValueError, match="two or more"):
        share_router_(block[0])


@pytest.mark.parametrize("spec", [sl.btt_moe(4, 2), sl.MoE(sl.Monarch(2), 4, 2, balance="bias")], ids=str)
def test_a_step_of_training_does_not_read_the_device(spec):
    """On tensors without values whatever reads one is an error: forward, losses, backward, figures."""
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32):
            layer = RoutedLinear(16, 32, spec, dtype=dtype)
            ffn = MoEFFN(32, 64, 4, 2, dtype=dtype)
            model = nn.Sequential(layer, ffn)
            y = model(torch.randn(20, 16, dtype=dtype))
            (y.float().sum() + routing_loss(model)).backward()
            assert {p.grad.shape for p in model.parameters()} == {p.shape for p in model.parameters()}
            routing_load(model)
            if spec.balance == "bias":
                update_balance_(model)


def test_the_fallback_reads_nothing_either():
    with FakeTensorMode():
        x, w = torch.randn(2, 300, 8), torch.randn(2, 4, 8, 16)
        ends = torch.zeros(4, dtype=torch.int32)
        assert blocked_mm(x, w, ends).shape == (2, 300, 16)
        assert blocked_outer(x, x, ends).shape == (2, 4, 8, 8)


def test_ffn_is_the_sum_of_its_experts():
    torch.manual_seed(0)
    ffn = MoEFFN(16, 24, 4, 2, dtype=FLOAT)
    nn.init.normal_(ffn.router.weight)
    x = torch.randn(3, 5, 16, dtype=FLOAT, requires_grad=True)
    logits = x @ ffn.router.weight.T
    kept, chosen = logits.topk(2, -1)
    gate = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
    wanted = sum(gate[..., e, None] * (F.gelu(x @ ffn.up[e]) @ ffn.down[e]) for e in range(4))
    assert_close(ffn(x), wanted)
    for a, b in zip(gradients(ffn(x), ffn, x), gradients(wanted, ffn, x), strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="width=16"):
        ffn(x[..., 1:])
    with pytest.raises(ValueError, match="top_k is at most experts"):
        MoEFFN(16, 24, 2, 4)


def test_ffn_takes_an_activation_that_autocast_runs_in_float32():
    torch.manual_seed(0)
    ffn, x = MoEFFN(16, 24, 4, 2, activation=lambda hidden: F.gelu(hidden.float())), torch.randn(20, 16)
    plain = MoEFFN(16, 24, 4, 2)
    plain.load_state_dict(ffn.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = ffn(x)
        torch.testing.assert_close(found, plain(x), rtol=0.02, atol=0.02)
    found.float().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    layer = make(sl.btt_moe(4, 2), (16, 16), "cpu")
    x = inputs(layer, 9).requires_grad_()
    wanted = torch.autograd.grad(layer(x).sum() + routing_loss(layer), (x, *layer.parameters()))
    y = checkpoint(layer, x, use_reentrant=reentrant)
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            routing_loss(layer)
        return
    for a, b in zip(torch.autograd.grad(y.sum() + routing_loss(layer), (x, *layer.parameters())), wanted, strict=True):
        assert_close(a, b, 0)


def test_results_are_the_same_bits_every_time():
    layer = make(sl.btt_moe(4, 3), (24, 16), "cpu", torch.float32)
    x = inputs(layer, 50).requires_grad_()
    for a, b in zip(gradients(layer(x), layer, x), gradients(layer(x), layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(context=8, width=16, depth=1, heads=2, vocabulary=32))


RULES = {"blocks.*.attn.*": sl.btt_moe(4, 2), "blocks.*.mlp.*": sl.MoE(sl.Monarch(2), 4, 1, balance="bias")}


def test_conversion_and_training(model):
    dense = flops_per_token(model)
    with pytest.raises(ValueError, match="no matrix to project to"):
        sl.to_structured_(model, RULES, weights="project")
    swaps = sl.to_structured_(model, RULES)
    assert [type(model.get_submodule(swap.name)) for swap in swaps] == [RoutedLinear] * 4
    saved = sum(swap.dense_flops - swap.flops for swap in swaps)
    assert flops_per_token(model) == dense - saved
    for swap in swaps:
        layer = model.get_submodule(swap.name)
        assert swap.params == sum(parameter.numel() for parameter in layer.parameters())
    windows = torch.randint(32, (4, 9))
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(8):
        losses.append(model.loss(windows))
        optimizer.zero_grad()
        (losses[-1] + routing_loss(model)).backward()
        optimizer.step()
        update_balance_(model)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"attn\.qkv: is a mixture of experts"):
        sl.to_dense_(model)
    with pytest.raises(ValueError, match=r"expert\(i\)"):
        model.blocks[0].attn.qkv.to_dense()


def test_saved_and_loaded(model, tmp_path):
    sl.to_structured_(model, RULES)
    for router in (m.router for m in model.modules() if isinstance(m, RoutedLinear)):
        nn.init.normal_(router.weight)
    model.blocks[0].mlp.up.router.bias_steps.copy_(torch.tensor([3, -2, 0, 100000]))
    sl.save(model, tmp_path / "it")
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = GPT(model.config)
        fresh.rotation = model.rotation  # no checkpoint holds it, and on the meta device it has no values
        loaded = sl.load(fresh, tmp_path / "it")
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
        windows = torch.randint(32, (2, 9))
        assert torch.equal(loaded.loss(windows), model.loss(windows))


def test_rates_are_those_of_an_expert():
    layer, base = RoutedLinear(64, 64, sl.btt_moe(4, 2)), RoutedLinear(16, 16, sl.btt_moe(4, 2))
    rates = {id(p): group["lr"] for group in sl.param_groups(layer, lr=1.0) for p in group["params"]}
    assert rates[id(layer.first)] == sl.analysis.lr_scale(layer.plan, "first") == 4
    assert rates[id(layer.router.weight)] == rates[id(layer.bias)] == 1
    rates = {id(p): group["lr"] for group in sl.param_groups(layer, lr=1.0, base=base) for p in group["params"]}
    assert rates[id(layer.first)] == 4 / 4
    assert rates[id(layer.router.weight)] == 1 / 4


def test_text_of_specs():
    spec = parse("btt_moe:experts=4:top_k=1:rank=2")
    assert spec == sl.btt_moe(4, 1, rank=2) == sl.MoE(sl.BTT(rank=2), 4, 1)
    assert parse("low_rank_moe:rank=0.125") == sl.low_rank_moe()
    assert parse("(dyad:nblocks=2+low_rank:rank=2)_moe").of == sl.Dyad(2) + sl.LowRank(2)
    assert parse("monarch_moe:nblocks=2:pad=true") == sl.MoE(sl.Monarch(2, pad=True)) == sl.MoE(sl.Monarch(2), pad=True)
    assert find("moe") is MIXTURES["moe"] is sl.MoE
    assert "moe" not in sl.STRUCTURES
    for text, error in {
        "btt_moe:experts=2:top_k=3": "top_k=3 exceeds experts=2",
        "bttt_moe": "did you mean 'btt'",
        "btt_moe:expert=2": "no parameter 'expert'",
        "btt_moe:experts=2:experts=3": "given twice",
        "btt_moe_moe": "cannot be mixtures again",
    }.items():
        with pytest.raises(ValueError, match=error):
            parse(text)
    with pytest.raises(ValueError, match="no _moe last"):
        sl.register("my_moe")


def test_a_mixture_is_refused_where_a_matrix_is_wanted():
    spec = sl.btt_moe()
    for build in (
        lambda: sl.StructuredLinear(16, 16, spec),
        lambda: (spec + sl.Dense()).plan(16, 16),
        lambda: (spec @ sl.Dense()).plan(16, 16),
        lambda: spec.T.plan(16, 16),
    ):
        with pytest.raises(ValueError, match="mixture of experts and no matrix"):
            build()
    with pytest.raises(ValueError, match="trained masks"):
        RoutedLinear(16, 16, sl.MoE(sl.Gblr()))
    with pytest.raises(ValueError, match="is no mixture"):
        RoutedLinear(16, 16, sl.Monarch())
    with pytest.raises(ValueError, match="no order"):
        RoutedLinear(16, 16, spec, dtype=torch.complex64)
    with pytest.raises(ValueError, match="cast one of them"):
        RoutedLinear(16, 16, spec)(torch.ones(2, 16, dtype=FLOAT))


def test_description_counts_what_is_visited():
    from structlin.describe import describe

    text, spec = describe(sl.btt_moe(8, 2), 64, 64), sl.btt_moe(8, 2)
    params, flops = spec.costs(64, 64)
    assert params == 8 * 2 * 8**3 + 8 * 64
    assert flops == 2 * (2 * 2 * 8**3 + 8 * 64)
    assert f"{params:,}" in text
    assert f"{flops:,} per token" in text
    assert f"params={params:,}" in repr(RoutedLinear(64, 64, spec))


def test_experts_start_as_layers_of_their_own():
    layer = RoutedLinear(1024, 256, sl.btt_moe(4, 2, rank=2), zero_last=True)
    assert abs(layer.first.std() * 32**0.5 - 1) < 0.05
    assert layer.second.abs().sum() == layer.router.weight.abs().sum() == 0


def test_check_holds_a_mixture_to_its_contract(monkeypatch):
    monkeypatch.setattr(RoutedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    spec, shape = mixture_examples()[0]
    with pytest.raises(AssertionError, match="is_the_mixture_it_says"):
        check(spec, shape)


def test_specs_survive():
    for spec, _ in mixture_examples():
        assert Spec.from_dict(spec.to_dict()) == spec


def test_a_router_that_would_not_learn_is_an_error() -> None:
    """A reentrant checkpoint runs without gradients first, and leaves gates without a graph for the layers after it."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sl.to_structured_(model, {"*": sl.btt_moe(experts=4)})
    share_router_(model)
    x = torch.randn(5, 16, requires_grad=True)
    with pytest.raises(ValueError, match="ran without gradients, so the router would not learn"):
        checkpoint(model[1], checkpoint(model[0], x, use_reentrant=True), use_reentrant=True).sum().backward()
    checkpoint(model[1], checkpoint(model[0], x, use_reentrant=False), use_reentrant=False).sum().backward()
    assert model[0].router.weight.grad is not None


def test_transforms_are_refused_and_sequences_of_several_lengths_are_not():
    layer = RoutedLinear(16, 16, sl.btt_moe(4, 2))
    nn.init.normal_(layer.router.weight)
    for transform in (torch.vmap(layer), torch.func.jacrev(layer)):
        with pytest.raises(NotImplementedError, match=r"transforms of torch\.func cannot follow"):
            transform(torch.randn(3, 2, 16))
    x = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged)
    assert torch.equal(layer(x).values(), layer(x.values()))
