"""Every kernel compiles for Hopper, at the sizes of the benchmarks, on a machine without a GPU.

The interpreter runs what a kernel computes, but takes types, layouts and sizes that the compiler refuses.
"""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = 227 * 1024  # bytes that a program may have on an H100 or H200
DIGITS = [(32, 32, 64, 64), (64, 32, 64, 128), (64, 64, 64, 64), (24, 32, 64, 48)]  # of mixtures


@pytest.fixture
def built(monkeypatch):
    """The names of the kernels that were launched, each of which is compiled instead of run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    from structlin.kernels import across, blocks

    found = set()

    def build(kernel, *args, grid, warmup=False, **options):
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        signature, constants, facts = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[i,] = "constexpr", value
            else:
                signature[parameter.name] = mangle_type(value)
                if isinstance(value, torch.Tensor):
                    facts[i,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, facts)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.metadata.shared <= SHARED, kernel.__name__
        found.add(kernel.__name__)

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what it is unless set, but newer ones warn
    monkeypatch.setattr(JITFunction, "run", build)
    for module in (across, blocks):
        monkeypatch.setattr(module, "_programs", lambda _: 132)
    return found


def rand(*size, dtype=torch.bfloat16):
    return torch.randn(size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_copies(built, dtype):
    from structlin.kernels.join import join, unjoin
    from structlin.kernels.relayout import exchange

    for a, b, r in ((4, 4, 48), (8, 8, 32), (16, 16, 16), (64, 64, 1), (8, 96, 1)):
        x = rand(8, a, b, r, dtype=dtype)
        exchange(x, torch.empty_like(x), a, b, r)
        exchange(x, torch.empty_like(x), a, b, r, add=True)
    for swap in ((4, 256, 1), (8, 512, 1)):
        for exchanged in (0, 1):
            z = join(rand(8, swap[0] * swap[1], dtype=dtype), swap, swap[1], exchanged)
            unjoin(z, swap, swap[1], exchanged)
    assert built == {"_exchange", "_join", "_unjoin"}


def test_dense_weights_of_two_factors(built):
    from structlin.ops.gemm import contract_anywhere

    train = "o0 r i0, o1 i1 r -> o0 o1 i0 i1", {"o0": 64, "o1": 64, "i0": 64, "i1": 64, "r": 8}
    wide = "g f r a, f e g r -> f e g a", {"f": 16, "e": 256, "g": 256, "a": 16, "r": 8}
    for equation, sizes in (train, wide):
        a, b, c = (part.split() for part in equation.replace("->", ",").split(","))
        for left, right, out in ((a, b, c), (c, b, a), (a, c, b)):
            operands = (rand(*(sizes[axis] for axis in axes)) for axes in (left, right))
            assert contract_anywhere(*operands, f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}") is not None
    assert built == {"_product"}


@pytest.mark.parametrize("digit", [8, 16, 32])
def test_both_gradients_of_a_step(built, digit):
    from structlin.kernels.gradients import gradients

    groups, tokens = 64, 4096
    d, z, w = rand(digit, groups, tokens), rand(groups, digit, tokens), rand(groups, digit, digit)
    across, within = (tokens, groups * tokens), (digit * tokens, tokens)
    gradients(d, z, w, (groups, tokens, digit, digit), (across, within, across, (digit * digit, digit, 1)))
    assert built == {"_gradients"}


def test_a_step_that_stores_across(built):
    from structlin.kernels.across import across

    dtype = torch.bfloat16
    for groups, k, o, i in ((4, 192, 4, 48), (8, 256, 8, 32), (64, 64, 64, 1), (64, 64, 64, 4)):
        for a_last, k_inner in itertools.product((True, False), repeat=2):
            tokens = 4096
            a = torch.empty((groups, k, tokens) if a_last else (tokens, groups, k), dtype=dtype)
            w = torch.empty((groups, o * i, k) if k_inner else (groups, k, o * i), dtype=dtype)
            across(a, w, tokens, groups, k, o * i, i, a_last, k_inner)
    assert built == {"_across"}


@pytest.mark.parametrize("block", [64, 128, 256])
def test_sums_of_blocks(built, block):
    from structlin.kernels.blocks import gradient_of_blocks, sum_of_blocks

    table = tuple(tuple(row ^ other for other in (0, 1, 2, 4)) for row in range(16))
    used = tuple(tuple((block ^ other) + 4096 * slot for slot, other in enumerate((0, 1, 2, 4))) for block in range(16))
    x, dy, w, z = rand(512, 16, block), rand(512, 16, block), rand(16, block, 4, block), rand(512, 128)
    sum_of_blocks(x, w, table, False)
    sum_of_blocks(x, w, table, False, dy)
    sum_of_blocks(x, w, table, False, pair=(z, rand(16 * block, 128)))
    sum_of_blocks(dy, w, used, True, pair=(z, rand(128, 16 * block)))
    gradient_of_blocks(x, dy, table)
    gradient_of_blocks(x, dy, table, z, parts=2)
    assert built == {"_sum_of_blocks", "_gradient_of_blocks", "_total"}


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 2), (8, 1), (8, 4)])
def test_mixtures(built, experts, top_k):
    from structlin.kernels import route, routed
    from structlin.kernels.sets import group

    tokens = 256
    for digits in DIGITS if (experts, top_k) == (8, 2) else DIGITS[1:2]:
        c, a, f, o = digits
        x, dy, weight = rand(tokens, c * a), rand(tokens, f * o), rand(experts, c * a)
        first, second = rand(experts, c, f, a), rand(experts, f, o, c)
        for bias in (None, torch.zeros(experts)):
            logits, gate, chosen = route.route(x, weight, bias, top_k)
        group(chosen.expand(512, *chosen.shape).flatten(0, 1), experts)
        sets = group(chosen, experts)
        _, z = routed.forward(x, first, second, gate, sets)
        dz, _, parts = routed.backward_second(dy, second, gate, z, sets)
        for dgate, lost in itertools.product((None, gate), (None, logits)):
            dlogits = route.unroute(parts, dgate, lost, gate, experts, sets)
        routed.backward_first(dz, x, first, sets)
        routed.backward_first(dz, x, first, sets, dlogits, weight)
    assert built >= {"_route", "_count", "_start", "_place", "_first", "_second", "_second_backward", "_unroute",
                     "_first_backward", "_add_units"}  # fmt: skip
