"""The operator by itself: what it computes, what it refuses, and that no derivative of it goes wrong quietly."""

import contextlib
from math import prod

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.flop_counter import FlopCounterMode

from structlin.ops import STEP_BACKENDS, contract, reference
from structlin.testing import assert_close

EQUATION = "t g k, g n k -> t g n"
EQUATIONS = [
    EQUATION,
    "t i, o i -> t o",
    "t b a, d a -> t b d",  # b waits
    "t k i, k j r i -> t k j r",
    "t k j r, j o k r -> t j o",
    "a b, b c -> c a",  # no tokens, transposed
    "a b, a b -> a b",  # nothing summed
    "a b, a b -> ",  # everything summed
    "a, b -> b a",  # an outer product
]
every_backend = pytest.mark.parametrize("backend", STEP_BACKENDS)
every_equation = pytest.mark.parametrize("equation", EQUATIONS)
raw = torch.ops.structlin.contract.default


def operands(equation=EQUATION, dtype=torch.float64, **sizes):
    left, right = equation.split(" -> ")[0].split(", ")
    size = {axis: 2 + i % 4 for i, axis in enumerate(sorted(set((left + " " + right).split())))} | sizes
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn([size[axis] for axis in axes.split()], dtype=dtype, generator=generator) for axes in (left, right)
    ]


def truth(a, b, equation):
    return torch.einsum(equation.replace(" ", ""), a, b)


@every_backend
@every_equation
def test_it_is_einsum_into_contiguous_memory(equation, backend):
    for dtype in (torch.float64, torch.complex128):
        a, b = operands(equation, dtype)
        c = contract(a, b, equation, backend)
        assert_close(c, truth(a, b, equation))
        assert c.is_contiguous()
        assert not c.is_conj()


@every_backend
def test_axes_may_have_long_names_and_any_size(backend):
    a, b = operands("t k i, k r i -> t k r", t=0)
    assert contract(a, b, "t k i, k r i -> t k r", backend).shape[0] == 0
    a, b = operands("t k i, k r i -> t k r", i=0)
    assert contract(a, b, "t k i, k r i -> t k r", backend).abs().sum() == 0
    a, b = operands("t k i, k r i -> t k r", t=1, k=1)
    assert_close(contract(a, b, "token K i0, K r_1 i0 -> token K r_1", backend), truth(a, b, "tki,kri->tkr"))


def strided(x):
    """The same values with every axis strided, and memory around them that is NaN."""
    wide = x.new_full([2 * n + 1 for n in x.shape], float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x):
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def conjugated(x):
    return x.conj().resolve_conj().conj() if x.is_complex() else x.clone()


def negated(x):
    return torch._neg_view(-x) if not x.is_complex() else x


def expanded(x):
    return x[..., :1].expand(x.shape)


def offset(x):
    return torch.cat([x.new_full((3,), float("nan")), x.flatten()])[3:].view(x.shape)


@every_backend
@pytest.mark.parametrize("layout", [strided, transposed, conjugated, negated, expanded, offset])
@pytest.mark.parametrize("equation", EQUATIONS[:6])
def test_operands_may_lie_in_memory_as_they_like(equation, layout, backend):
    for dtype in (torch.float64, torch.complex128):
        a, b = map(layout, operands(equation, dtype))
        before = a.clone(), b.clone()
        a.requires_grad_(), b.requires_grad_()
        c = contract(a, b, equation, backend)
        assert_close(c, truth(a, b, equation))
        dc = torch.randn_like(c)
        for ours, theirs in zip(
            torch.autograd.grad(c, (a, b), layout(dc)),
            torch.autograd.grad(truth(a, b, equation), (a, b), layout(dc)),
            strict=True,
        ):
            assert_close(ours, theirs)
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


@every_backend
@every_equation
def test_gradients_once_and_twice_real_and_complex(equation, backend):
    for dtype in (torch.float64, torch.complex128):
        inputs = tuple(x.requires_grad_() for x in operands(equation, dtype))
        assert torch.autograd.gradcheck(lambda a, b: contract(a, b, equation, backend), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda a, b: contract(a, b, equation, backend), inputs, fast_mode=True)


def test_complex_gradients_are_conjugated_as_pytorch_does():
    a, b = (x.requires_grad_() for x in operands(dtype=torch.complex128))
    loss = contract(a, b, EQUATION).abs().square().sum()
    wanted = truth(a, b, EQUATION).abs().square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True):
        assert_close(ours, theirs)


@every_backend
def test_only_the_gradients_that_are_wanted(backend):
    a, b = operands()
    for flags in ((True, False), (False, True), (True, True), (False, False)):
        x, w = (t.clone().requires_grad_(flag) for t, flag in zip((a, b), flags, strict=True))
        c = contract(x, w, EQUATION, backend)
        assert c.requires_grad == any(flags)
        if any(flags):
            c.sum().backward()
        assert ((x.grad is not None), (w.grad is not None)) == flags
    with torch.no_grad():
        assert not contract(a.requires_grad_(), b, EQUATION, backend).requires_grad
    with torch.inference_mode():
        assert_close(contract(a, b, EQUATION, backend), truth(a, b, EQUATION))


