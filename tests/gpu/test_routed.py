"""Mixtures of experts on a GPU: accurate in every dtype, without reading the device, as a graph and compiled."""

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.bench.timing import capture
from structlin.kernels.tiles import Sets
from structlin.nn import MoEFFN, routing_load, routing_loss, update_balance_
from structlin.ops.ragged import blocked_mm, blocked_outer, ragged_mm, ragged_outer
from structlin.ops.routed import arrange, multiply_routed
from structlin.ops.rows import program, sort
from structlin.testing import assert_as_accurate, assert_close, error, inputs, make, plain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled"),  # Inductor, on a softmax over few numbers
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

LAYERS = [
    (sl.btt_moe(8, 2), (1024, 1024)),
    (sl.btt_moe(8, 2), (4096, 1024)),
    (sl.btt_moe(16, 4), (768, 3072)),
    (sl.low_rank_moe(8, 2), (1024, 768)),
    (sl.monarch_moe(4, 1, nblocks=8), (1024, 1024)),
    (sl.dense_moe(4, 2), (512, 256)),
    (sl.MoE(sl.Dyad(4), 4, 2, balance="bias"), (768, 3072)),
    (sl.btt_moe(4, 2), (30, 42)),  # rows that no grouped GEMM takes
]
every_layer = pytest.mark.parametrize(("spec", "shape"), LAYERS, ids=str)


def train(layer, run, x, dy):
    x = x.detach().requires_grad_()
    y = run(x)
    found = torch.autograd.grad((y, routing_loss(layer)), (x, *layer.parameters()), (dy, None))
    return [y.detach(), *found]  # no graph, or the one of this stream would be met in a capture on another


def assert_router_is_as_accurate(ours, plain, exact, x, y, dy):
    """The router's gradient, where each gate contributes the inner product of ``dy`` and an output of a token.

    Its terms cancel, for a single token even in the one number that the gradient is a multiple of, and then plain
    PyTorch is near by luck. So a rounding of every term is allowed, and errors of tokens add up as independent ones do.
    """
    terms = x.double().norm(dim=1) * (y * dy.double()).norm(dim=1)
    rounded = torch.finfo(ours.dtype).eps * float(terms.norm() / exact.norm())
    assert_close(ours, exact, 4 * (error(plain, exact) + rounded))


def by_formula(layer):
    def run(x):
        layer(x)  # for its losses
        return plain(layer, x)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_accurate(dtype):
    """With experts that have no row at either end and in the middle, and rows that are no whole tile."""
    for counts in ([0, 300, 0, 37, 1, 0], [128] * 4, [0, 0, 5], [1000]):
        ends = torch.tensor(counts, device="cuda").cumsum(0).int()
        for groups, k, n in ((1, 64, 128), (4, 32, 64), (3, 24, 8), (2, 5, 7)):
            x, y = (torch.randn(groups, sum(counts), size, device="cuda", dtype=dtype) for size in (k, n))
            w = torch.randn(groups, len(counts), k, n, device="cuda", dtype=dtype)
            exact, outer = blocked_mm(x.double(), w.double(), ends), blocked_outer(x.double(), y.double(), ends)
            for weight in (w, w.mT.contiguous().mT):
                assert_as_accurate(ragged_mm(x, weight, ends), blocked_mm(x, w, ends), exact)
            found = ragged_outer(x, y, ends)
            assert_as_accurate(found, blocked_outer(x, y, ends), outer)
            assert all((found[:, e] == 0).all() for e, count in enumerate(counts) if count == 0)


