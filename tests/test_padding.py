"""Widths that a structure does not have: refused with what would do, or padded exactly where ``pad=True`` asks."""

import dataclasses
import itertools
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin as sl
from structlin import analysis, padding
from structlin.describe import describe
from structlin.nn.least_squares import matrix
from structlin.plan import Plan
from structlin.spec import STRUCTURES, Spec, parse, register
from structlin.testing import assert_close, error, examples, inputs, make, padded_examples, plain

modest = settings(max_examples=25, deadline=None, derandomize=True, database=None)
padded = pytest.mark.parametrize(("spec", "shape"), padded_examples(), ids=str)


def whole(layer):
    """The matrix of the terms with its padding, from the plan."""
    plan = dataclasses.replace(layer.plan, kept=None)
    factors = {name: layer.get_parameter(name).detach() for name in plan.factors}
    return torch.stack([matrix(plan, term, factors) for term in plan.terms]).sum(0)


def fits(spec, shape):
    try:
        return spec.plan(*shape).kept is None
    except ValueError:
        return False


def test_all_structures_but_those_of_any_width_have_a_padded_example():
    assert STRUCTURES.keys() - {spec.name for spec, _ in padded_examples()} == {"dense", "gblr", "low_rank"}


@padded
def test_without_padding_the_error_says_what_padding_takes(spec, shape):
    plan = spec.plan(*shape)
    assert plan.kept == shape == (plan.out_features, plan.in_features)
    with pytest.raises(ValueError, match=re.escape(f"; or pad=True, which pads {padding.described(plan)}")) as refusal:
        dataclasses.replace(spec, pad=False).plan(*shape)
    assert str(refusal.value).count("pad=True") == 1
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_widths_that_fit_are_left_alone(spec, shape):
    assert dataclasses.replace(spec, pad=True).plan(*shape) == spec.plan(*shape)


@padded
def test_a_padded_layer_is_the_first_rows_and_columns(spec, shape):
    layer = make(spec, shape, "cpu")
    dense = layer.to_dense()
    assert_close(dense.weight, whole(layer)[: shape[0], : shape[1]])
    assert not (dense.weight == 0).all(0).any(), "an input is dropped"
    assert not (dense.weight == 0).all(1).any(), "an output is dead"
    x = inputs(layer, 2, 3)
    for bias in (True, False):
        layer = make(spec, shape, "cpu", bias=bias)
        assert layer(x).is_contiguous()
        assert_close(layer(x), plain(layer, x))
    assert layer(x).view(6, -1).shape == (6, shape[0])


@given(data=st.data(), name=st.sampled_from(sorted({spec.name for spec, _ in padded_examples()})))
@settings(modest, max_examples=150)
def test_padding_takes_the_smallest_matrix_without_dead_features(data, name):
    base, _ = data.draw(st.sampled_from(list(STRUCTURES[name].examples())))
    spec = dataclasses.replace(base, pad=True)
    shape = data.draw(st.integers(1, 26)), data.draw(st.integers(1, 26))
    try:
        plan = spec.plan(*shape)
    except ValueError as refusal:
        assert "padding does not help" in str(refusal)  # noqa: PT017
        return
    assert padding.unlinked(plan) == (0, 0)
    (rows, columns), multiples = plan.padded, spec.multiples(*shape)
    smaller = [
        (r, c)
        for r, c in itertools.product(range(shape[0], 2 * rows + 1), range(shape[1], 2 * columns + 1))
        if r * c < rows * columns and fits(base, (r, c)) and r % multiples[0] == c % multiples[1] == 0
    ]
    assert all(
        padding.unlinked(dataclasses.replace(base.plan(*s), kept=shape)) != (0, 0) for s in smaller if s != shape
    )
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=torch.float64)
    weight = layer.to_dense().weight.detach()
    assert ((weight != 0).sum() / weight.numel()).item() == pytest.approx(analysis.density(plan))
    assert weight.any(0).all() and weight.any(1).all()  # noqa: PT018


