"""The nearest member of a structure: members come back, and at any other weight nothing in the structure is nearer."""

import pytest
import torch

import structlin as sl
from structlin.nn.projection import project
from structlin.ops.lookup import collect
from structlin.plan import Plan
from structlin.testing import assert_close, error, examples, make, plain


def has_closed_form(plan):
    """One chain of one or two factors, or a sum of patterns that each hold their weights once."""
    if len(plan.terms) == 1:
        return len(plan.factors) <= 2
    return all(len(term.weights) == 1 and not term.steps[0].free for term in plan.terms)


PLANS = [(spec, shape, spec.plan(*shape)) for spec, shape in examples()]
# trained masks are searched for: tests/test_gblr.py
CLOSED = [(spec, shape) for spec, shape, plan in PLANS if has_closed_form(plan) and not spec.masks(plan)]
every_closed_form = pytest.mark.parametrize(("spec", "shape"), CLOSED, ids=str)

SHARED = [
    Plan.einsum("f i, o i -> f o", f=3, i=4, o=5),
    Plan.einsum("f i, r i, o r -> f o", f=3, i=4, r=2, o=5),
    Plan.einsum("f g i, g r i, g o r -> g o f", f=3, g=2, i=4, r=2, o=5),
    Plan.einsum("g i, g r i, o r -> o g", g=3, i=4, r=2, o=5),
    Plan.einsum("i g, r i, g o r -> g o", g=3, i=4, r=2, o=5),
]
DTYPES = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.bfloat16: 0.02,
    torch.float16: 0.003,
}


def dense(plan, factors):
    """The matrix of `factors`, straight from the plan and differentiably; the plan need not be a structure's."""
    first = next(iter(factors.values()))
    total = 0
    for term in plan.terms:
        z = torch.eye(plan.size(term.x), dtype=first.dtype).reshape(-1, *plan.shape(term.x))
        for name, step in zip(term.names, term.steps, strict=True):
            z = sl.ops.contract(z, factors[name], step.equation, backend="reference")
        z = z.reshape(-1, plan.out_features).T
        total = total + (z if term.table is None else collect(z, term.table))
    return total


def draw(plan, dtype=torch.float64):
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in plan.shapes.items()}


