"""Bugs put in on purpose: each must turn the contract or the papers red, or these would prove nothing."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import structlin as sl
from structlin import analysis
from structlin.nn import linear
from structlin.plan import Plan
from structlin.structures import dyad
from structlin.testing import check, examples, is_the_matrix_it_says

multiply, lower = linear.multiply, linear.lower
MONARCH, MONARCH_SHAPE = sl.Monarch(nblocks=2), (16, 24)
DYAD, DYAD_SHAPE = sl.Dyad(nblocks=4), (24, 16)


def papers():
    """The module of the dense forms, which is no package that could be imported."""
    path = Path(__file__).parent / "papers" / "test_dense_forms.py"
    spec = importlib.util.spec_from_file_location("planted_papers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contract_is_red(promise, spec=MONARCH, shape=MONARCH_SHAPE):
    with pytest.raises(AssertionError, match=promise):
        check(spec, shape)


def halved(tensor):
    """The same value with half of the gradient."""
    return tensor.detach() + 0.5 * (tensor - tensor.detach())


# a wrong permutation


def with_last_digits_swapped(plan):
    *others, last = plan.terms
    return dataclasses.replace(plan, terms=(*others, dataclasses.replace(last, y=last.y[::-1])))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(spec, shape) for spec, shape in examples() if len(spec.plan(*shape).terms[-1].y) > 1],
    ids=str,
)
def test_a_wrong_permutation_of_any_structure_turns_the_papers_red(spec, shape, monkeypatch):
    plan = type(spec).plan
    monkeypatch.setattr(type(spec), "plan", lambda *arguments: with_last_digits_swapped(plan(*arguments)))
    is_the_matrix_it_says(spec, shape, "cpu")  # the contract alone takes it for another matrix
    with pytest.raises(AssertionError, match="not close"):
        papers().test_is_the_papers_matrix(spec, shape)


def test_a_wrong_permutation_of_the_input_turns_the_papers_red(monkeypatch):
    monkeypatch.setitem(dyad.VARIANTS, "it", dyad.VARIANTS["ot"])
    with pytest.raises(AssertionError, match="not close"):
        papers().test_is_the_papers_matrix(DYAD, DYAD_SHAPE)


def test_a_wrong_permutation_of_what_runs_turns_the_contract_red(monkeypatch):
    monkeypatch.setattr(linear, "multiply", lambda x, *rest: multiply(x, *rest).roll(1, -1))
    contract_is_red("is_the_matrix_it_says")


# a wrong gradient


@pytest.mark.parametrize(("spec", "shape"), [(MONARCH, MONARCH_SHAPE), (DYAD, DYAD_SHAPE)], ids=str)
@pytest.mark.parametrize("factor", [0, 1])
def test_half_of_a_weight_gradient_turns_the_contract_red(spec, shape, factor, monkeypatch):
    def planted(x, factors, *rest):
        return multiply(x, [halved(w) if i == factor else w for i, w in enumerate(factors)], *rest)

    monkeypatch.setattr(linear, "multiply", planted)
    contract_is_red("has_right_gradients", spec, shape)


def test_half_of_the_input_gradient_turns_the_contract_red(monkeypatch):
    monkeypatch.setattr(linear, "multiply", lambda x, *rest: multiply(halved(x), *rest))
    contract_is_red("has_right_gradients")


def test_a_gradient_of_a_gradient_that_is_lost_turns_the_contract_red(monkeypatch):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy.detach()

    monkeypatch.setattr(linear, "multiply", lambda x, *rest: multiply(Once.apply(x), *rest))
    contract_is_red("has_right_gradients")


def test_a_gradient_without_its_conjugate_turns_the_contract_red(monkeypatch):
    def planted(x, *rest):
        y = multiply(x, *rest)
        if y.is_complex() and y.requires_grad:
            y.register_hook(torch.conj)
        return y

    monkeypatch.setattr(linear, "multiply", planted)
    contract_is_red("has_right_gradients")


# a wrong scale, count or rank


@pytest.mark.parametrize(
    ("wrong", "spec", "shape"),
    [
        (lambda plan, name: analysis.fan(plan, name)[0] ** -0.5, sl.LowRank(4), (24, 16)),  # without the minimum
        (lambda plan, name: init_std(plan, name) * len(plan.terms) ** 0.5, DYAD, DYAD_SHAPE),  # not for the sum
        (lambda plan, name: 1.1 * init_std(plan, name), MONARCH, MONARCH_SHAPE),
        (lambda plan, name: 0.02, MONARCH, MONARCH_SHAPE),
    ],
    ids=["minimum", "terms", "tenth", "constant"],
)
def test_a_wrong_init_scale_turns_the_contract_red(wrong, spec, shape, monkeypatch):
    monkeypatch.setattr(analysis, "init_std", wrong)
    contract_is_red("starts_at_spectral_scale", spec, shape)


init_std, flops, num_params, rank_bound = analysis.init_std, analysis.flops, analysis.num_params, analysis.rank_bound


@pytest.mark.parametrize(
    ("name", "wrong", "promise"),
    [
        ("flops", lambda plan: flops(plan) // 2, "costs_what_it_says"),
        ("num_params", lambda plan: num_params(plan) + 1, "costs_what_it_says"),
        ("rank_bound", lambda plan: rank_bound(plan) - 1, "has_the_rank_it_says"),
        ("rank_bound", lambda plan: min(plan.in_features, plan.out_features), "has_the_rank_it_says"),
    ],
)
def test_a_wrong_formula_turns_the_contract_red(name, wrong, promise, monkeypatch):
    monkeypatch.setattr(analysis, name, wrong)
    contract_is_red(promise, sl.LowRank(4), (24, 16))


# what is lost on the way


def test_a_dropped_term_of_a_sum_turns_the_contract_red(monkeypatch):
    monkeypatch.setattr(linear, "lower", lambda plan: lower(Plan(plan.terms[:1], plan.axes)))
    contract_is_red("is_the_matrix_it_says", DYAD, DYAD_SHAPE)


def test_a_dropped_bias_turns_the_contract_red(monkeypatch):
    forward = sl.StructuredLinear.forward
    monkeypatch.setattr(sl.StructuredLinear, "forward", lambda self, x: forward(self, x) - self.bias)
    contract_is_red("is_the_matrix_it_says")


def test_no_tokens_that_fail_turn_the_contract_red(monkeypatch):
    def planted(x, *rest):
        assert x.shape[0] > 0, "no tokens"
        return multiply(x, *rest)

    monkeypatch.setattr(linear, "multiply", planted)
    contract_is_red("takes_any_batch: no tokens")


def test_rounding_on_the_way_turns_the_contract_red(monkeypatch):
    def planted(x, *rest):
        y = multiply(x, *rest)
        return y.bfloat16().float() if y.dtype == torch.float32 else y

    monkeypatch.setattr(linear, "multiply", planted)
    contract_is_red("is_accurate")


def test_a_layer_that_ignores_autocast_turns_the_contract_red(monkeypatch):
    def planted(x, *rest):
        with torch.autocast("cpu", enabled=False):
            return multiply(x, *rest)

    monkeypatch.setattr(linear, "multiply", planted)
    contract_is_red("casts_as_linear_does")


def test_a_structure_that_is_never_dense_but_runs_so_turns_the_contract_red(monkeypatch):
    def planted(self, x):
        return F.linear(x, self._materialize(self._factors()), self.bias)

    monkeypatch.setattr(sl.StructuredLinear, "forward", planted)
    contract_is_red("refuses_a_wrong_width|costs_what_it_says")


def test_without_a_bug_the_same_checks_are_green():
    for spec, shape in ((MONARCH, MONARCH_SHAPE), (DYAD, DYAD_SHAPE)):
        check(spec, shape)
        papers().test_is_the_papers_matrix(spec, shape)