@pytest.mark.parametrize("spec", [spec for spec, _ in examples() if spec.name != "pixelfly"], ids=str)
def test_every_shape_that_a_structure_has_is_of_its_multiples(spec):
    """Or padding would miss it. Pixelfly leaves out the rare widths whose cells cut blocks evenly."""
    for shape in itertools.product(range(1, 25), repeat=2):
        if fits(spec, shape):
            for narrower in ((1, 1), (shape[0] // 2 + 1, shape[1] // 2 + 1), shape):
                rows, columns = spec.multiples(*narrower)
                assert shape[0] % rows == shape[1] % columns == 0


def test_blocks_that_lie_in_the_padding_would_be_dead():
    """16 blocks of 25 x 7: with 112 inputs for 100 the last block would have outputs and no input."""
    plan = sl.BlockDiagonal(16, pad=True).plan(400, 100)
    assert plan.padded == (432, 112)
    naive = dataclasses.replace(sl.BlockDiagonal(16).plan(400, 112), kept=(400, 100))
    assert padding.unlinked(naive) == (25, 0)
    assert padding.unlinked(naive.T) == (0, 25)
    pixelfly = sl.Pixelfly(32, 16, 2)
    assert sl.Pixelfly(32, 16, 2, pad=True).plan(3072, 768).padded == (4096, 1024)
    assert padding.unlinked(dataclasses.replace(pixelfly.plan(3072, 1024), kept=(3072, 768)))[0] == 768


def test_what_padding_costs_is_counted_and_shown():
    spec = sl.Monarch(nblocks=4, pad=True)
    plan, exact = spec.plan(100, 100), sl.Monarch(nblocks=4).plan(112, 112)
    assert plan.padded == (112, 112)
    for cost in (analysis.num_params, analysis.flops, analysis.saved_activations):
        assert cost(plan) == cost(exact)
    assert analysis.traffic(plan, 8) == analysis.traffic(exact, 8) + 2 * 8 * 2 * (100 + 112)
    assert analysis.compute(plan) == analysis.flops(exact) / (2 * 100 * 100)
    text = "100x100 to 112x112, +25.4% entries"
    assert f"padded {text}" in repr(sl.StructuredLinear(100, 100, spec))
    described = describe(spec, 100, 100)
    assert re.search(rf"^padding +{re.escape(text)}$", described, re.M)
    assert "pad the input from 100 to 112" in described
    assert "cut the output from 112 to 100" in described
    assert "pad" not in describe(spec, 112, 112).partition("\n")[2]
    assert sl.explain(sl.StructuredLinear(100, 112, spec), 8)[0].what == "pad the input from 100 to 112"


def test_conversion_shows_the_padding_and_the_error_offers_it():
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 16))
    with pytest.raises(ValueError, match=r"0 \(20x30\): nblocks=4 .*; or pad=True, which pads 20x30 to 20x32, \+6\.7%"):
        sl.to_structured_(model, {"*": sl.BlockDiagonal(4)})
    done = sl.to_structured_(model, {"*": sl.BlockDiagonal(4, pad=True)}, weights="project")
    assert [swap.padded for swap in done] == [(20, 32), None]
    assert "20x30 padded to 20x32" in str(done)
    assert [swap.params for swap in done] == [20 * 32 // 4, 20 * 16 // 4]
    x = torch.randn(5, 30)
    y = model(x)
    assert sl.to_dense_(model) == ["0", "1"]
    torch.testing.assert_close(model(x), y)


def test_through_a_checkpoint(tmp_path):
    def dense():
        return torch.nn.Sequential(torch.nn.Linear(30, 20))

    model = dense()
    sl.to_structured_(model, {"*": sl.Dyad(4, pad=True)})
    sl.save(model, tmp_path / "padded")
    loaded = sl.load(dense(), tmp_path / "padded")
    assert loaded[0].spec == sl.Dyad(4, pad=True)
    x = torch.randn(3, 30)
    assert torch.equal(loaded(x), model(x))


def test_learning_rates_and_optimizer():
    model = torch.nn.Sequential(sl.StructuredLinear(30, 20, sl.Monarch(2, pad=True)))
    optimizer = torch.optim.Adam(sl.param_groups(model, lr=1e-2))
    x, y = torch.randn(64, 30), torch.randn(64, 20)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss := (model(x) - y).square().mean())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


