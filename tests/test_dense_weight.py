"""The dense weight multiplied out of the factors is what the layer does to the identity, with its gradients."""

import pytest
import torch
from hypothesis import given, settings
from test_properties import modest, plans

import structlin as sl
from structlin.ops import contract, dense
from structlin.ops.dense import weight
from structlin.ops.lowering import lower, plan_of
from structlin.plan import Plan, Term
from structlin.testing import assert_close, examples, inputs, make, padded_examples, plain

FLY = sl.Pixelfly(block_size=2, butterfly_size=4, nfactors=2, rank=2)
TABLE = ((0, 2), (1, 0), (2, 1))
SIZES = (("i", 3), ("k", 4), ("m", 2), ("n", 5), ("s", 2))
# rows not first in the output, or not in it, so that blocks add up; the slot in the output; a table at
# each end
TABLES = [
    Plan((Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("n", "i"), ("w",), TABLE),), SIZES[:2] + SIZES[3:]),
    Plan((Term(("i", "s", "k"), (("n", "i", "s", "k"),), ("n",), ("w",), TABLE),), SIZES[:2] + SIZES[3:]),
    Plan((Term(("i", "s", "k"), (("i", "n", "k"),), ("i", "s", "n"), ("w",), TABLE),), SIZES[:2] + SIZES[3:]),
    Plan((Term(("i", "s", "k"), (("i", "n", "k"),), ("i", "s", "n"), ("w",), TABLE, TABLE),), SIZES[:2] + SIZES[3:]),
    Plan(
        (Term(("i", "s", "k"), (("i", "s", "k", "m"), ("m", "n")), ("i", "s", "n"), ("w", "v"), TABLE, TABLE),), SIZES
    ),
]


class Own(sl.Spec):
    name = "own"


def layer_of(plan):
    spec = Own()
    object.__setattr__(spec, "plan", lambda *_: plan)
    return make(spec, (plan.out_features, plan.in_features), "cpu", bias=False)


def agrees(layer):
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    wanted = plain(layer, eye).T - (0 if layer.bias is None else layer.bias[:, None])
    stored = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    dw = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, stored, dw)
    for plan in (layer.plan, plan_of(lower(layer.plan), layer.plan.kept)):
        found = weight(plan, [getattr(layer, name) for name in layer.plan.factors])
        assert found.is_contiguous()
        assert_close(found, wanted, 1e-13)
        for ours, theirs in zip(torch.autograd.grad(found, stored, dw), grads, strict=True):
            assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize(("spec", "shape"), [*examples(), *padded_examples(), (FLY.T, (16, 24))], ids=str)
def test_every_structure(spec, shape):
    agrees(make(spec, shape, "cpu"))


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_by_the_operator_that_runs_on_gpus(spec, shape, monkeypatch):
    monkeypatch.setattr(dense.reference, "contract", lambda a, b, equation: contract(a, b, equation, "triton"))
    agrees(make(spec, shape, "cpu"))


@pytest.mark.parametrize("plan", [plan for own in TABLES for plan in (own, own.T)], ids=str)
def test_every_kind_of_table(plan):
    agrees(layer_of(plan))


@settings(modest, max_examples=60)
@given(plan=plans())
def test_any_plan(plan):
    agrees(layer_of(plan))


@pytest.mark.parametrize("spec", [FLY, sl.Monarch(2, pad=True), sl.Dyad(4)], ids=str)
def test_the_dense_backend_under_compilers_and_transforms(spec):
    layer = make(spec, (16, 24), "cpu")
    layer.backend = "dense"
    x = inputs(layer, 5).requires_grad_()
    tensors = (x, *layer.parameters())
    wanted = torch.autograd.grad(plain(layer, x).square().sum(), tensors)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(run(x).square().sum(), tensors), wanted, strict=True):
        assert_close(ours, theirs)
    state = dict(layer.named_parameters())
    found = torch.func.grad(lambda state: torch.func.functional_call(layer, state, x).square().sum())(state)
    for ours, theirs in zip(found.values(), wanted[1:], strict=True):
        assert_close(ours, theirs)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in state.items()}
    y = torch.vmap(lambda state: torch.func.functional_call(layer, state, x))(stacked)
    assert_close(y[0], plain(layer, x))
    assert_close(torch.export.export(layer, (x,)).module()(x), plain(layer, x))
