"""Layers at real sizes on a GPU: accuracy of every backend, the kernels that run, and what they hold in memory."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import structlin as sl
from structlin.testing import assert_as_accurate, inputs, make, plain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # what Inductor and the profiler say about themselves
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

LAYERS = [
    (sl.Monarch(4, order="blocked"), (3072, 768)),
    (sl.Monarch(4), (768, 3072)),
    (sl.Monarch(8, order="blocked"), (2048, 2048)),
    (sl.Monarch(16), (1024, 4096)),
    (sl.Dyad(4), (3072, 768)),
    (sl.Dyad(8, variant="ot"), (1024, 1024)),
    (sl.Dyad(8, variant="dt"), (1024, 1024)),
    (sl.BTT(1), (1024, 1024)),
    (sl.BTT(4), (1024, 2048)),
    (sl.LowRank(256), (1024, 1024)),
    (sl.Kronecker(), (768, 768)),
    (sl.BlockDiagonal(8), (1024, 1024)),
    (sl.Monarch(8, factors=3, order="blocked"), (2048, 2048)),
    (sl.BTT(2, cores=3), (1024, 4096)),
    (sl.Pixelfly(block_size=64, rank=64), (1024, 2048)),
    (sl.Pixelfly(block_size=128, butterfly_size=8, rank=72), (2048, 1024)),
    (sl.BlockDiagonal(8) + sl.Pixelfly(block_size=64, rank=8), (1024, 1024)),
]
every_layer = pytest.mark.parametrize(("spec", "shape"), LAYERS, ids=str)


def step(f, x, dy, weights):
    x = x.detach().requires_grad_()
    y = f(x)
    return [y, *torch.autograd.grad(y, (x, *weights), dy)]


@every_layer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_is_accurate(spec, shape, dtype, compiled):
    layer, exact = make(spec, shape, "cuda", dtype), make(spec, shape, "cuda")
    exact.load_state_dict(layer.state_dict())
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


@every_layer
def test_copies_nothing_but_its_relayouts(spec, shape):
    """Forward and backward launch GEMMs and our own kernels: no copy, cat or clone of PyTorch's."""
    layer = make(spec, shape, "cuda", torch.bfloat16, bias=False)
    x, dy = inputs(layer, 2048).requires_grad_(), torch.randn(2048, shape[0], device="cuda", dtype=torch.bfloat16)
    layer(x).backward(dy)
    x.grad = None
    layer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    kernels = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    words = ("copy", "elementwise", "cat", "memcpy")
    copies = [name for name in kernels if any(word in name.lower() for word in words)]
    assert kernels
    assert not copies, copies


def test_a_low_rank_term_takes_no_pass_of_its_own_over_the_result():
    """Forward the product with `down` and the block-sparse kernel; backward that and three products more."""
    layer = make(sl.Pixelfly(block_size=128, rank=128), (4096, 4096), "cuda", torch.bfloat16, bias=False)
    layer.backend = "triton"
    x, dy = inputs(layer, 2048).requires_grad_(), torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(dy)
    x.grad = None
    layer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    kernels = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if name in ("_sum_of_blocks", "_gradient_of_blocks")]
    assert ours == ["_sum_of_blocks", "_gradient_of_blocks", "_sum_of_blocks"]
    gemms = [name for name in kernels if name not in ours and "reduce" not in name.lower()]  # what split-K adds up
    assert len(gemms) == 4, gemms


def test_replays_as_a_graph():
    layer = make(sl.Monarch(8, order="blocked"), (2048, 1024), "cuda", torch.bfloat16)
    x, dy = inputs(layer, 512).requires_grad_(), torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)

    def run():
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = run()
    for tensor in found:
        tensor.fill_(float("nan"))
    graph.replay()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_compiled_code_calls_our_operator():
    called = []

    def look(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    layer = make(sl.Monarch(8, order="blocked"), (2048, 1024), "cuda", torch.bfloat16)
    torch.compile(layer, fullgraph=True, backend=look)(inputs(layer, 8))
    assert "structlin.multiply.default" in called
    assert not any("einsum" in name for name in called)


def test_runs_in_the_graphs_of_torch_compile():
    """mode="reduce-overhead" captures the whole step, our operators included."""
    layer = make(sl.Monarch(8, order="blocked"), (2048, 1024), "cuda", torch.bfloat16)
    dy = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in torch.autograd.grad(compiled(x), (x, *layer.parameters()), dy)]
        wanted = torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