def test_the_closed_forms_are_more_than_one():
    assert {"dense", "low_rank", "block_diagonal", "kronecker", "monarch", "btt", "dyad"} <= {
        spec.name for spec, _ in CLOSED
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every_closed_form
def test_a_member_is_recovered(spec, shape, dtype):
    layer = make(spec, shape, "cpu", dtype, bias=False)
    weight = layer.to_dense().weight.detach()
    factors = project(layer.plan, weight)
    for name, factor in factors.items():
        assert factor.shape == layer.plan.shapes[name]
        assert factor.dtype == dtype
        assert factor.is_contiguous()
        assert not factor.requires_grad
    layer.load_state_dict(factors)
    assert_close(layer.to_dense().weight, weight, DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("plan", [*(spec.plan(*shape) for spec, shape in CLOSED), *SHARED], ids=str)
def test_the_error_of_any_weight_has_no_gradient_in_any_factor(plan, dtype):
    torch.manual_seed(1)
    weight = torch.randn(plan.out_features, plan.in_features, dtype=dtype)
    factors = {name: factor.requires_grad_() for name, factor in project(plan, weight).items()}
    others = {name: factor.requires_grad_() for name, factor in draw(plan, dtype).items()}

    def slope(factors):
        distance = (dense(plan, factors) - weight).abs().square().sum()
        return torch.cat([g.abs().flatten() for g in torch.autograd.grad(distance, tuple(factors.values()))]).max()

    assert slope(factors) < 1e-10 * slope(others)
    assert error(dense(plan, factors), weight) < min(1.0, error(dense(plan, others), weight))


@pytest.mark.parametrize("plan", SHARED, ids=str)
def test_a_member_of_a_plan_that_repeats_a_matrix_is_recovered(plan):
    weight = dense(plan, draw(plan))
    assert_close(dense(plan, project(plan, weight)), weight)


def test_the_distances_are_those_of_the_theorems():
    torch.manual_seed(0)
    weight = torch.randn(24, 16, dtype=torch.float64)

    def distance(spec):
        plan = spec.plan(24, 16)
        return (dense(plan, project(plan, weight)) - weight).norm()

    tail = torch.linalg.svdvals(weight)[4:].norm()  # Eckart and Young
    assert_close(distance(sl.LowRank(4)), tail)
    # Van Loan and Pitsianis: 24 = 4 x 6, 16 = 4 x 4, one row for each block
    rows = weight.reshape(4, 6, 4, 4).transpose(1, 2).reshape(16, 24)
    assert_close(distance(sl.Kronecker()), torch.linalg.svdvals(rows)[1:].norm())
    blocks = torch.stack([weight[6 * g : 6 * g + 6, 4 * g : 4 * g + 4] for g in range(4)])
    assert_close(distance(sl.BlockDiagonal(4)) ** 2, weight.norm() ** 2 - blocks.norm() ** 2)


def test_a_rank_beyond_the_blocks_is_filled_with_zeros():
    plan = Plan.einsum("i, r i, o r -> o", i=3, r=5, o=4)
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = project(plan, weight)
    assert_close(factors["w2"] @ factors["w1"], weight)
    assert factors["w1"].isfinite().all()


def test_both_factors_carry_half_of_the_scale():
    torch.manual_seed(0)
    factors = project(sl.LowRank(4).plan(24, 16), 100 * torch.randn(24, 16, dtype=torch.float64))
    assert_close(factors["down"].norm(), factors["up"].norm())


def test_the_zero_matrix_projects_to_zero():
    plan = sl.Monarch(2).plan(24, 16)
    assert dense(plan, project(plan, torch.zeros(24, 16))).abs().max() == 0


def test_a_weight_that_is_a_view_or_wants_a_gradient_is_not_changed():
    weight = torch.randn(16, 24, dtype=torch.float64, requires_grad=True)
    before = weight.detach().clone()
    factors = project(sl.LowRank(16).plan(24, 16), weight.T)
    assert_close(factors["up"] @ factors["down"], before.T)
    assert torch.equal(weight, before)
    lazy = torch.randn(24, 16, dtype=torch.complex128).conj()
    factors = project(sl.LowRank(16).plan(24, 16), lazy)
    assert_close(factors["up"] @ factors["down"], lazy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = torch.randn(24, 16)
    weight[5, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        project(sl.LowRank(4).plan(24, 16), weight)


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(ValueError, match=r"the weight is \(16, 24\), the plan \(24, 16\)"):
        project(sl.LowRank(4).plan(24, 16), torch.randn(16, 24))
    with pytest.raises(ValueError, match="meta device"):
        project(sl.LowRank(4).plan(24, 16), torch.randn(24, 16, device="meta"))


def test_a_projected_layer_computes_what_the_dense_one_did():
    layer = make(sl.Kronecker(), (24, 16), "cpu")
    linear = layer.to_dense()
    again = sl.StructuredLinear(16, 24, sl.Kronecker(), dtype=torch.float64)
    again.load_state_dict({**sl.project(again.plan, linear.weight), "bias": linear.bias})
    x = torch.randn(5, 16, dtype=torch.float64)
    assert_close(plain(again, x), linear(x))


@pytest.mark.parametrize("spec", [sl.Blast(4), sl.BTT(rank=2), sl.Gblr(4), sl.Monarch(nblocks=4)], ids=str)
def test_another_default_device_changes_nothing(spec):
    weight = torch.randn(16, 16)
    layers = [sl.StructuredLinear(16, 16, spec, device="cpu") for _ in range(2)]
    layers[0].project_(weight)
    with torch.device("meta"):
        layers[1].project_(weight)
    assert torch.equal(layers[0].matrix(), layers[1].matrix())
