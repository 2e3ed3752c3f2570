"""Costs, ranks and scales, against numbers worked out by hand and against matrices of random factors."""

import pytest
import torch

import structlin as sl
from structlin import analysis
from structlin.plan import Plan

LOW_RANK = Plan.einsum("i, r i, o r -> o", names=["down", "up"], i=10, r=3, o=7)
KRONECKER = Plan.einsum("b a, d a, e b -> e d", names=["right", "left"], a=2, b=3, d=5, e=7)
MONARCH = sl.Monarch(nblocks=2).plan(24, 16)
DYAD = sl.Dyad(nblocks=4).plan(24, 16)
TRAIN = Plan.einsum("a b c, a d r, r b e s, s c f -> d e f", a=2, b=3, c=2, d=3, e=2, f=3, r=2, s=3)
ALL = [LOW_RANK, KRONECKER, MONARCH, DYAD, TRAIN]


@pytest.mark.parametrize(
    ("plan", "params", "flops"),
    [
        (LOW_RANK, 30 + 21, 2 * (30 + 21)),
        # the right factor acts on each of b = 3 slices, the left one on each of d = 5
        (KRONECKER, 10 + 21, 2 * (3 * 10 + 5 * 21)),
        (MONARCH, 2 * 2 * 4 * 8 + 2 * 12 * 2 * 4, 2 * (128 + 192)),
        (DYAD, 2 * 24 * 16 // 4, 2 * 2 * 24 * 16 // 4),
        # b c = 6 slices; c d = 6 slices; d e = 6 slices
        (TRAIN, 12 + 36 + 18, 2 * (6 * 12 + 6 * 36 + 6 * 18)),
    ],
    ids=str,
)
def test_parameters_and_flops_by_hand(plan, params, flops):
    assert analysis.num_params(plan) == params
    assert analysis.flops(plan) == flops
    assert analysis.compute(plan) == flops / (2 * plan.in_features * plan.out_features)


def test_a_dense_plan_costs_what_a_matrix_costs():
    plan = sl.Dense().plan(24, 16)
    assert analysis.compute(plan) == 1
    assert analysis.flops(plan) == 2 * 24 * 16
    assert analysis.traffic(plan, tokens=5, itemsize=4) == 4 * (5 * (16 + 24) + 24 * 16)
    assert analysis.saved_activations(plan) == 16
    assert analysis.lr_scale(plan, "weight") == 1
    assert analysis.init_std(plan, "weight") == (1 / 16) ** 0.5


def test_traffic_counts_every_operand_and_result_once():
    assert analysis.traffic(LOW_RANK, tokens=11, itemsize=2) == 2 * (11 * (10 + 3) + 30 + 11 * (3 + 7) + 21)
    assert analysis.traffic(DYAD, tokens=11, itemsize=8) == 8 * 2 * (11 * (16 + 24) + 96)
    assert analysis.traffic(LOW_RANK, tokens=0) == 2 * (30 + 21)


def test_saved_activations_are_the_input_and_the_intermediates():
    assert analysis.saved_activations(LOW_RANK) == 10 + 3
    assert analysis.saved_activations(KRONECKER) == 6 + 3 * 5
    assert analysis.saved_activations(DYAD) == 16
    assert analysis.saved_activations(TRAIN) == 12 + 3 * 2 * 3 * 2 + 2 * 3 * 2 * 3


@pytest.mark.parametrize("plan", ALL, ids=str)
def test_the_transposed_plan_has_the_parameters_and_the_rank(plan):
    assert analysis.num_params(plan.T) == analysis.num_params(plan)
    assert analysis.rank_bound(plan.T) == analysis.rank_bound(plan)


@pytest.mark.parametrize(
    ("plan", "rank"),
    [
        (LOW_RANK, 3),
        (KRONECKER, 2 * 3),
        (Plan.einsum("g i, g o i -> g o", g=3, i=2, o=5), 6),
        (Plan.einsum("f i, r i, o r -> f o", f=3, i=4, r=2, o=5), 3 * 2),
        (Plan.einsum("k i, k r i, o k r -> o", k=3, i=4, r=2, o=9), 6),
        (LOW_RANK + Plan.einsum("i, s i, o s -> o", names="ab", i=10, s=2, o=7), 5),
        (Plan.einsum("a b, r a c, c r b d -> d", a=2, b=2, c=3, d=9, r=1), 4),
    ],
    ids=str,
)
def test_rank_bound_is_the_minimum_cut_and_random_factors_reach_it(plan, rank):
    assert analysis.rank_bound(plan) == rank
    torch.manual_seed(0)
    total = 0
    for term in plan.terms:
        z = torch.eye(plan.in_features, dtype=torch.float64).reshape(-1, *plan.shape(term.x))
        for step in term.steps:
            factor = torch.randn(plan.shape(step.w), dtype=torch.float64)
            z = sl.ops.contract(z, factor, step.equation, backend="reference")
        total = total + z.reshape(-1, plan.out_features)
    assert torch.linalg.matrix_rank(total).item() == rank


def test_fans_and_scales_follow_the_contracted_axes():
    assert analysis.fan(MONARCH, "first") == (8, 2 * 4)
    assert analysis.fan(MONARCH, "second") == (2 * 4, 12)
    assert analysis.fan(KRONECKER, "left") == (3, 7)
    assert analysis.init_std(LOW_RANK, "down") == pytest.approx((3 / 10 / 10) ** 0.5)
    assert analysis.init_std(LOW_RANK, "up") == pytest.approx((1 / 3) ** 0.5)
    assert analysis.lr_scale(LOW_RANK, "down") == pytest.approx(10 / 10 / 2)
    assert analysis.lr_scale(LOW_RANK, "up") == pytest.approx(10 / 3 / 2)


def test_sgd_rates_count_what_a_step_yields():
    low, up = (analysis.lr_scale(LOW_RANK, name, "sgd") for name in ("down", "up"))
    assert (low, up) == (pytest.approx(10 / 10 * 3 / LOW_RANK.out_features / 2), pytest.approx(10 / 3 / 2))
    blocks = Plan.einsum("g k, g n k -> g n", names=["blocks"], g=4, n=6, k=2)
    assert analysis.lr_scale(blocks, "blocks", "sgd") == 4  # each block sees a quarter of the inputs
    shared = Plan.einsum("a b, i a, j b -> i j", names=["first", "second"], a=2, b=5, i=3, j=4)
    assert analysis.lr_scale(shared, "first", "sgd") == pytest.approx(10 / 2 * (3 * 5) / (3 * 4) / 2)
    assert analysis.lr_scale(shared, "second", "sgd") == pytest.approx(10 / 5 / 2)


def test_a_sum_starts_at_the_scale_of_one_matrix():
    lower = Plan.einsum("g k, g n k -> g n", names=["lower"], g=4, n=6, k=4)
    assert analysis.init_std(DYAD, "lower") == pytest.approx(analysis.init_std(lower, "lower") / 2**0.5)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("text", ["dense", "monarch", "btt", "kronecker", "dyad", "block_diagonal"])
def test_outputs_keep_the_scale_of_the_input(text, width):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(width, width, sl.spec.parse(text))
    y = layer(torch.randn(512, width))
    assert 0.75 < y.square().mean().sqrt().item() < 1.3
