"""Any structure, any parameters, any shape: either an error that says what would do, or one consistent matrix."""

import dataclasses
import json
import re
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin as sl
from structlin import analysis
from structlin.ops import backends_on
from structlin.plan import Plan
from structlin.spec import STRUCTURES, Spec, parse
from structlin.testing import assert_close, plain

TOLERANCES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
modest = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every_structure = pytest.mark.parametrize("name", sorted(STRUCTURES))


def values(kind):
    """A strategy for one field of a spec, None where there is none for its type."""
    if kind is int:
        return st.sampled_from([1, 2, 2, 2, 3, 4, 4, 8])
    if kind is float:
        return st.sampled_from([0.1, 0.25, 0.5, 1.0])
    if kind is bool:
        return st.booleans()
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is UnionType:
        return next((found for choice in get_args(kind) if (found := values(choice)) is not None), None)
    return None


@st.composite
def specs(draw, name):
    cls = STRUCTURES[name]
    examples = [spec for spec, _ in cls.examples()]
    base, hints = draw(st.sampled_from(examples)), get_type_hints(cls)
    chosen = {}
    for field in dataclasses.fields(cls):
        source = draw(st.sampled_from(["example", "default", "any"]))
        strategy = values(hints[field.name])
        if source == "default" and field.default is not dataclasses.MISSING:
            chosen[field.name] = field.default
        elif source == "any" and strategy is not None:
            chosen[field.name] = draw(strategy)
    return dataclasses.replace(base, **chosen)


@st.composite
def plans(draw):
    """Any chain there can be: each axis enters at the input or a factor and leaves at a later factor or the output."""
    count = draw(st.integers(1, 3))
    operands = [[] for _ in range(count + 2)]  # the input, the factors, the output
    sizes = {}
    for axis in "abcdefg"[: draw(st.integers(2, 7))]:
        start = draw(st.integers(0, count))
        end = draw(st.integers(start + 1, count + 1))
        between = [i for i in range(start + 1, end) if draw(st.booleans())]
        for i in (start, *between, end):
            operands[i].append(axis)
        sizes[axis] = draw(st.integers(1, 3))
    for i, factor in enumerate(operands[1:-1]):
        if not factor:  # a factor has an axis; this one links it to what is there
            factor.append(axis := f"h{i}")
            operands[draw(st.integers(0, i))].append(axis)
            sizes[axis] = draw(st.integers(1, 3))
    x, *factors, y = (" ".join(draw(st.permutations(axes))) for axes in operands)
    return Plan.einsum(f"{', '.join([x, *factors])} -> {y}", **sizes)


def refusal(spec, shape):
    """What `plan` says against it; empty where it fits."""
    try:
        spec.plan(*shape)
    except ValueError as error:
        return str(error)
    return ""


def named(message):
    """The parameter that a refusal speaks of and one value that it allows, or nothing."""
    found = re.search(r"(\w+) may be (\d+)(?:, |; | to |$)", message)
    return (found[1], int(found[2])) if found else None


widths = st.one_of(st.integers(1, 48), *[st.sampled_from([8, 16, 24, 32, 36, 48, 64])] * 3)


@every_structure
def test_a_plan_or_an_error_that_names_what_fits(name):
    @modest
    @given(data=st.data())
    def check(data):
        spec = data.draw(specs(name))
        shape = data.draw(widths), data.draw(widths)
        if message := refusal(spec, shape):
            assert re.search(r"\d", message), message
            assert not message.rstrip(" ,;:.").endswith("may be"), message
            assert "\n" not in message
            if (hint := named(message)) and hint[0] in spec._fields():
                # another parameter may be wrong as well, but this one is right now
                assert named(refusal(dataclasses.replace(spec, **dict([hint])), shape)) != hint, message
            return
        plan = spec.plan(*shape)
        assert (plan.out_features, plan.in_features) == shape
        assert 1 <= analysis.rank_bound(plan) <= min(shape)
        assert analysis.flops(plan) >= 2 * analysis.num_params(plan) > 0
        assert plan == plan.T.T
        for factor, size in plan.shapes.items():
            assert len(size) >= 1
            assert 0 < analysis.init_std(plan, factor) <= 1
            assert analysis.lr_scale(plan, factor) > 0

    check()


@every_structure
def test_text_and_json_give_the_spec_back(name):
    @modest
    @given(specs(name))
    def check(spec):
        assert parse(str(spec)) == spec
        assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec

    check()


@every_structure
def test_a_layer_is_its_dense_matrix_with_its_gradients(name):
    @modest
    @given(data=st.data())
    def check(data):
        spec = data.draw(specs(name))
        shape = data.draw(widths), data.draw(widths)
        if refusal(spec, shape):
            # so that most draws reach the layer: the spec as it is, at a shape of its own
            spec, shape = data.draw(st.sampled_from(list(STRUCTURES[name].examples())))
        dtype = data.draw(st.sampled_from(list(TOLERANCES)))
        leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
        torch.manual_seed(data.draw(st.integers(0, 99)))
        layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=data.draw(st.booleans()), dtype=dtype)
        layer.backend = data.draw(st.sampled_from(backends_on(torch.device("cpu"))))
        agrees(layer, torch.randn(*leading, shape[1], dtype=dtype).requires_grad_(), TOLERANCES[dtype])

    check()


@settings(modest, max_examples=100)
@given(plan=plans(), tokens=st.integers(0, 3))
def test_any_plan_runs_on_every_backend(plan, tokens):
    class Own(Spec):
        name = "own"

        def plan(self, out_features, in_features):
            return plan

    for backend in backends_on(torch.device("cpu")):
        torch.manual_seed(0)
        layer = sl.StructuredLinear(plan.in_features, plan.out_features, Own(), dtype=torch.float64, backend=backend)
        agrees(layer, torch.randn(tokens, plan.in_features, dtype=torch.float64).requires_grad_(), 1e-10)


def agrees(layer, x, tolerance):
    dense = layer.to_dense()
    y = layer(x)
    assert y.dtype == x.dtype
    assert_close(y, dense(x), tolerance)
    dy = torch.randn_like(y)
    tensors = (x, *layer.parameters())
    found = torch.autograd.grad(y, tensors, dy)
    assert_close(found[0], torch.autograd.grad(dense(x), x, dy)[0], tolerance)
    for ours, theirs in zip(found, torch.autograd.grad(plain(layer, x), tensors, dy), strict=True):
        assert_close(ours, theirs, tolerance)