def test_an_operand_that_changes_before_the_backward_pass_is_an_error():
    a, b = (x.requires_grad_() for x in operands())
    c = contract(a, b, EQUATION)
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.sum().backward()


@pytest.mark.parametrize(
    ("equation", "problem"),
    [
        ("t g k, g n k", "is not of the form"),
        ("t g k g n k -> t g n", "is not of the form"),
        ("t g k, g n k, n m -> t g m", "is not of the form"),
        ("t g k, g n k -> t g n q", "axis 'q' must occur once in two or three"),
        ("t g k q, g n k -> t g n", "axis 'q' must occur once in two or three"),
        ("t g g, g n g -> t g n", "axis 'g' must occur once in two or three"),
        ("t g k, g n k -> t g n n", "axis 'n' must occur once in two or three"),
        ("", "is not of the form"),
    ],
)
def test_a_malformed_equation_is_refused(equation, problem):
    with pytest.raises(ValueError, match=problem):
        contract(torch.ones(2, 2, 2), torch.ones(2, 2, 2), equation)


@every_backend
@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (torch.ones(5, 2), torch.ones(2, 4, 3), "takes 3 and 3 axes, not 2 and 3"),
        (torch.ones(5, 2, 3), torch.ones(2, 4, 3, 1), "takes 3 and 3 axes, not 3 and 4"),
        (torch.ones(5, 2, 3), torch.ones(2, 4, 4), "axis 'k' of .* has size 3 in one operand and 4 in the other"),
        (torch.ones(5, 1, 3), torch.ones(2, 4, 3), "axis 'g' of .* has size 1 in one operand and 2 in the other"),
        (torch.ones(5, 2, 3), torch.ones(1, 4, 3), "axis 'g' of .* has size 2 in one operand and 1 in the other"),
        (torch.ones(5, 2, 3).double(), torch.ones(2, 4, 3), "dtypes torch.float64 and torch.float32; cast one"),
        (torch.ones(5, 2, 3).cfloat(), torch.ones(2, 4, 3), "dtypes torch.complex64 and torch.float32; cast one"),
    ],
)
def test_operands_that_do_not_match_are_refused_and_never_broadcast(a, b, problem, backend):
    with pytest.raises(ValueError, match=problem):
        contract(a, b, EQUATION, backend)


@every_backend
def test_the_raw_op_never_reads_beside_its_operands(backend):
    _, b = operands("t g k, g n k -> t g n", g=2, k=3)
    for shape in ((5, 2, 4), (5, 1, 3), (5, 3, 3), (5, 6)):
        with pytest.raises((ValueError, RuntimeError)):
            raw(torch.ones(shape, dtype=b.dtype), b, EQUATION, backend)
    with pytest.raises((ValueError, RuntimeError)):
        raw(torch.ones(5, 2, 3, dtype=b.dtype), b, EQUATION, "cublas")


@pytest.mark.parametrize("backend", ["auto", "cublas", ""])
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' is unknown; allowed for one contraction: reference"):
        contract(*operands(), EQUATION, backend)


@every_backend
def test_autocast_casts_as_it_does_for_linear(backend):
    for dtype, wanted in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float64,) * 2):
        a, b = (x.to(dtype).requires_grad_() for x in operands())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            c = contract(a, b, EQUATION, backend)
            mixed = contract(a.to(wanted), b, EQUATION, backend)
        assert c.dtype == mixed.dtype == wanted
        c.sum().backward()
        assert a.grad.dtype == b.grad.dtype == dtype
    with torch.autocast("cpu", enabled=False):
        assert contract(*operands(dtype=torch.float32), EQUATION, backend).dtype == torch.float32


def test_the_meta_device_gives_the_shape():
    for dtype in (torch.float32, torch.float64, torch.complex64):
        a, b = (x.to("meta") for x in operands(dtype=dtype))
        assert contract(a, b, EQUATION).shape == truth(*operands(), EQUATION).shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert contract(a, b, EQUATION).dtype == dtype


@pytest.mark.parametrize("equation", EQUATIONS[:6])  # PyTorch counts products of matrices, and no others
def test_the_flop_counter_knows_it_forward_and_backward(equation):
    a, b = (x.requires_grad_() for x in operands(equation))
    axes_a, axes_b = (axes.split() for axes in equation.split(" -> ")[0].split(", "))
    forward = 2 * prod({**dict(zip(axes_a, a.shape, strict=True)), **dict(zip(axes_b, b.shape, strict=True))}.values())
    with FlopCounterMode(display=False) as counted:
        c = contract(a, b, equation)
    assert counted.get_total_flops() == forward
    with FlopCounterMode(display=False) as counted:
        c.sum().backward()
    assert counted.get_total_flops() == 2 * forward


@every_backend
@pytest.mark.parametrize("equation", EQUATIONS[3:6])
def test_pytorch_checks_the_registration(equation, backend):
    a, b = (x.requires_grad_() for x in operands(equation))
    torch.library.opcheck(raw, (a, b, equation, backend))


