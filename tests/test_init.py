"""Ways to draw a layer: the output variance each promises, orthonormal blocks, and what a layer remembers of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structlin as sl
from structlin import analysis
from structlin.nn.init import INITS, draws
from structlin.testing import error, examples

WIDE = [
    (sl.Dense(), (1024, 512)),
    (sl.LowRank(rank=64), (512, 1024)),
    (sl.BlockDiagonal(nblocks=4), (1024, 512)),
    (sl.Monarch(nblocks=4), (768, 1024)),
    (sl.Monarch(nblocks=4, factors=3), (512, 1024)),
    (sl.BlockShuffle(nblocks=4), (512, 1024)),
    (sl.BlockDense(nblocks=4, rank=64), (1024, 512)),
    (sl.Dyad(nblocks=4), (512, 1024)),
    (sl.BTT(rank=4), (1024, 1024)),
    (sl.TensorTrain(cores=2, rank=8), (1024, 1024)),
    (sl.Blast(nblocks=4, rank=128), (1024, 512)),
    (sl.BlockDiagonal(4) + sl.LowRank(32), (1024, 512)),
    (sl.Monarch(4) @ sl.Monarch(4).T, (512, 512)),
]
every_init = pytest.mark.parametrize("init", INITS)
every_example = pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)


def variance(layer: sl.StructuredLinear) -> float:
    """Mean variance of the outputs, without the bias, for independent inputs of variance 1."""
    return (layer.to_dense().weight.double().square().sum() / layer.out_features).item()


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        # measured on the published code
        (sl.Dense(), (512, 256), 1 / 3),
        (sl.Dyad(nblocks=4), (512, 256), 1 / 6),
        (sl.Dyad(nblocks=4, variant="dt"), (256, 512), 1 / 6),
        (sl.Monarch(nblocks=4), (512, 512), 1 / 9),
        (sl.BlockDiagonal(nblocks=4), (512, 512), 1 / 3),
        (sl.BlockShuffle(nblocks=4), (3072, 768), 0.25),
        (sl.BlockShuffle(nblocks=4), (768, 3072), 1.0),
        (sl.BlockDense(nblocks=4, rank=64), (512, 256), 1 / 8),
        (sl.LowRank(rank=64), (512, 512), 1.0),
    ],
    ids=str,
)
def test_reference_variance_is_that_of_the_papers(spec, shape, expected):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, init="reference")
    assert variance(layer) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("spec", "shape"), WIDE, ids=str)
def test_matched_variance_is_that_of_linear(spec, shape):
    torch.manual_seed(0)
    found = [variance(sl.StructuredLinear(shape[1], shape[0], spec, init="variance_matched")) for _ in range(4)]
    assert sum(found) / 4 == pytest.approx(1 / 3, rel=0.1)
    linear = nn.Linear(shape[1], shape[0]).weight.double()
    assert sum(found) / 4 == pytest.approx((linear.square().sum() / shape[0]).item(), rel=0.1)


@pytest.mark.parametrize(("spec", "shape"), WIDE, ids=str)
def test_spectral_and_orthogonal_have_one_variance_per_factor(spec, shape):
    plan = spec.plan(*shape)
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, init="orthogonal")
    for name in plan.factors:
        rms = layer.stored(name).square().mean().sqrt().item()
        assert rms == pytest.approx(analysis.init_std(plan, name), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
@every_example
def test_orthogonal_blocks_have_equal_singular_values(spec, shape, dtype):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, dtype=dtype, init="orthogonal")
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for name, (_, step) in layer.plan.factors.items():
        fan_in, fan_out = analysis.fan(layer.plan, name)
        order = [step.w.index(axis) for axis in (*step.group, *step.out, *step.contract)]
        blocks = layer.stored(name).detach().to(wide).permute(order).reshape(-1, fan_out, fan_in)
        singular = torch.linalg.svdvals(blocks)
        expected = torch.full_like(singular, (fan_out / fan_in / len(layer.plan.terms)) ** 0.5)
        assert error(singular, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_orthogonal_draws_differ_and_favour_no_sign():
    torch.manual_seed(0)
    entries = torch.stack([sl.StructuredLinear(4, 4, sl.Dense(), init="orthogonal").weight for _ in range(400)])
    assert entries.mean(0).abs().max() < 0.12  # five standard deviations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
@every_init
@pytest.mark.parametrize("spec", [sl.Dense(), sl.Monarch(4), sl.Dyad(4), sl.BlockShuffle(4)], ids=str)
def test_every_dtype_starts_at_one_scale(spec, init, dtype):
    def scales(dtype: torch.dtype) -> list[float]:
        torch.manual_seed(0)
        layer = sl.StructuredLinear(512, 256, spec, bias=False, dtype=dtype, init=init)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return [p.to(wide).abs().square().mean().item() for p in layer.parameters()]

    assert scales(dtype) == pytest.approx(scales(torch.float32), rel=0.03)


@every_init
@every_example
def test_zero_last_starts_at_zero_and_learns(spec, shape, init):
    layer = sl.StructuredLinear(shape[1], shape[0], spec, init=init, zero_last=True)
    y = layer(torch.randn(5, shape[1]))
    assert y.abs().max() == 0
    y.sum().backward()
    for term in layer.plan.terms:
        assert layer.stored(term.names[-1]).grad.abs().max() > 0
        assert all(layer.stored(name).abs().max() > 0 for name in term.names[:-1])


def test_bias_is_zero_unless_the_paper_draws_it():
    for init in INITS:
        for spec, drawn in ((sl.Monarch(4), init == "reference"), (sl.BTT(), False), (sl.BlockShuffle(4), False)):
            assert (sl.StructuredLinear(64, 64, spec, init=init).bias.abs().max() > 0) == drawn
    bias = sl.StructuredLinear(64, 4096, sl.Dense(), init="reference").bias
    assert 0.12 < bias.abs().max() <= 0.125  # 1 / sqrt(64)


@every_example
def test_every_draw_names_what_the_layer_has(spec, shape):
    plan = spec.plan(*shape)
    for init in INITS:
        assert plan.factors.keys() <= draws(spec, plan, init).keys() <= {*plan.factors, "bias"}


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (sl.BlockDiagonal(4) + sl.LowRank(64), (512, 512), 1 / 3 + 1),
        (sl.Dyad(4) + sl.Monarch(4) + sl.Monarch(4), (512, 512), 1 / 6 + 2 / 9),
        (sl.Monarch(4) @ sl.Monarch(4), (512, 512), 1 / 81),
        (sl.Product((sl.Dense(), sl.BlockShuffle(4)), width=256), (512, 1024), 1 / 3),
        (sl.Dyad(4).T, (512, 256), (512 / 256) ** -1 / 6),
        ((sl.BlockDiagonal(4) + sl.BlockShuffle(4)).T, (256, 512), (1 / 3 + 0.5) * 2),
    ],
    ids=str,
)
def test_reference_is_passed_through_sums_products_and_transposes(spec, shape, expected):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, init="reference")
    assert variance(layer) == pytest.approx(expected, rel=0.06)


def test_reference_maps_the_names_of_the_parts():
    plan = (sl.LowRank(2) + sl.Monarch(2) + sl.LowRank(4)).plan(16, 24)
    drawn = draws(sl.LowRank(2) + sl.Monarch(2) + sl.LowRank(4), plan, "reference")
    assert drawn["down"] == drawn["down1"] == ("normal", 24**-0.5)
    assert drawn["up1"] == ("normal", 0.5)
    assert drawn["first"][0] == "uniform"
    assert drawn["bias"] == ("uniform", 16**-0.5)  # of the Monarch matrix, the only one whose code draws it
    product = sl.Dense() @ sl.Monarch(2)
    drawn = draws(product, product.plan(16, 24), "reference")
    assert drawn["weight"] == drawn["bias"] == ("uniform", 0.25)
    assert drawn["first"] == ("uniform", 12**-0.5)
    turned = product.T
    drawn = draws(turned, turned.plan(24, 16), "reference")
    assert (drawn["weight"], drawn["first"]) == (("uniform", 0.25), ("uniform", 12**-0.5))
    assert "bias" not in drawn


@pytest.mark.parametrize(
    ("spec", "zero"),
    [
        (sl.BlockDiagonal(4) + sl.LowRank(2) + sl.Monarch(2), ["blocks", "second", "up"]),
        (sl.LowRank(4) @ sl.Monarch(2), ["up"]),
        (sl.Monarch(2) @ sl.LowRank(4).T, ["second"]),
        (sl.Monarch(2).T, ["first"]),
        ((sl.Dyad(4) + sl.LowRank(2)).T, ["down", "lower", "upper"]),
    ],
    ids=str,
)
@every_init
def test_zero_last_is_the_factor_that_writes_the_output(spec, zero, init):
    layer = sl.StructuredLinear(16, 16, spec, init=init, zero_last=True)
    assert sorted(name for name in layer.plan.factors if not layer.get_parameter(name).any()) == zero


def test_default_is_spectral_and_draws_what_it_always_did():
    torch.manual_seed(0)
    layer = sl.StructuredLinear(64, 64, sl.Monarch(4))
    torch.manual_seed(0)
    for name in layer.plan.factors:
        expected = torch.empty(layer.plan.shapes[name]).normal_(std=analysis.init_std(layer.plan, name))
        assert torch.equal(layer.stored(name), expected)


@every_init
def test_a_layer_remembers_how_it_was_drawn(init):
    layer = sl.StructuredLinear(64, 64, sl.Dyad(4), init=init, zero_last=True)
    plain = sl.StructuredLinear(64, 64, sl.Dyad(4))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert ("init=" in repr(layer)) == (init != "spectral")
    assert "zero_last=True" in repr(layer)
    assert "init=" not in repr(plain)
    assert "zero_last" not in repr(plain)
    twin = copy.deepcopy(layer)
    twin.reset_parameters()
    assert (twin.init, twin.zero_last) == (init, True)
    assert twin.upper.abs().max() == twin.lower.abs().max() == 0
    meta = sl.StructuredLinear(64, 64, sl.Dyad(4), init=init, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    torch.manual_seed(0)
    meta.reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(meta.lower, sl.StructuredLinear(64, 64, sl.Dyad(4), init=init).lower)


def test_a_converted_model_is_drawn_as_asked():
    def convert(init: str) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        sl.to_structured_(model, {"*": sl.Dyad(4)}, init=init)
        return model

    assert variance(convert("reference")[2]) == pytest.approx(1 / 6, rel=0.05)
    assert variance(convert("orthogonal")[0]) == pytest.approx(1, rel=0.2)
    assert convert("orthogonal")[0].init == "orthogonal"


def test_an_unknown_rule_is_refused_in_words():
    wanted = "init='orthogonl' is unknown; did you mean 'orthogonal'\\? allowed: spectral, variance_matched, reference"
    with pytest.raises(ValueError, match=wanted):
        sl.StructuredLinear(64, 64, sl.Dyad(4), init="orthogonl")
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=wanted):
        sl.to_structured_(model, {"*": sl.Dyad(4)}, init="orthogonl")
    assert type(model[0]) is nn.Linear
