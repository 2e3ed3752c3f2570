"""Normalised factors: the formula, for every structure, and that they behave as any layer does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import structlin as sl
from structlin import analysis
from structlin.testing import assert_close, error, examples, inputs, make, plain

# factors under trained masks are parametrized already, and normalise_ refuses them
UNMASKED = [(spec, shape) for spec, shape in examples() if not spec.masks(spec.plan(*shape))]
every_example = pytest.mark.parametrize(("spec", "shape"), UNMASKED, ids=str)


def normalised(spec, shape, dtype=torch.float64, scale=1.0):
    """A normalised layer whose factors were then multiplied by ``scale``."""
    layer = make(spec, shape, "cpu", dtype)
    sl.normalise_(layer)
    with torch.no_grad():
        for name in layer.plan.factors:
            layer.parametrizations[name].original.mul_(scale)
    return layer


def formula(layer, name):
    """The published one, with Python's max."""
    stored, gain = layer.parametrizations[name].original, layer.parametrizations[name][0].gain
    fan_in, fan_out = analysis.fan(layer.plan, name)
    sigma = (min(1, fan_out / fan_in) / fan_in / len(layer.plan.terms)) ** 0.5
    return gain * stored / max(1, stored.square().mean().sqrt().item() / sigma)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
@every_example
def test_factors_follow_the_formula(spec, shape, scale):
    layer = normalised(spec, shape, scale=scale)
    with torch.no_grad():
        for index, name in enumerate(layer.plan.factors):
            layer.parametrizations[name][0].gain.fill_(1 + index / 4)
            assert_close(getattr(layer, name), formula(layer, name))
    x = inputs(layer, 3)
    assert_close(layer(x), plain(layer, x))
    assert_close(layer.to_dense()(x), layer(x))


@every_example
def test_normalising_changes_no_output(spec, shape):
    for scale in (0.1, 1.0, 7.0):
        layer = make(spec, shape, "cpu")
        with torch.no_grad():
            for name in layer.plan.factors:
                layer.get_parameter(name).mul_(scale)
        x = inputs(layer, 3)
        before = layer(x)
        sl.normalise_(layer)
        assert_close(layer(x), before)


@every_example
def test_gradients_are_right_below_and_above_the_bound(spec, shape):
    for scale in (0.5, 3.0):
        layer = normalised(spec, shape, scale=scale)
        names = [name for name, _ in layer.named_parameters()]

        def run(x, *parameters, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

        x = inputs(layer, 3).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True, nondet_tol=1e-9)


@pytest.mark.parametrize(
    ("spec", "shape"), [(sl.Dense(), (24, 16)), (sl.BTT(2), (24, 16)), (sl.Dyad(4), (16, 24))], ids=str
)
def test_compiles_to_one_graph(spec, shape):
    layer = normalised(spec, shape, scale=3.0)
    x = inputs(layer, 5).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
@every_example
def test_every_structure_compiles_to_one_graph(spec, shape):
    test_compiles_to_one_graph(spec, shape)


@every_example
def test_nothing_is_read_back_from_the_device(spec, shape):
    """On the meta device there are no values, so whatever waits for one fails: making, forward, backward, to_dense."""
    layer = sl.StructuredLinear(shape[1], shape[0], spec, device="meta")
    sl.normalise_(layer)
    layer(torch.empty(3, shape[1], device="meta")).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.reset_parameters()
    assert layer.to_dense().weight.is_meta


@every_example
def test_state_survives(spec, shape, tmp_path):
    model = nn.Sequential(normalised(spec, shape, torch.float32, scale=3.0))
    x = inputs(model[0], 5)
    assert_close(copy.deepcopy(model)(x), model(x), 0)
    sl.save(model, tmp_path / "model")
    for device in ("cpu", "meta"):
        fresh = sl.load(nn.Sequential(nn.Linear(shape[1], shape[0], device=device)), tmp_path / "model")
        assert_close(fresh(x), model(x), 0)
        assert fresh.state_dict().keys() == model.state_dict().keys()
    structured = nn.Sequential(sl.StructuredLinear(shape[1], shape[0], spec))
    assert_close(sl.load(structured, tmp_path / "model")(x), model(x), 0)
    with pytest.raises(ValueError, match="is missing"):
        sl.load(fresh, save_plain(spec, shape, tmp_path))


def save_plain(spec, shape, folder):
    sl.save(nn.Sequential(make(spec, shape, "cpu", torch.float32)), folder / "plain")
    return folder / "plain"