@every_backend
def test_transforms_see_through(backend):
    a, b = operands()
    da, db = operands(dtype=torch.float64, t=2)[0].new_ones(a.shape), torch.ones_like(b)

    def ours(a, b):
        return contract(a, b, EQUATION, backend)

    def theirs(a, b):
        return truth(a, b, EQUATION)

    for transform in (
        lambda f: torch.func.grad(lambda a, b: f(a, b).square().sum(), argnums=(0, 1))(a, b),
        lambda f: torch.func.jvp(f, (a, b), (da, db)),
        lambda f: torch.func.vjp(f, a, b)[1](theirs(a, b)),
        lambda f: (torch.func.jacrev(f)(a, b), torch.func.jacfwd(f)(a, b)),
        lambda f: (torch.func.hessian(lambda b: f(a, b).pow(3).sum())(b),),
        lambda f: (torch.vmap(f)(torch.stack([a, 2 * a]), torch.stack([b, 3 * b])),),
        lambda f: (torch.vmap(f, in_dims=(None, 1))(a, torch.stack([b, 3 * b], 1)),),
        lambda f: torch.vmap(torch.func.grad(lambda a, b: f(a[None], b).sum(), argnums=(0, 1)), in_dims=(0, None))(
            a, b
        ),
    ):
        for x, y in zip(transform(ours), transform(theirs), strict=True):
            assert_close(x, y)


def tangent(run, primal, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(primal, direction))).tangent


def test_forward_mode_has_the_tangent():
    a, b = operands()
    assert_close(tangent(lambda x: contract(x, b, EQUATION), a, 2 * a), 2 * truth(a, b, EQUATION))
    assert_close(tangent(lambda w: contract(a, w, EQUATION), b, 3 * b), 3 * truth(a, b, EQUATION))


def test_forward_mode_through_a_backward_pass_raises_or_is_right():
    a, b = (x.requires_grad_() for x in operands())
    c = contract(a, b, EQUATION)
    try:
        found = tangent(lambda dc: torch.autograd.grad(c, a, dc)[0], torch.ones_like(c), torch.ones_like(c))
    except (NotImplementedError, RuntimeError):
        return
    assert_close(found, torch.autograd.grad(truth(a, b, EQUATION), a, torch.ones_like(c))[0])


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, a: torch.func.grad(lambda a: f(a).sum())(a),
        lambda f, a: torch.func.jvp(f, (a,), (a,)),
        lambda f, a: torch.func.vjp(f, a)[1](f(a)),
        lambda f, a: torch.func.jacfwd(f)(a),
        lambda f, a: tangent(f, a, a),
    ],
    ids=["grad", "jvp", "vjp", "jacfwd", "dual"],
)
def test_the_raw_op_raises_where_it_has_no_derivative(transform):
    a, b = operands()
    with pytest.raises(NotImplementedError, match=r"call structlin\.ops\.contract"):
        transform(lambda a: raw(a, b, EQUATION), a)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_has_the_values_and_gradients(backend):
    torch._dynamo.reset()

    def run(a, b):
        return contract(a, b, EQUATION).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for tokens in (2, 5, 7):
        a, b = (x.requires_grad_() for x in operands(t=tokens))
        assert_close(compiled(a, b), run(a, b))
        for ours, theirs in zip(
            torch.autograd.grad(compiled(a, b), (a, b)), torch.autograd.grad(run(a, b), (a, b)), strict=True
        ):
            assert_close(ours, theirs)


def test_compiled_code_calls_one_op_per_contraction():
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda a, b: contract(a, b, EQUATION), fullgraph=True, backend=keep)(*operands())
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls == [raw]


def test_a_transform_inside_compiled_code_and_around_it():
    a, b = operands()

    def loss(b):
        return contract(a, b, EQUATION).square().sum()

    wanted = torch.func.grad(lambda b: truth(a, b, EQUATION).square().sum())(b)
    torch._dynamo.reset()
    inside = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert_close(inside(b), wanted)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(b), loss(b))
    # what was compiled outside of a transform must not be used inside, where PyTorch may refuse
    with contextlib.suppress(torch._dynamo.exc.Unsupported):
        assert_close(torch.func.grad(compiled)(b), wanted)
    with contextlib.suppress(NotImplementedError):
        assert_close(tangent(compiled, b, b), (wanted * b).sum())


def test_export_gives_plain_pytorch():
    class Module(torch.nn.Module):
        def forward(self, a, b):
            return contract(a, b, EQUATION)

    a, b = operands()
    program = torch.export.export(Module(), (a, b))
    assert not [node for node in program.graph.nodes if "structlin" in str(node.target)]
    assert_close(program.module()(a, b), truth(a, b, EQUATION))


def test_the_reference_takes_up_to_52_axes():
    names = [f"n{i}" for i in range(53)]
    with pytest.raises(ValueError, match="may have 52 axes, not 53"):
        reference.contract(torch.ones([1] * 53), torch.ones([1] * 53), f"{' '.join(names)}, {' '.join(names)} -> n0")
