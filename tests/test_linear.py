"""The layer beside ``nn.Linear``: what a user of one expects of the other."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import structlin as sl
from structlin import analysis
from structlin.ops import backends_on, dense, products, replay
from structlin.ops.lowering import REVISION, program
from structlin.testing import assert_as_accurate, assert_close, compiles_whole, error, inputs, make, plain

# one factor; two with a relayout between; a free axis; a sum with one; a chain of three
SPECS = [sl.BlockDiagonal(4), sl.Monarch(2), sl.Kronecker(), sl.Dyad(4, "dt"), sl.LowRank(4), sl.BTT(2)]
SHAPE = (24, 16)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_backend = pytest.mark.parametrize("backend", backends_on(torch.device("cpu")))


@every_spec
def test_it_is_made_and_described_as_linear_is(spec):
    layer, linear = sl.StructuredLinear(16, 24, spec), nn.Linear(16, 24)
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
    assert layer.bias.shape == linear.bias.shape
    assert sl.StructuredLinear(16, 24, spec, bias=False).bias is None
    assert list(layer.state_dict()) == [*layer.plan.shapes, "bias"]
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if name != "bias"} == layer.plan.shapes
    text = repr(layer)
    assert repr(spec) in text
    assert f"params={analysis.num_params(layer.plan):,}" in text
    assert "bias=True" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_dtype_and_device_are_those_asked_for(dtype):
    layer = sl.StructuredLinear(16, 24, sl.LowRank(4), device="meta", dtype=dtype)
    assert all(p.is_meta and p.dtype == dtype for p in layer.parameters())
    assert all(p.dtype == dtype for p in sl.StructuredLinear(16, 24, sl.LowRank(4), dtype=dtype).parameters())


@pytest.mark.parametrize(("width_in", "width_out"), [(0, 16), (16, 0), (-4, 16)])
def test_a_layer_without_features_is_refused(width_in, width_out):
    with pytest.raises(ValueError, match="widths start at 1"):
        sl.StructuredLinear(width_in, width_out, sl.Kronecker())


@every_spec
def test_real_and_complex_factors_start_at_the_same_scale(spec):
    for dtype in (torch.float32, torch.complex64):
        torch.manual_seed(0)
        layer = sl.StructuredLinear(1024, 1024, spec, dtype=dtype)
        for name in layer.plan.factors:
            factor = layer.get_parameter(name)
            rms = factor.abs().square().mean().sqrt().item()
            assert rms == pytest.approx(analysis.init_std(layer.plan, name), rel=5 / factor.numel() ** 0.5)
        assert layer.bias.abs().max() == 0


@every_backend
@every_spec
def test_any_leading_shape_and_layout(spec, backend):
    layer = make(spec, SHAPE, "cpu")
    layer.backend = backend
    x = inputs(layer, 6, 5)
    for view in (
        x,
        x[0],
        x[0, 0],
        x[:0],
        x[:, :0],
        x.transpose(0, 1),
        x[::2, 1::2],
        x.flip(-1),
        x[:1].expand(4, 5, 16),
        x.new_zeros(2, 1, 0, 16),
        torch._neg_view(x),
        torch.stack([x, x], -1)[..., 0],
    ):
        y = layer(view)
        assert y.shape == (*view.shape[:-1], 24)
        assert_close(y, plain(layer, view))


@every_backend
@every_spec
def test_gradients_of_strided_inputs_and_strided_gradients(spec, backend):
    layer = make(spec, SHAPE, "cpu")
    layer.backend = backend
    base = inputs(layer, 5, 6).requires_grad_()
    dy = torch.randn(24, 6, 5, dtype=torch.float64).permute(1, 2, 0)
    weights = tuple(layer.parameters())
    for cotangent in (dy, dy[:1].expand(6, 5, 24), torch._neg_view(dy)):
        found = torch.autograd.grad(layer(base.transpose(0, 1)), (base, *weights), cotangent)
        wanted = torch.autograd.grad(plain(layer, base.transpose(0, 1)), (base, *weights), cotangent)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs)


@every_backend
@every_spec
def test_every_mix_of_frozen_and_trained(spec, backend):
    layer = make(spec, SHAPE, "cpu")
    layer.backend = backend
    tensors = {"x": inputs(layer, 5), **dict(layer.named_parameters())}
    wanted = dict(zip(tensors, gradients(layer, tensors), strict=True))
    for chosen in range(1, 2 ** len(tensors)):
        for bit, tensor in enumerate(tensors.values()):
            tensor.requires_grad_(bool(chosen >> bit & 1)).grad = None
        layer(tensors["x"]).square().sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == tensor.requires_grad
            if tensor.requires_grad:
                assert_close(tensor.grad, wanted[name])
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    assert not layer(tensors["x"]).requires_grad


def gradients(layer, tensors):
    for tensor in tensors.values():
        tensor.requires_grad_()
    return torch.autograd.grad(plain(layer, tensors["x"]).square().sum(), tuple(tensors.values()))


@every_spec
def test_backward_twice_and_with_accumulation(spec):
    layer = make(spec, SHAPE, "cpu")
    x = inputs(layer, 5)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in layer.parameters()]
    loss.backward()
    for p, g in zip(layer.parameters(), once, strict=True):
        assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("backend", ["dense", "copy"])  # the contract suite has "auto"
@pytest.mark.parametrize("spec", SPECS[1:4], ids=str)
def test_gradients_of_gradients_of_the_whole_layer(spec, backend):
    for dtype in (torch.float64, torch.complex128):
        layer = make(spec, (8, 16), "cpu", dtype)
        layer.backend = backend
        names = [name for name, _ in layer.named_parameters()]

        def run(x, *parameters, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

        tensors = (inputs(layer, 2).requires_grad_(), *layer.parameters())
        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@every_spec
def test_forward_mode_through_a_backward_pass_raises_or_is_right(spec):
    layer = make(spec, SHAPE, "cpu")
    x = inputs(layer, 5).requires_grad_()
    for function in (layer, lambda x: plain(layer, x)):
        y = function(x)
        try:
            with forward_ad.dual_level():
                dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
                found = forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent
        except (NotImplementedError, RuntimeError):
            continue
        assert found is not None
        assert_close(found, torch.autograd.grad(plain(layer, x), x, torch.ones_like(y))[0])


def test_no_raw_op_loses_a_tangent():
    """The operators that a layer calls, called by themselves with a dual tensor, raise or are right."""
    layer = make(sl.Monarch(2), SHAPE, "cpu").requires_grad_(False)
    x, factors, text = inputs(layer, 5), [layer.first, layer.second], layer._program.text
    ops = torch.ops.structlin
    y, saved = ops.multiply(x, factors, text), ops.multiply_inputs(x, factors, text)
    *_, first = ops.multiply_backward(y, x, factors, saved, text, [True] * 3)
    for operator, dual, rest in (
        (ops.contract, x, (layer.to_dense().weight, "t i, o i -> t o")),
        (ops.multiply, x, (factors, text)),
        (ops.multiply_inputs, x, (factors, text)),
        (ops.multiply_backward, y, (x, factors, saved, text, [True] * 3)),
        (ops.multiply_last, saved, (factors[1:], 5, text)),
        (ops.multiply_input_backward, [first], (factors[:1], 5, text)),
    ):
        with forward_ad.dual_level(), contextlib.suppress(NotImplementedError, RuntimeError):
            result = operator(tree_map(lambda t: forward_ad.make_dual(t.clone(), torch.ones_like(t)), dual), *rest)
            assert forward_ad.unpack_dual(tree_leaves(result)[0]).tangent is not None


@every_spec
def test_compiled_code_runs_no_product_twice(spec, monkeypatch):
    runs, multiply_then = [], products.multiply_then
    for place in (products, replay):
        monkeypatch.setattr(place, "multiply_then", lambda *given: runs.append(given[0]) or multiply_then(*given))
    layer, found = make(spec, SHAPE, "cpu"), []
    x = inputs(layer, 5)
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        run(x).sum().backward()
        runs.clear()
        run(x).sum().backward()
        found.append(len(runs))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_computed_again_is_the_same_and_not_kept(compiled):
    layer, again = (make(sl.Monarch(2), (24, 16), "cpu") for _ in range(2))
    again.recompute = True
    held: list[int] = []
    results = []
    for module in (layer, again):
        x = inputs(module, 5).requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            y = (torch.compile(module, fullgraph=True) if compiled else module)(x)
        held.append(sum(sizes))
        results.append(torch.autograd.grad(y.square().sum(), (x, *module.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    assert held[1] < held[0]


def test_an_input_of_another_dtype_is_refused_in_words():
    layer = sl.StructuredLinear(16, 24, sl.Monarch(2))
    with pytest.raises(ValueError, match=r"torch\.float64.* torch\.float32.*cast"):
        layer(torch.ones(3, 16, dtype=torch.float64))


@pytest.mark.parametrize("x", [torch.ones(3, 15), torch.ones(3, 17), torch.ones(16, 3), torch.ones(()), torch.ones(0)])
def test_an_input_of_another_width_is_refused_in_words(x):
    with pytest.raises(ValueError, match=r"must be in_features=16, not that of \("):
        sl.StructuredLinear(16, 24, sl.Monarch(2))(x)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_mixes_with_every_input_dtype(backend, dtype):
    layer = make(sl.Monarch(2), SHAPE, "cpu", torch.float32)
    layer.backend = backend
    for given in (torch.float32, dtype):
        x = inputs(layer, 5).to(given).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_close(y, plain(layer, x.float()), 0.05)
        y.sum().backward()
        assert x.grad.dtype == given


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_pass_under_autocast_is_that_of_its_forward_pass(spec, dtype):
    layer = make(spec, SHAPE, "cpu", dtype)
    x = inputs(layer, 5).requires_grad_()
    wanted = torch.autograd.grad(layer(x).sum(), (x, *layer.parameters()))
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.float16):
        given = torch.autograd.grad(y.sum(), (x, *layer.parameters()))
    assert all(torch.equal(*pair) for pair in zip(given, wanted, strict=True))


@every_spec
@pytest.mark.parametrize("bias", [False, True])
def test_the_result_may_be_changed_in_place(spec, bias):
    layer = make(spec, SHAPE, "cpu", bias=bias)
    x = inputs(layer, 2, 3).requires_grad_()
    wanted = torch.autograd.grad(layer(x).relu().sum(), (x, *layer.parameters()))
    given = torch.autograd.grad(layer(x).relu_().sum(), (x, *layer.parameters()))
    assert all(torch.equal(*pair) for pair in zip(given, wanted, strict=True))


def test_the_dense_weight_is_multiplied_out_in_the_dtype_of_autocast(monkeypatch):
    layer, seen, multiply = make(sl.BTT(2), SHAPE, "cpu", torch.float32), [], dense.weight
    layer.backend = "dense"
    monkeypatch.setattr(dense, "weight", lambda plan, factors: seen.append(factors[0].dtype) or multiply(plan, factors))
    x = inputs(layer, 64)
    exact = plain(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert_as_accurate(y, plain(layer, x).bfloat16(), exact)
        y.sum().backward()
        assert seen == [torch.bfloat16]
        with torch.no_grad():  # once for all calls, so as precise as can be
            kept = layer.eval()(x)
            assert torch.equal(layer(x), kept)
    assert seen == [torch.bfloat16, torch.float32]
    assert error(kept, exact) <= error(y, exact)
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@every_backend
def test_inference_before_and_after_autocast(backend):
    for warm in (False, True):
        layer = make(sl.Monarch(2), SHAPE, "cpu", torch.float32).eval()
        layer.backend = backend
        x = inputs(layer, 5)
        with torch.no_grad():
            wanted = plain(layer, x)
            if warm:
                assert_close(layer(x), wanted, 1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert layer(x).dtype == torch.float32
            assert_close(layer(x), wanted, 1e-5)
        with torch.inference_mode():
            assert_close(layer(x), wanted, 1e-5)
        assert_close(layer(x), wanted, 1e-5)


@every_backend
def test_inference_follows_every_way_to_change_a_factor(backend):
    layer = make(sl.Monarch(2), SHAPE, "cpu").eval()
    layer.backend = backend
    x = inputs(layer, 5)
    changes = (
        lambda: layer.first.mul_(2),
        lambda: setattr(layer.first, "data", 2 * layer.first.data),
        lambda: setattr(layer, "first", nn.Parameter(2 * layer.first)),
        lambda: layer.load_state_dict({name: 3 * p for name, p in layer.state_dict().items()}),
        lambda: layer.load_state_dict({name: 3 * p for name, p in layer.state_dict().items()}, assign=True),
        lambda: torch.optim.SGD(layer.parameters(), lr=0.1).step(lambda: None),
        lambda: layer.reset_parameters(),
        lambda: layer.float(),
        lambda: layer.double(),
    )
    with torch.no_grad():
        layer(x)
        for change in changes:
            change()
            given = x.to(layer.first.dtype)
            assert_close(layer(given), plain(layer, given), 1e-5)


def test_dense_is_linear():
    layer, linear = sl.StructuredLinear(16, 24, sl.Dense()), nn.Linear(16, 24)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), linear(x))
    with FlopCounterMode(display=False) as ours:
        layer(x)
    with FlopCounterMode(display=False) as theirs:
        linear(x)
    assert ours.get_flop_counts() == {"Global": theirs.get_flop_counts()["Global"]} | {
        name: count for name, count in ours.get_flop_counts().items() if name != "Global"
    }


@every_spec
def test_dense_form_keeps_dtype_flags_and_the_random_state(spec):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex64):
        layer = make(spec, SHAPE, "cpu", dtype).eval()
        layer.bias.requires_grad_(False)
        state = torch.get_rng_state()
        dense = layer.to_dense()
        assert torch.equal(torch.get_rng_state(), state)
        assert type(dense) is nn.Linear
        assert dense.weight.dtype == dtype
        assert dense.weight.is_contiguous()
        assert (dense.weight.requires_grad, dense.bias.requires_grad, dense.training) == (True, False, False)
        x = inputs(layer, 5)
        assert_close(dense(x), layer(x), 0.03 if dtype == torch.bfloat16 else 1e-5)
    assert make(spec, SHAPE, "cpu", bias=False).to_dense().bias is None


def test_dense_form_of_a_half_precision_layer_is_rounded_once():
    layer = make(sl.Monarch(2), SHAPE, "cpu", torch.bfloat16)
    exact = make(sl.Monarch(2), SHAPE, "cpu")
    exact.load_state_dict(layer.state_dict())
    wanted = exact.to_dense().weight.bfloat16()
    assert torch.equal(layer.to_dense().weight, wanted)


def test_dense_form_is_as_precise_under_autocast():
    layer = make(sl.Monarch(2), SHAPE, "cpu", torch.float32)
    wanted = layer.to_dense().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.to_dense().weight, wanted)


def test_dense_form_can_be_trained_if_any_factor_can():
    layer = make(sl.LowRank(4), SHAPE, "cpu")
    layer.down.requires_grad_(False)
    assert layer.to_dense().weight.requires_grad
    layer.up.requires_grad_(False)
    assert not layer.to_dense().weight.requires_grad


@every_spec
def test_the_meta_device_computes_shapes(spec):
    layer = sl.StructuredLinear(16, 24, spec, device="meta")
    assert layer(torch.ones(3, 5, 16, device="meta")).shape == (3, 5, 24)
    assert layer.to_dense().weight.is_meta


@every_backend
@every_spec
def test_copies_compute_the_same(spec, backend):
    layer = make(spec, SHAPE, "cpu")
    layer.backend = backend
    x = inputs(layer, 5)
    with torch.no_grad():
        wanted = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.backend == backend
            assert torch.equal(twin(x), wanted)
            next(twin.parameters()).zero_()
            assert_close(twin(x), plain(twin, x))
        assert torch.equal(layer(x), wanted)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@every_spec
def test_moving_to_another_dtype_moves_all(spec):
    layer = make(spec, SHAPE, "cpu")
    x = inputs(layer, 5)
    assert layer.float()(x.float()).dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert make(spec, SHAPE, "cpu").to(torch.complex128)(x.to(torch.complex128)).dtype == torch.complex128


@every_backend
def test_a_parametrized_factor_is_followed(backend):
    layer = make(sl.LowRank(4), SHAPE, "cpu")
    layer.backend = backend
    parametrizations.orthogonal(layer, "down")
    x = inputs(layer, 5)
    assert_close(layer.down @ layer.down.T, torch.eye(4, dtype=torch.float64))
    assert_close(layer(x), x @ (layer.up @ layer.down).T + layer.bias)
    layer(x).sum().backward()
    assert layer.parametrizations.down.original.grad.abs().sum() > 0


@every_spec
def test_activation_checkpointing_gives_the_same_gradients(spec):
    layer = make(spec, SHAPE, "cpu")
    x = inputs(layer, 5).requires_grad_()
    tensors = (x, *layer.parameters())
    for reentrant in (False, True):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        if reentrant:
            y.square().sum().backward()
            found = [t.grad for t in tensors]
        else:
            found = torch.autograd.grad(y.square().sum(), tensors)
        for ours, theirs in zip(found, torch.autograd.grad(plain(layer, x).square().sum(), tensors), strict=True):
            assert_close(ours, theirs)


@every_spec
def test_an_ensemble_by_vmap_over_the_parameters(spec):
    layers = [make(spec, SHAPE, "cpu") for _ in range(3)]
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            p.data.mul_(i + 1)
    stacked, _ = torch.func.stack_module_state(layers)
    x = inputs(layers[0], 5)
    y = torch.vmap(lambda state: torch.func.functional_call(layers[0], state, x))(stacked)
    for ours, layer in zip(y, layers, strict=True):
        assert_close(ours, plain(layer, x))


@every_spec
def test_flops_backward_are_twice_those_forward(spec):
    layer = make(spec, SHAPE, "cpu", bias=False)
    x = inputs(layer, 7).requires_grad_()
    with FlopCounterMode(display=False) as counted:
        y = layer(x)
    assert counted.get_total_flops() == 7 * analysis.flops(layer.plan)
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2 * 7 * analysis.flops(layer.plan)


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_compiled_for_any_number_of_tokens(backend):
    layer = make(sl.Monarch(2), SHAPE, "cpu")
    layer.backend = backend
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8, 5):
        x = inputs(layer, tokens, 2).requires_grad_()
        tensors = (x, *layer.parameters())
        found = torch.autograd.grad(compiled(x).square().sum(), tensors)
        for ours, theirs in zip(found, torch.autograd.grad(plain(layer, x).square().sum(), tensors), strict=True):
            assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(compiled(x), plain(layer, x))


def test_gradients_by_transform_inside_compiled_code():
    layer = make(sl.Dyad(4), SHAPE, "cpu")
    state, x = dict(layer.named_parameters()), inputs(layer, 5)

    def loss(state):
        return torch.func.functional_call(layer, state, x).square().sum()

    torch._dynamo.reset()
    found = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(state)
    wanted = torch.autograd.grad(plain(layer, x).square().sum(), tuple(state.values()))
    for ours, theirs in zip(found.values(), wanted, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("spec", ["monarch", sl.Monarch, None])
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(ValueError, match=r"is no spec; give one, as Monarch\(nblocks=4\)"):
        sl.StructuredLinear(16, 24, spec)


def test_compiled_where_relayouts_are_views():
    """At a prime width a digit has size 1; an operator may return no view of its input, and says so by a warning."""
    for pad in (False, True):
        compiles_whole(sl.TensorTrain(cores=2, rank=3, pad=pad), (24 - pad, 13), "cpu")


def test_compiled_code_is_kept_by_the_source_of_its_operators():
    """PyTorch's compile caches go by what was traced, so that has to say which source the operator was."""
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    layer = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4), backend="bmm")
    x = torch.randn(3, 16)
    assert torch.equal(torch.compile(layer, backend=keep, fullgraph=True)(x), layer(x))
    assert REVISION in graphs[0]
    assert program(layer._program.text + REVISION).text == layer._program.text


