"""Every backend computes the same function, forward and backward, for every registered structure."""

import os

import pytest
import torch

import structlin as sl
from structlin.ops import backends_on
from structlin.ops.equation import parse
from structlin.ops.gemm import plan_gemm
from structlin.testing import assert_as_accurate, examples, inputs, make, padded_examples, plain

DEVICE = torch.device(os.environ.get("STRUCTLIN_TEST_DEVICE", "cpu"))
# on a GPU "auto" runs one of the others, and would measure which
HERE = [name for name in backends_on(DEVICE) if name != "auto" or DEVICE.type == "cpu"]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("spec", "shape"), examples() + padded_examples(), ids=str)
def test_backends_agree(spec, shape, backend, device):
    for dtype in (torch.float32, torch.float64):
        layer, exact = make(spec, shape, device, dtype), make(spec, shape, device)
        exact.load_state_dict(layer.state_dict())
        layer.backend = backend
        for tokens in (0, 1, 13, 64):
            x = inputs(layer, tokens).requires_grad_()
            dy = torch.randn(tokens, layer.out_features, dtype=dtype, device=device)
            weights = list(layer.parameters())
            y = layer(x)
            x_wide = x.detach().double().requires_grad_()
            naive, wide = plain(layer, x), plain(exact, x_wide)
            ours = [y, *torch.autograd.grad(y, (x, *weights), dy)]
            theirs = [naive, *torch.autograd.grad(naive, (x, *weights), dy)]
            truth = [wide, *torch.autograd.grad(wide, (x_wide, *exact.parameters()), dy.double())]
            # multiplying the factors first is another sum with other roundings, and not always a better one
            slack = 12.0 if backend == "dense" else 2.0
            for a, b, c in zip(ours, theirs, truth, strict=True):
                assert_as_accurate(a, b, c, slack)


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_lowered_steps_copy_nothing(spec, shape, device):
    """Outside the explicit relayouts, forward and both gradients of every step run in place."""
    layer = make(spec, shape, device)
    if layer.plan.is_dense:
        return
    for chain in layer._program.chains:
        for stage in chain.stages:
            x_axes, w_axes, y_axes = parse(stage.equation)
            size = {"t": 5, **layer.plan.sizes}
            x, w, y = (torch.empty([size[axis] for axis in axes], device=device) for axes in (x_axes, w_axes, y_axes))
            names = [" ".join(axes) for axes in (x_axes, w_axes, y_axes)]
            for (a, a_name), (b, b_name), c_name in (
                ((x, names[0]), (w, names[1]), names[2]),
                ((y, names[2]), (w, names[1]), names[0]),
                ((x, names[0]), (y, names[2]), names[1]),
            ):
                gemm = plan_gemm(
                    f"{a_name}, {b_name} -> {c_name}", tuple(a.shape), a.stride(), tuple(b.shape), b.stride()
                )
                assert not gemm.copies, f"{a_name}, {b_name} -> {c_name} copies {gemm.copies}"


def test_dense_backend_follows_the_factors(device):
    layer = make(sl.Monarch(nblocks=2), (16, 24), device)
    layer.backend = "dense"
    x = inputs(layer, 5)
    with torch.no_grad():
        before = layer(x)
        assert layer._weight is not None
        torch.testing.assert_close(before, plain(layer, x))
        layer.first.mul_(2)
        torch.testing.assert_close(layer(x), plain(layer, x))
        layer.load_state_dict(make(sl.Monarch(nblocks=2), (16, 24), device).state_dict())
        torch.testing.assert_close(layer(x), before)
    assert "_weight" not in layer.state_dict()


def test_unknown_backend_is_refused():
    layer = make(sl.Monarch(nblocks=2), (16, 24), "cpu")
    with pytest.raises(ValueError, match="allowed: auto, dense"):
        layer.backend = "cudnn"
    with pytest.raises(ValueError, match="allowed: auto, dense"):
        sl.StructuredLinear(16, 16, sl.Dense(), backend="fast")


def test_environment_chooses_where_nobody_else_does(monkeypatch):
    monkeypatch.setenv("STRUCTLIN_BACKEND", "copy")
    assert sl.StructuredLinear(16, 16, sl.Dyad(4)).backend == "copy"
    assert sl.StructuredLinear(16, 16, sl.Dyad(4), backend="bmm").backend == "bmm"


def test_explain_names_every_copy():
    layer = make(sl.Monarch(nblocks=4), (16, 16), "cpu")
    rows = sl.explain(layer, 32)
    assert [row.backend for row in rows] == ["bmm of 4 32x4x4", "bmm of 4 32x4x4", "copy"]
    wide = make(sl.Monarch(nblocks=4), (32, 32), "cpu")
    assert [row.backend for row in sl.explain(wide, 8)] == ["bmm of 4 8x8x8", "copy", "bmm of 4 8x8x8", "copy"]
    layer.backend = "reference"
    assert [row.backend for row in sl.explain(layer, 32)] == ["einsum", "einsum"]
    assert "asked for" in str(sl.explain(layer, 32))
    with pytest.raises(ValueError, match="positive"):
        sl.explain(layer, 0)