# text, sums, products


@pytest.mark.parametrize(
    "text",
    [
        "monarch:nblocks=4:pad=true",
        "dense:pad=true",
        "(monarch:nblocks=4+low_rank:rank=2):pad=true",
        "(low_rank:rank=3@8@monarch:nblocks=2):pad=true",
        "(dyad:nblocks=4.T):pad=true",
        "((monarch:nblocks=4@block_diagonal:nblocks=2).T):pad=true",
    ],
)
def test_text_of_padded_specs(text):
    spec = parse(text)
    assert spec.pad
    assert str(spec) == text
    assert Spec.from_dict(spec.to_dict()) == spec == eval(repr(spec), vars(sl))
    twice = parse(f"{text}.T").T
    assert twice == spec
    assert "pad" not in str(dataclasses.replace(spec, pad=False))
    assert "pad" not in dataclasses.replace(spec, pad=False).to_dict()


def test_what_is_made_of_specs_pads_as_a_whole():
    one, other = sl.Monarch(4, pad=True), sl.LowRank(2)
    total, transposed = one + other, one.T
    assert total == sl.Sum((sl.Monarch(4), other), pad=True)
    assert str(one + other + sl.Dyad(4)) == "(monarch:nblocks=4+low_rank:rank=2+dyad:nblocks=4):pad=true"
    assert transposed == sl.Transpose(sl.Monarch(4), pad=True)
    assert transposed.T.pad
    assert transposed.T.nblocks == 4
    assert (one @ other).plan(30, 50).padded == (32, 50)
    assert parse("monarch:nblocks=4:pad=true+low_rank:rank=2") == total


@pytest.mark.parametrize("text", ["(dyad:nblocks=4):pad=yes", "(dyad:nblocks=4):nblocks=2"])
def test_nothing_else_follows_a_parenthesis(text):
    with pytest.raises(ValueError, match="parenthesis that is not closed, or text after it"):
        parse(text)


def test_padded_plans_add_up_only_when_padded_alike():
    plan = sl.Monarch(4, pad=True).plan(30, 20)
    alike = dataclasses.replace(sl.LowRank(2).plan(*plan.padded).apart(plan), kept=plan.kept)
    assert (plan + alike).kept == (30, 20)
    with pytest.raises(ValueError, match="pad the sum"):
        plan + dataclasses.replace(alike, kept=None)
    with pytest.raises(ValueError, match="pad the product"):
        plan @ sl.LowRank(2).plan(20, 20)
    for kept in (plan.padded, (30, 999), (0, 20)):
        with pytest.raises(ValueError, match="can keep fewer rows or columns"):
            dataclasses.replace(plan, kept=kept)


# projection


@padded
def test_a_member_of_a_padded_family_comes_back(spec, shape):
    if spec.name == "blast":
        pytest.skip("has no closed form, padded or not")
    layer = make(spec, shape, "cpu", bias=False)
    weight = layer.to_dense().weight.detach()
    layer.load_state_dict(sl.project(layer.plan, weight))
    # where weights are shared nothing is known in closed form about a matrix with missing entries
    shared = any(step.free for _, step in layer.plan.factors.values())
    assert error(layer.to_dense().weight, weight) < (1e-3 if shared else 1e-10)


@pytest.mark.parametrize("spec", [sl.Kronecker(in_dims=(8, 3)), sl.TensorTrain(rank=2, out_dims=(4, 4))], ids=str)
def test_the_padding_is_free_in_a_projection(spec):
    """Zeros there would count as entries to fit; left free, what is kept comes nearer."""
    torch.manual_seed(0)
    plan = dataclasses.replace(spec, pad=True).plan(15, 22)
    rows, columns = plan.padded
    weight = torch.randn(15, 22, dtype=torch.float64)
    zeros = torch.nn.functional.pad(weight, (0, columns - 22, 0, rows - 15))

    def distance(factors):
        return error(matrix(dataclasses.replace(plan, kept=None), plan.terms[0], factors)[:15, :22], weight)

    assert distance(sl.project(plan, weight)) < distance(sl.project(dataclasses.replace(plan, kept=None), zeros)) - 1e-3