def test_a_kept_weight_is_never_that_of_parameters_that_are_gone():
    """Memory is used again: a new factor may lie where an old one was, at the same version."""
    layer = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4), bias=False, backend="dense").eval()
    other = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4), bias=False, backend="bmm")
    x = torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(40):
            state = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
            other.load_state_dict(state)
            assert_close(torch.func.functional_call(layer, state, (x,)), other(x), 1e-5)
            del state


def test_transforms_see_through_a_dense_weight_in_inference():
    layer = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4), backend="dense").eval()
    x = torch.randn(3, 16)
    state = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    with torch.no_grad():
        found = torch.vmap(lambda one: torch.func.functional_call(layer, one, (x,)))(state)
        single = torch.func.functional_call(layer, {name: p[1] for name, p in state.items()}, (x,))
    assert_close(found[1], single, 1e-5)


def test_a_layer_is_called_by_keyword_as_a_dense_one():
    x = torch.randn(3, 16)
    layer = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4))
    assert torch.equal(layer(input=x), layer(x))


@every_backend
def test_sequences_of_several_lengths(backend):
    layer, there = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4), backend=backend), (2, 0, 3)
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in there], layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert torch.equal(y.values(), layer(x.values()))
    (x + layer(y)).values().square().sum().backward()
    assert x.grad.values().abs().min() > 0
    with pytest.raises(ValueError, match=r"allowed: torch\.jagged, with lengths in dimension 1"):
        layer(x.transpose(1, 2))


def test_a_kept_weight_is_not_copied():
    layer = sl.StructuredLinear(64, 64, sl.Monarch(nblocks=4), backend="dense").eval()
    small = len(pickle.dumps(layer))
    with torch.no_grad():
        y = layer(torch.eye(64))
        assert len(pickle.dumps(layer)) == small
        assert torch.equal(copy.deepcopy(layer)(torch.eye(64)), y)