@every_layer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_accurate(spec, shape, dtype, compiled):
    layer, exact = make(spec, shape, "cuda", dtype), make(spec, shape, "cuda")
    nn.init.constant_(layer.router.weight, 0)
    with torch.no_grad():  # logits that are the same in every dtype, so that all choose the same experts
        layer.router.weight[:, : spec.experts] = torch.eye(spec.experts)
    exact.load_state_dict(layer.state_dict())
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    for tokens in (1, 333, 4133):  # the last are enough to be sorted by set
        x, dy = inputs(layer, tokens), torch.randn(tokens, layer.out_features, device="cuda").to(dtype)
        ours, naive = train(layer, run, x, dy), train(layer, by_formula(layer), x, dy)
        truth = train(exact, by_formula(exact), x.double(), dy.double())
        names = ["y", "x", *(name for name, _ in layer.named_parameters())]
        for name, a, b, c in zip(names, ours, naive, truth, strict=True):
            if name == "router.weight":
                assert_router_is_as_accurate(a, b, c, x, truth[0], dy)
            else:
                assert_as_accurate(a, b, c, 4.0)


@every_layer
@pytest.mark.parametrize("tokens", [500, 4000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_does_not_wait_for_the_device(spec, shape, dtype, tokens):
    layer = make(spec, shape, "cuda", dtype)
    ffn = MoEFFN(shape[0], 64, 4, 2, device="cuda", dtype=dtype)
    model = nn.Sequential(layer, ffn)
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-3), capturable=True)
    x = inputs(layer, tokens)
    (model(x).float().sum() + routing_loss(model)).backward()  # what is set up once may wait
    optimizer.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        (model(x).float().sum() + routing_loss(model)).backward()
        optimizer.step()
        routing_load(model)
        if spec.balance == "bias":
            update_balance_(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_layer
@pytest.mark.parametrize("tokens", [999, 4099])
def test_is_the_same_bits_every_time_and_as_a_graph(spec, shape, tokens):
    layer = make(spec, shape, "cuda", torch.bfloat16)
    x, dy = inputs(layer, tokens), torch.randn(tokens, shape[0], device="cuda").bfloat16()
    wanted = train(layer, layer, x, dy)
    again = train(layer, layer, x, dy)
    kept = []
    graph = capture(lambda: kept.append(train(layer, layer, x, dy)) or kept[-1][0])
    graph.replay()
    for a, b, c in zip(wanted, again, kept[-1], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_tokens_are_sorted_by_set_where_there_are_few():
    layer = make(sl.btt_moe(8, 2), (4096, 1024), "cuda", torch.bfloat16)
    for tokens, size in ((4099, 2), (999, 1), (99, 0)):
        layer(inputs(layer, tokens))
        routes = layer.router.last.routes
        assert (routes.unit.shape[1] if isinstance(routes, Sets) else 0) == size


@pytest.mark.parametrize("shape", [(4096, 1024), (8192, 2048), (4096, 4096), (3072, 768)], ids=str)
@pytest.mark.parametrize("kind", ["any", "all tokens to one set", "two experts without a token"])
def test_sorted_by_set_is_as_accurate_as_by_expert(shape, kind):
    """At the sizes that are timed, where the formula of all experts would take long."""
    layer = make(sl.btt_moe(8, 2), shape, "cuda", torch.bfloat16)
    logits = torch.randn(16384, 8, device="cuda")
    logits[:, :2] += {"any": 0.0, "all tokens to one set": 100.0}.get(kind, -100.0)
    chosen = logits.topk(2).indices
    gate, x = logits.gather(1, chosen).softmax(1), torch.randn(16384, shape[1], device="cuda")
    dy = torch.randn(16384, shape[0], device="cuda")
    what = program(layer.plan)

    def run(dtype, by_set):
        given = [x.to(dtype), gate, *(getattr(layer, name).to(dtype) for name in layer.plan.factors)]
        given = [tensor.detach().requires_grad_() for tensor in given]
        routes = arrange(given[0], chosen, 8, what) if by_set else sort(chosen, 8)
        assert isinstance(routes, Sets) is by_set
        y = multiply_routed(given[0], given[2:], given[1], chosen, routes, what)
        return [y.detach(), *torch.autograd.grad(y, given, dy.to(dtype))]

    ours, naive, truth = run(torch.bfloat16, True), run(torch.bfloat16, False), run(torch.float64, False)
    for a, b, c in zip(ours, naive, truth, strict=True):
        assert_as_accurate(a, b, c)