def test_a_factor_cannot_outgrow_its_bound_but_by_its_gain():
    torch.manual_seed(0)
    layer = sl.StructuredLinear(64, 64, sl.Monarch(4), bias=False)
    sl.normalise_(layer)
    optimizer = torch.optim.SGD([p for n, p in layer.named_parameters() if "gain" not in n], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        (-layer(torch.randn(32, 64)).square().mean()).backward()
        optimizer.step()
    for name in layer.plan.factors:
        bound = analysis.init_std(layer.plan, name) * layer.parametrizations[name][0].gain.item()
        assert layer.parametrizations[name].original.square().mean().sqrt() > bound
        assert getattr(layer, name).square().mean().sqrt().item() == pytest.approx(bound, rel=1e-5)


def test_a_zero_factor_has_a_gradient():
    layer = sl.StructuredLinear(16, 16, sl.Monarch(2), zero_last=True)
    sl.normalise_(layer)
    layer(torch.randn(3, 16)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    assert layer.parametrizations.second.original.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(256, 256, sl.Monarch(4), dtype=dtype)
    x = inputs(layer, 5)
    before = layer(x)
    sl.normalise_(layer)
    assert {getattr(layer, name).dtype for name in layer.plan.factors} == {dtype}
    assert not layer.parametrizations.first[0].gain.is_complex()
    assert error(layer(x), before) < 0.02
    assert layer.to_dense().weight.dtype == dtype
    layer(x).abs().sum().backward()


def test_autocast_gives_the_dtype_of_a_plain_layer():
    layer = normalised(sl.Dyad(4), (16, 16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inputs(layer, 3))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_gains_learn_at_the_plain_rate_and_do_not_decay():
    layer = normalised(sl.LowRank(4), (24, 16))
    names = {parameter: name for name, parameter in layer.named_parameters()}
    groups = sl.param_groups(layer, lr=0.5, weight_decay=0.1)
    assert {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]} == {
        "bias": (0.5, 0.0),
        "parametrizations.down.original": (0.25, 0.1),
        "parametrizations.down.0.gain": (0.5, 0.0),
        "parametrizations.up.original": (1.0, 0.1),
        "parametrizations.up.0.gain": (0.5, 0.0),
    }


def test_the_optimizer_of_the_factors_stays_valid():
    layer = make(sl.Dyad(4), (16, 16), "cpu")
    before = [layer.get_parameter(name) for name in layer.plan.factors]
    sl.normalise_(layer)
    assert all(layer.parametrizations[n].original is p for n, p in zip(layer.plan.factors, before, strict=True))


def test_frozen_layers_stay_frozen():
    layer = make(sl.Dyad(4), (16, 16), "cpu").requires_grad_(False)
    sl.normalise_(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.to_dense().weight.requires_grad
    assert normalised(sl.Dyad(4), (16, 16)).to_dense().weight.requires_grad


def test_drawing_anew_and_assigning():
    layer = normalised(sl.Monarch(4), (64, 64), scale=9.0)
    layer.reset_parameters()
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_close(layer.first, make(sl.Monarch(4), (64, 64), "cpu").first)
    wanted = 5 * torch.randn_like(layer.first)
    layer.first = wanted
    assert_close(layer.first, wanted)


def test_the_dense_backend_keeps_the_weight_until_a_factor_changes():
    layer = normalised(sl.Monarch(2), (16, 16))
    layer.backend = "dense"
    x = inputs(layer, 3)
    with torch.no_grad():
        for _ in range(3):
            assert_close(layer(x), plain(layer, x))
            kept = layer._weight[1]
            layer(x)
            assert layer._weight[1] is kept
            layer.parametrizations.first.original.mul_(0.5)
            layer.parametrizations.second[0].gain.mul_(3)


def test_back_to_a_plain_layer():
    model = nn.Sequential(normalised(sl.Monarch(2), (16, 16), scale=3.0), normalised(sl.Dyad(2), (16, 16)))
    x = inputs(model[0], 3)
    before = model(x)
    for name in model[0].plan.factors:
        parametrize.remove_parametrizations(model[0], name)
    assert type(model[0]) is sl.StructuredLinear
    assert_close(model(x), before)
    assert sl.to_dense_(model) == ["0", "1"]
    assert_close(model(x), before)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="no StructuredLinear"):
        sl.normalise_(nn.Linear(4, 4))
    model = nn.Sequential(make(sl.Dyad(2), (4, 4), "cpu"), normalised(sl.Dyad(2), (4, 4)))
    with pytest.raises(ValueError, match="1: lower is parametrized already"):
        sl.normalise_(model)
    assert not parametrize.is_parametrized(model[0])


def test_a_mixture_of_experts_is_refused_and_the_rest_left_alone():
    model = nn.Sequential(sl.StructuredLinear(16, 16, sl.Monarch(4)), nn.Linear(16, 16))
    sl.to_structured_(model, {"1": sl.spec.parse("btt_moe:experts=2:top_k=1")})
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"cannot normalise the model:\n  1: is a mixture of experts"):
        sl.normalise_(model)
    with pytest.raises(ValueError, match=r"cannot guide the mixtures of experts 1"):
        sl.guide_(model, steps=2)
    assert list(model.state_dict()) == names
