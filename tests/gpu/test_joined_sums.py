"""Joined products on a GPU: accuracy at real sizes, and the kernels that run."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import structlin as sl
from structlin.testing import assert_as_accurate, inputs, make, plain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]

LAYERS = [
    (sl.Dyad(4), (3072, 768)),
    (sl.Dyad(4), (768, 3072)),
    (sl.Dyad(8), (4096, 4096)),
    (sl.Dyad(8, variant="ot"), (1024, 4096)),
    (sl.Dyad(6, variant="ot"), (1536, 384)),
]


def step(run, x, dy, weights):
    x = x.detach().requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad(y, (x, *weights), dy)]


@pytest.mark.parametrize(("spec", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_accurate(spec, shape, dtype, compiled, recompute):
    layer, exact = make(spec, shape, "cuda", dtype), make(spec, shape, "cuda")
    exact.load_state_dict(layer.state_dict())
    layer.backend, layer.recompute = "joined", recompute
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    for tokens in (1, 333, 2048):
        x = inputs(layer, tokens)
        dy = torch.randn(tokens, layer.out_features, device="cuda").to(dtype)
        weights, wide = list(layer.parameters()), list(exact.parameters())
        ours, naive = step(run, x, dy, weights), step(lambda x: plain(layer, x), x, dy, weights)
        truth = step(lambda x: plain(exact, x), x.double(), dy.double(), wide)
        for a, b, c in zip(ours, naive, truth, strict=True):
            assert_as_accurate(a, b, c)


@pytest.mark.parametrize("variant", ["it", "ot"])
def test_three_products_and_two_copies(variant):
    """One GEMM each way and one for the factors; the features are copied by our kernels alone."""
    layer = make(sl.Dyad(4, variant=variant), (4096, 1024), "cuda", torch.bfloat16, bias=False)
    layer.backend = "joined"
    x, dy = inputs(layer, 2048).requires_grad_(), torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    weights = list(layer.parameters())
    step(layer, x, dy, weights)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        torch.autograd.grad(layer(x), (x, *weights), dy)
        torch.cuda.synchronize()
    kernels = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(name for name in kernels if "join" in name) == ["_join", "_unjoin"], kernels
    # the factors are joined by cat, and a GEMM of few tiles may be split, with a reduction and a memset of its own
    beside = "join", "cat", "reduce", "memset"
    assert sum(not any(word in name.lower() for word in beside) for name in kernels) == 3, kernels