@pytest.mark.parametrize(
    "spec", [sl.Monarch(2), sl.Dyad(4), sl.Kronecker(in_dims=(5, 3)), sl.BlockDense(2, 4)], ids=str
)
def test_inputs_of_the_layer_weight_a_padded_projection(spec):
    spec, shape = dataclasses.replace(spec, pad=True), (23, 14)
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(60, shape[1], dtype=torch.float64) * torch.linspace(0.1, 3, shape[1], dtype=torch.float64)
    layer, errors = make(spec, shape, "cpu", bias=False), []
    for given_inputs in (None, x):
        layer.load_state_dict(sl.project(layer.plan, weight, given_inputs))
        errors.append(error(layer(x), x @ weight.T))
    assert errors[1] < 0.99 * errors[0]


# the space of einsums


@pytest.mark.parametrize("width", [769, 2039, 50257])
def test_einsum_pads_to_the_next_width_that_has_the_digits(width):
    """The published code rounds each digit: of 2048 inputs it ignores 23 at (1/2, 1/2) and writes 23 constants."""
    with pytest.raises(ValueError, match=r"has no factors near its powers .*; or pad=True"):
        sl.Einsum().plan(width, 768)
    plan = sl.Einsum(pad=True).plan(width, 768)
    assert (plan.out_features, plan.in_features) == (width, 768)
    rows = plan.padded[0]
    assert width < rows < 1.01 * width
    assert not any(fits(sl.Einsum(), (between, 768)) for between in range(width, rows))


# structures defined elsewhere


@pytest.fixture
def registry():
    before = dict(STRUCTURES)
    yield STRUCTURES
    STRUCTURES.clear()
    STRUCTURES.update(before)


def test_a_structure_defined_elsewhere_pads_without_a_line_for_it(registry):
    @register("thirds")
    class Thirds(Spec):
        def plan(self, out_features, in_features):
            if out_features % 3 or in_features % 3:
                raise ValueError("both widths must be multiples of 3")
            return Plan.einsum("g i, g o i -> g o", g=3, i=in_features // 3, o=out_features // 3)

    assert Thirds(pad=True).plan(17, 10).padded == (18, 12)
    with pytest.raises(ValueError, match=r"multiples of 3; or pad=True, which pads 17x10 to 18x12, \+27\.1% entries"):
        Thirds().plan(17, 10)
    assert parse("thirds:pad=true") == Thirds(pad=True)
    assert repr(Thirds(pad=True)) == "Thirds(pad=True)"


def test_where_padding_does_not_help_the_error_says_so():
    with pytest.raises(ValueError, match="nfactors may be 1 to 2; padding does not help"):
        sl.Pixelfly(2, 4, 3, pad=True).plan(16, 8)
    with pytest.raises(ValueError, match=r"nfactors may be 1 to 2$"):
        sl.Pixelfly(2, 4, 3).plan(16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [sl.Monarch(nblocks=5, pad=True), sl.Dyad(nblocks=4, pad=True)])
def test_padded_layers_are_fitted_to_inputs_in_every_dtype(spec, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(23, 17, dtype=dtype), torch.randn(50, 17, dtype=dtype)
    layer = sl.StructuredLinear(17, 23, spec, bias=False, dtype=dtype).project_(weight, inputs=x)
    exact = sl.StructuredLinear(17, 23, spec, bias=False, dtype=torch.float64)
    exact.project_(weight.double(), inputs=x.double())
    gap = [(x.double() @ (weight.double() - each.matrix().double()).T).norm() for each in (layer, exact)]
    assert gap[0] <= 1.02 * gap[1]


def test_trained_masks_are_not_fitted_where_there_is_padding():
    model = torch.nn.Sequential(torch.nn.Linear(11, 7))
    with pytest.raises(ValueError, match="is padded, and trained masks are fitted without padding"):
        sl.to_structured_(model, {"*": sl.Gblr(components=4, rank=2, pad=True)}, weights="project")
    assert type(model[0]) is torch.nn.Linear
