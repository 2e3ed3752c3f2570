"""Sums that run as one product: which do, and that outputs and all gradients are those of the terms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import structlin as sl
from structlin.ops import joined
from structlin.ops.lowering import lower
from structlin.plan import Plan
from structlin.testing import assert_as_accurate, assert_close, inputs, make, plain


def total(*equations, **sizes):
    first, *others = (Plan.einsum(e, names=[f"w{i}"], **sizes) for i, e in enumerate(equations))
    return sum(others, first)


SUMS = {
    # grouped by two axes, in three orders of the input
    "three": total("a b k, a b n k -> a b n", "k a b, a b n k -> a b n", "k b a, a b n k -> a b n", a=2, b=3, k=5, n=4),
    # an axis that waits, and an order that is no exchange of two
    "free": total("f g k, g n k -> f g n", "k g f, g n k -> f g n", f=3, g=2, k=4, n=5),
    "first moved": total("k g, g n k -> g n", "g k, g n k -> g n", g=3, k=4, n=5),
    "outputs": total("g k, g n k -> n g", "g k, g n k -> g n", g=3, k=4, n=5),
}
DYADS = [
    (sl.Dyad(4), (24, 16)),
    (sl.Dyad(3), (9, 21)),
    (sl.Dyad(1), (5, 7)),
    (sl.Dyad(4, variant="ot"), (24, 16)),
    (sl.Dyad(5, variant="ot"), (15, 35)),
    (sl.Dyad(4, pad=True), (22, 15)),
]


def step(run, x, factors, dy):
    y = run(x, factors)
    return [y, *torch.autograd.grad(y, (x, *factors), dy)]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_sum_is_its_terms(name, tokens, keep):
    plan = SUMS[name]
    how = joined.joined(lower(plan))
    assert how is not None
    assert how.of_input == (name != "outputs")
    assert len(how.inner.chains) == 1
    torch.manual_seed(0)
    x = torch.randn(tokens, plan.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, plan.out_features, dtype=torch.float64)
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in plan.shapes.values()]
    ours = step(lambda x, w: joined.multiply(x, w, how, keep), x, factors, dy)
    for a, b in zip(ours, step(lambda x, w: joined.chain.compose(x, w, how.whole), x, factors, dy), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("spec", "shape"), DYADS, ids=str)
def test_a_layer_is_its_matrix(spec, shape, recompute):
    """In half precision as accurate as plain PyTorch, whatever the batch, the input contiguous or not."""
    layer, exact = make(spec, shape, "cpu", torch.bfloat16), make(spec, shape, "cpu")
    exact.load_state_dict(layer.state_dict())
    layer.backend, layer.recompute = "joined", recompute
    for leading in ((13,), (2, 0, 3), (2, 3, 5)):
        x = inputs(layer, *leading).requires_grad_()
        dy = torch.randn(*leading, shape[0]).to(torch.bfloat16)
        weights, wide = list(layer.parameters()), list(exact.parameters())
        found = [
            step(run, at, own, d)
            for run, at, own, d in (
                (lambda x, _: layer(x), x, weights, dy),
                (lambda x, _: plain(layer, x), x, weights, dy),
                (lambda x, _: plain(exact, x), x.detach().double().requires_grad_(), wide, dy.double()),
            )
        ]
        for ours, theirs, truth in zip(*found, strict=True):
            assert_as_accurate(ours, theirs, truth)
    turned = inputs(layer, 6, 5).transpose(0, 1)
    assert_as_accurate(layer(turned), plain(layer, turned), plain(exact, turned.double()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["it", "ot"])
def test_second_derivatives(variant, recompute):
    layer = make(sl.Dyad(2, variant=variant), (6, 4), "cpu")
    layer.backend, layer.recompute = "joined", recompute
    x, factors = inputs(layer, 3).requires_grad_(), (layer.lower, layer.upper)

    def run(x, *factors):
        return joined.multiply(x, factors, layer._joined, not recompute)

    assert torch.autograd.gradcheck(run, (x, *factors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *factors), fast_mode=True)


def test_what_is_joined():
    """Sums of one-step terms that share exactly one end; anything else runs term by term."""
    for spec, shape in (
        (sl.Dyad(4, variant="dt"), (16, 24)),
        (sl.Monarch(4), (16, 24)),
        (sl.BlockDiagonal(4), (16, 24)),
        (sl.BlockDiagonal(4) + sl.LowRank(2), (16, 24)),
        (sl.BlockDiagonal(4) + sl.BlockDiagonal(2), (16, 24)),
        (sl.BlockDiagonal(4) + sl.BlockDiagonal(4), (16, 24)),
        (sl.Pixelfly(block_size=4), (16, 32)),
    ):
        layer = make(spec, shape, "cpu")
        assert layer._joined is None, spec
        x = inputs(layer, 3)
        layer.backend = "joined"
        assert_close(layer(x), plain(layer, x))
    for spec, shape in DYADS:
        assert make(spec, shape, "cpu")._joined is not None


@pytest.mark.parametrize(("variant", "recompute", "copies"), [("it", False, 2), ("it", True, 1), ("ot", False, 1)])
def test_what_is_held_for_backward(variant, recompute, copies):
    """The joined input, or with ``recompute`` the input, which is then the only copy of it."""
    layer = make(sl.Dyad(4, variant=variant), (24, 16), "cpu")
    layer.backend, layer.recompute = "joined", recompute
    x = inputs(layer, 50).requires_grad_()
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        layer(x)
    assert sum(size for size in held.values() if size >= 50 * 16 * 8) == copies * 50 * 16 * 8


class MLP(nn.Module):
    def __init__(self, variant, recompute=False):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = (
            make(sl.Dyad(4, variant=variant), shape, "cpu", torch.float32) for shape in ((32, 16), (16, 32))
        )
        for layer in (self.up, self.down):
            layer.backend, layer.recompute = "joined", recompute

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def eager(self, x):
        return x + plain(self.down, F.gelu(plain(self.up, self.norm(x))))


def compiled_as_eager(model, backend, dynamic):
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (5, 12):
        torch.manual_seed(tokens)
        x, dy = torch.randn(tokens, 16, requires_grad=True), torch.randn(tokens, 16)
        weights = list(model.parameters())
        ours, theirs = (step(lambda x, _, run=f: run(x), x, weights, dy) for f in (run, model.eager))
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, 1e-5)
        with torch.no_grad():
            assert_close(run(x), theirs[0], 1e-5)


@pytest.mark.parametrize(
    ("variant", "recompute", "dynamic"), [("it", False, True), ("it", True, False), ("ot", False, False)]
)
def test_compiles_in_one_graph(variant, recompute, dynamic):
    compiled_as_eager(MLP(variant, recompute), "aot_eager", dynamic)


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled_as_eager(MLP("it"), "inductor", False)


@pytest.mark.parametrize("variant", ["it", "ot"])
def test_adding_up_is_traced_and_joining_is_not(variant):
    """What Inductor sees: our product once each way, `join` once, and the sum of the halves as plain additions."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def look(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    layer = make(sl.Dyad(4, variant=variant), (24, 16), "cpu", bias=False)
    layer.backend = "joined"
    torch._dynamo.reset()
    x = inputs(layer, 5).requires_grad_()
    with pytest.warns(UserWarning, match="boxed"):
        torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=look))(x).sum().backward()
    forward, backward = graphs
    product, undone = "structlin.multiply.default", "structlin.multiply_backward.default"
    assert (forward.count(product), backward.count(undone)) == (1, 1)
    joins, sums = (forward, backward) if variant == "it" else (backward, forward)
    assert joins.count("structlin.join.default") == 1
    assert sums.count("aten.add.Tensor") == 1
    assert not any("unjoin" in name for name in forward + backward)
    assert not any("aten.cat" in name for name in backward)


