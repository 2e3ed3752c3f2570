"""Structures mixed by a gate per token, against the formula on dense matrices."""

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.nn import GatedSum
from structlin.testing import assert_close

SPARSE, LOW_RANK = sl.Pixelfly(block_size=4, butterfly_size=4, nfactors=1), sl.LowRank(3)


def layer(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    made = GatedSum(16, 24, SPARSE, LOW_RANK, bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_formula(bias):
    gated = layer(bias=bias)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    a, b = (part.to_dense().weight for part in (gated.first, gated.second))
    gate = 1 / (1 + torch.exp(-(x @ gated.gate.weight.T + gated.gate.bias)))
    wanted = (1 - gate) * (x @ a.T) + gate * (x @ b.T) + (gated.bias if bias else 0)
    assert_close(gated(x), wanted)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (gated(x), wanted))
    assert_close(ours, theirs)


def test_gradients_are_right():
    gated = layer()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    names, values = zip(*gated.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(gated, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_compiles_and_follows_autocast():
    gated = layer(torch.float32)
    x = torch.randn(7, 16)
    assert_close(torch.compile(gated, fullgraph=True, backend="aot_eager")(x), gated(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert gated(x).shape == (7, 24)


def test_has_no_matrix_and_fits_or_says_why():
    with pytest.raises(ValueError, match="another matrix for every token"):
        layer().to_dense()
    with pytest.raises(ValueError, match="butterfly_size=4"):
        GatedSum(18, 24, SPARSE, LOW_RANK)