def test_runs_under_autocast_and_checkpoints():
    layer = make(sl.Dyad(4), (24, 16), "cpu", torch.float32)
    layer.backend = "joined"
    x = inputs(layer, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), plain(layer, x).float(), 2e-2)
    with pytest.raises(ValueError, match=r"the input is torch\.float64, the layer torch\.float32"):
        layer(x.double())
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert_close(x.grad, torch.autograd.grad(plain(layer, x).square().sum(), x)[0], 1e-5)


def test_transforms_see_plain_pytorch():
    layer = make(sl.Dyad(4, variant="ot"), (24, 16), "cpu", bias=False)
    layer.backend = "joined"
    x, dx, dense = inputs(layer, 3), inputs(layer, 3).flip(0), layer.to_dense().weight.detach()
    assert_close(torch.func.jvp(layer, (x,), (dx,))[1], dx @ dense.T)
    assert_close(torch.func.vmap(layer)(x), x @ dense.T)


def test_explain_names_the_join():
    layer = make(sl.Dyad(4), (24, 16), "cpu")
    layer.backend = "joined"
    assert [(row.what, row.backend) for row in sl.explain(layer, 32)] == [
        ("join the factors", "copy"),
        ("join the input in all its orders", "copy"),
        ("t f g k, g n k -> t f g n", "bmm of 4 32x6x8"),
    ]
    layer = make(sl.Dyad(4, variant="ot"), (24, 16), "cpu")
    layer.backend = "joined"
    assert sl.explain(layer, 32)[-1].what == "bring the outputs to one order and add them"


@pytest.mark.parametrize("recompute", [False, True])
def test_what_comes_out_may_be_changed_in_place(recompute):
    layer = sl.StructuredLinear(16, 16, sl.Dyad(nblocks=4), bias=False, backend="joined", recompute=recompute)
    x = torch.randn(2, 16)
    changed = torch.autograd.grad(layer(x).relu_().sum(), tuple(layer.parameters()))
    plainly = torch.autograd.grad(layer(x).relu().sum(), tuple(layer.parameters()))
    assert all(map(torch.equal, changed, plainly))
