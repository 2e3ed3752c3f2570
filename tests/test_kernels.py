"""The Triton kernels against plain PyTorch, on Triton's interpreter where there is no GPU, into poisoned memory."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

EXCHANGES = [(5, 4, 4, 16), (3, 3, 5, 7), (7, 64, 64, 1), (3, 8, 96, 1), (0, 2, 2, 2), (2, 4, 200, 64), (3, 8, 8, 4)]
PRODUCTS = [
    (72, 4, 64, 4, 16),
    (40, 3, 32, 2, 32),
    (128, 4, 48, 4, 24),
    (64, 2, 80, 1, 64),
    (56, 8, 16, 8, 1),
    (8, 2, 64, 16, 4),
    (8, 2, 32, 2, 256),
]


def fenced(tensor):
    """The same values in the middle of NaNs, so that a read past either end shows."""
    memory = torch.full([tensor.numel() + 256], float("nan"), dtype=tensor.dtype, device=tensor.device)
    memory[128:-128] = tensor.flatten()
    return memory[128:-128].view(tensor.shape)


def check_exchange(device):
    from structlin.kernels.relayout import exchange

    for tokens, a, b, r in EXCHANGES:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x = fenced(torch.randn(tokens, a, b, r, device=device).to(dtype))
            y = torch.full((tokens, b, a, r), float("nan"), dtype=dtype, device=device)
            exchange(x, y, a, b, r)
            assert torch.equal(y, x.permute(0, 2, 1, 3)), (tokens, a, b, r, dtype)
            exchange(x, y, a, b, r, add=True)
            assert torch.equal(y, 2 * x.permute(0, 2, 1, 3)), (tokens, a, b, r, dtype)


def check_join(device):
    from structlin.kernels.join import join, unjoin

    for tokens, a, b, r in [(5, 6, 4, 1), (3, 40, 8, 1), (7, 5, 3, 2), (0, 2, 2, 1), (2, 4, 200, 4), (3, 1, 4, 8)]:
        for rows, exchanged, dtype in itertools.product((b, 1), (0, 1), (torch.float16, torch.float64)):
            features = a * b * r
            x = fenced(torch.randn(tokens, features, device=device).to(dtype))
            halves = [x, x.view(tokens, a, b, r).permute(0, 2, 1, 3).reshape(tokens, features)]
            wanted = torch.stack([h.view(tokens, rows, features // rows) for h in halves][:: 2 * exchanged - 1], 2)
            z = join(x, (a, b, r), features // rows, exchanged)
            assert torch.equal(z.view(wanted.shape), wanted), (tokens, a, b, r, rows, exchanged, dtype)
            z = fenced(torch.randn(tokens, 2 * features, device=device).to(dtype))
            plain, moved = z.view(wanted.shape).unbind(2)[:: 2 * exchanged - 1]
            moved = moved.reshape(tokens, b, a, r).permute(0, 2, 1, 3)
            total = plain.reshape(tokens, features) + moved.reshape(tokens, features)
            assert torch.equal(unjoin(z, (a, b, r), features // rows, exchanged), total)


WEIGHTS = [  # the weight of a matrix of two factors, and the size of each digit
    ("o0 r i0, o1 i1 r -> o0 o1 i0 i1", {"o0": 8, "o1": 24, "i0": 40, "i1": 64, "r": 8}),  # a tensor train
    ("i1 o0 r i0, o0 o1 i1 r -> o0 o1 i1 i0", {"o0": 4, "o1": 72, "i1": 48, "i0": 16, "r": 8}),  # BTT
    ("i1 o0 r i0, o0 o1 i1 r -> o0 o1 i1 i0", {"o0": 5, "o1": 7, "i1": 6, "i0": 3, "r": 20}),
    ("i1 o0 r i0, o0 o1 i1 r -> o0 o1 i1 i0", {"o0": 16, "o1": 16, "i1": 16, "i0": 16, "r": 1}),
    ("p q r, s t r -> p s q t", {"p": 32, "q": 64, "s": 4, "t": 8, "r": 8}),  # the last factor has few programs
    ("d a, e b -> e d b a", {"d": 12, "a": 20, "e": 9, "b": 33}),  # a Kronecker product
]


def check_product(device):
    from structlin.ops import reference
    from structlin.ops.gemm import contract_anywhere
    from structlin.testing import assert_as_accurate

    poison(device)
    dtype, ran = torch.float16, 0
    for equation, sizes in WEIGHTS:
        axes_a, axes_b, axes_c = (part.strip() for part in equation.replace("->", ",").split(","))
        shape = {axes: [sizes[axis] for axis in axes.split()] for axes in (axes_a, axes_b, axes_c)}
        for left, right, out in ((axes_a, axes_b, axes_c), (axes_c, axes_b, axes_a), (axes_a, axes_c, axes_b)):
            a, b = (fenced(torch.randn(shape[axes], device=device).to(dtype)) for axes in (left, right))
            found = contract_anywhere(a, b, turned := f"{left}, {right} -> {out}")
            if found is not None:
                ran += 1
                true = reference.contract(a.double(), b.double(), turned)
                assert_as_accurate(found, reference.contract(a, b, turned), true)
    assert ran >= 12


def check_across(device):
    from structlin.kernels.across import across
    from structlin.testing import assert_as_accurate

    for tokens, g, k, o, i in PRODUCTS:
        for a_last, k_inner in itertools.product((True, False), repeat=2):
            a = fenced(torch.randn((g, k, tokens) if a_last else (tokens, g, k), device=device, dtype=torch.float16))
            w = fenced(torch.randn((g, o * i, k) if k_inner else (g, k, o * i), device=device, dtype=torch.float16))
            equation = f"{'gkt' if a_last else 'tgk'},{'gnk' if k_inner else 'gkn'}->gnt"

            def product(a, w, equation=equation, shape=(g, o, i, tokens)):
                return torch.einsum(equation, a, w).view(shape).permute(1, 0, 2, 3)

            ours = across(a, w, tokens, g, k, o * i, i, a_last, k_inner)
            assert_as_accurate(ours, product(a, w), product(a.double(), w.double()))


def check_blocks(device):
    from structlin.kernels.blocks import gradient_of_blocks, sum_of_blocks
    from structlin.testing import assert_as_accurate

    for tokens, n, k, slots in [(70, 64, 128, 2), (129, 128, 64, 5), (3, 256, 192, 8)]:
        rows = blocks = 8
        table = tuple(tuple((row ^ slot) for slot in range(slots)) for row in range(rows))
        used = tuple(tuple((b ^ slot) + 4096 * slot for slot in range(slots)) for b in range(blocks))
        half = {"device": device, "dtype": torch.float16}
        x, dy = fenced(torch.randn(tokens, blocks, k, **half)), fenced(torch.randn(tokens, rows, n, **half))
        w = fenced(torch.randn(rows, n, slots, k, **half))
        there, index = torch.randn(tokens, rows, n, **half), torch.tensor(table, device=device)

        def forward(x, dy, w, index=index):
            return torch.einsum("tisk,insk->tin", x[:, index], w)

        def dgrad(x, dy, w, index=index):
            return torch.zeros_like(x).index_add(
                1, index.flatten(), torch.einsum("tin,insk->tisk", dy, w).flatten(1, 2)
            )

        def wgrad(x, dy, w, index=index):
            return torch.einsum("tisk,tin->insk", x[:, index], dy)

        def added(x, dy, w, there=there, forward=forward):
            return there.to(x.dtype) + forward(x, dy, w)

        for ours, plain in (
            (sum_of_blocks(x, w, table, False), forward),
            (sum_of_blocks(x, w, table, False, there.clone()), added),
            (sum_of_blocks(dy, w, used, True), dgrad),
            (gradient_of_blocks(x, dy, table)[0], wgrad),
        ):
            assert_as_accurate(ours, plain(x, dy, w), plain(x.double(), dy.double(), w.double()))
        for rank, parts in ((None, 3), (8, 1), (72, 2), (264, 1)):
            z = None if rank is None else fenced(torch.randn(tokens, rank, **half))
            dw, du = gradient_of_blocks(x, dy, table, z, parts)
            assert_as_accurate(dw, wgrad(x, dy, w), wgrad(x.double(), dy.double(), w))
            if z is not None:
                plain, exact = (torch.einsum("tin,tr->inr", d, z.to(d.dtype)) for d in (dy, dy.double()))
                assert_as_accurate(du.view(rows, n, rank), plain, exact)


def draw_choices(kind, tokens, experts, top_k, device):
    logits = torch.randn(tokens, experts, device=device)
    logits[:, 0] -= 100.0 * (kind == "an expert without a token")
    logits[:, :top_k] += 100.0 * (kind == "all tokens to one set")
    return logits.topk(top_k).indices


CHOICES = [
    ("any", 150, 3, 2),
    ("all tokens to one set", 1100, 4, 2),
    ("an expert without a token", 70, 4, 3),
    ("any", 1, 3, 1),
]


def poison(device):
    """Memory that nothing wrote is NaN, or a number far out of range: on the interpreter, which has its own process."""
    if device == "cpu":
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)


def check_sets(device):
    from structlin.kernels import sets as sorting
    from structlin.kernels.sets import group
    from structlin.kernels.tiles import TILE

    poison(device)
    counted = sorting.COUNTED
    for (kind, tokens, experts, top_k), at_once in itertools.product(CHOICES, (counted, 16)):
        chosen = draw_choices(kind, tokens, experts, top_k, device)
        sorting.COUNTED = at_once
        sets = group(chosen, experts)
        sorting.COUNTED = counted
        slots = chosen.sort(1).values.cpu()
        token, owner = sets.token.cpu(), sets.tile.cpu().repeat_interleave(TILE, 0)
        held = (token < tokens).nonzero()[:, 0]
        assert sorted(token[held].tolist()) == list(range(tokens))
        assert torch.equal(owner[held], slots[token[held].long()].int())
        assert (owner[:, 0] >= 0).view(-1, TILE).any(1).sum() == (token < tokens).view(-1, TILE).any(1).sum()
        for first, tiles, unit in zip(sets.first.tolist(), sets.tiles.tolist(), sets.unit.tolist(), strict=True):
            assert sets.tile[first : first + tiles].tolist() == [unit] * tiles
            assert (tiles == 0) == (unit[0] == -1)
        assert sets.tiles.sum() == (sets.tile[:, 0] >= 0).sum()
        # each choice is where its expert is in the token's set, and back
        slot, place = (part.cpu().long() for part in (sets.place // len(token), sets.place % len(token)))
        assert torch.equal(slots.gather(1, slot), chosen.cpu())
        assert torch.equal(token[place], torch.arange(tokens).int()[:, None].expand(-1, top_k))
        there = sets.choice.flatten()[sets.place.flatten().long()].cpu()
        assert torch.equal(there, torch.arange(tokens * top_k).int())


def check_added(device):
    """Sums over units, more of an expert than are read at a time; units without tokens hold whatever was there."""
    from structlin.kernels.routed import added

    for units, top_k, experts, n in ((47, 2, 8, 700), (9, 1, 1, 5), (30, 3, 4, 513)):
        unit = torch.stack([torch.randperm(experts)[:top_k] for _ in range(units)]).int()
        unit[torch.rand(units) < 0.2] = -1
        there, parts = unit.flatten() >= 0, torch.randn(units * top_k, n)
        wanted = torch.zeros(experts, n, dtype=torch.float64)
        wanted.index_add_(0, unit.flatten()[there].long(), parts[there].double())
        parts[~there] = float("nan")
        found = added(parts.to(device), unit.to(device), torch.empty(experts, n, device=device))
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=1e-5)


def check_mixture(device):
    """Against all experts computed for every token, multiplied by a gate of zeros where they were not chosen."""
    from structlin.accuracy import assert_as_accurate
    from structlin.kernels.routed import backward_first, backward_second, forward
    from structlin.kernels.sets import group

    poison(device)
    digits = [(16, 16, 16, 24), (16, 16, 24, 16), (24, 24, 16, 16)]
    for (kind, tokens, experts, top_k), (c, a, f, o) in zip(CHOICES, digits, strict=False):
        tokens = 140 if kind == "all tokens to one set" else 70  # the interpreter is slow
        chosen = draw_choices(kind, tokens, experts, top_k, device)
        gate = torch.rand(tokens, top_k, device=device)
        gate[0, 0] = 0.0  # nothing is divided by it
        sizes = (tokens, c * a), (experts, c, f, a), (experts, f, o, c), (tokens, f * o)
        x, first, second, dy = (fenced(torch.randn(s, device=device).half()) for s in sizes)

        def formula(x, first, second, gate, dy, chosen=chosen, shape=(tokens, c, a), experts=experts):
            given = [tensor.detach().requires_grad_() for tensor in (x, first, second, gate)]
            x, first, second, gate = given
            gates = gate.new_zeros(len(x), experts).scatter(1, chosen, gate).to(x.dtype)
            z = torch.einsum("tca,ecfa->tecf", x.view(shape), first) * gates[:, :, None, None]
            y = torch.einsum("tecf,efoc->tfo", z, second).flatten(1)
            return [y, *torch.autograd.grad(y, given, dy)]

        sets = group(chosen, experts)
        y, z = forward(x, first, second, gate, sets)
        dz, dsecond, parts = backward_second(dy, second, gate, z, sets)
        dx, dfirst, none = backward_first(dz, x, first, sets)
        assert none is None
        ours = [y, dx, dfirst, dsecond, parts.sum(1).transpose(0, 1).flatten()[sets.place]]
        plain = formula(x, first, second, gate, dy)
        exact = formula(*(tensor.double() for tensor in (x, first, second, gate, dy)))
        for found, naive, true in zip(ours, plain, exact, strict=True):
            assert_as_accurate(found, naive, true)
        if kind == "an expert without a token":
            assert not ours[2][0].any()
            assert not ours[3][0].any()


def check_route(device):
    """Logits, choices and gates, and what comes back through them, beside autograd; logits that are no number too."""
    from structlin.accuracy import assert_as_accurate, assert_close
    from structlin.kernels.route import route, unroute
    from structlin.kernels.sets import group
    from structlin.kernels.tiles import TILE

    poison(device)
    for tokens, width, experts, top_k in ((70, 40, 5, 2), (130, 256, 8, 2), (64, 136, 3, 3), (3, 16, 16, 1)):
        x, weight = (fenced(torch.randn(s, device=device).half()) for s in ((tokens, width), (experts, width)))
        for bias in (None, torch.randn(experts, device=device)):
            logits, gate, chosen = route(x, weight, bias, top_k)
            exact = x.double() @ weight.double().T
            assert_as_accurate(logits, x.float() @ weight.float().T, exact)
            exact = logits.double().requires_grad_()
            scores = logits if bias is None else logits + bias
            assert torch.equal(chosen.sort(1).values, scores.topk(top_k, 1).indices.sort(1).values)
            wanted = exact.gather(1, chosen).softmax(1)
            assert_close(gate, wanted, 1e-6)
            sets, digits = group(chosen, experts), 3
            dgates, dlogits = torch.randn(digits + 1, tokens, top_k, device=device), torch.randn_like(logits)
            by_place = torch.full((digits, top_k, len(sets.tile), TILE), float("nan"), device=device)
            for part, dgate in zip(by_place, dgates, strict=False):
                part.view(-1)[sets.place] = dgate
            parts = by_place.permute(2, 0, 1, 3).contiguous()
            for extra, lost in ((None, None), (dgates[-1], dlogits), (dgates[-1], None), (None, dlogits)):
                ends = dgates[:-1].sum(0) if extra is None else dgates.sum(0)
                (truth,) = torch.autograd.grad(wanted, exact, ends.double(), retain_graph=True)
                truth = truth if lost is None else truth + lost.double()
                assert_close(unroute(parts, extra, lost, gate, experts, sets), truth, 1e-5)
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    _, gate, chosen = route(x, weight, None, top_k)
    assert chosen.min() >= 0
    assert chosen.max() < experts
    assert not gate[1].isfinite().any()
    assert gate[0].isfinite().all()


def check_mixture_layer(device):
    """The layer takes the kernels, with every gradient of the formula, compiled too, and differentiable twice."""
    import structlin as sl
    from structlin.kernels.tiles import Sets
    from structlin.nn import routing_loss, share_router_
    from structlin.ops import mixture
    from structlin.testing import assert_close, make, plain

    if device == "cpu":
        mixture._on = lambda *_: True
    poison(device)
    layer = make(sl.btt_moe(3, 2, in_dims=(16, 16), out_dims=(16, 16)), (256, 256), device, torch.float32)
    x = torch.randn(390, 256, device=device, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def gradients(y, **more):  # of losses on the logits too
        return torch.autograd.grad(y.square().sum() + routing_loss(layer, 10.0, 1.0), wanted, **more)

    y, exact = layer(x), plain(layer, x)
    assert isinstance(layer.router.last.routes, Sets)
    assert_close(y, exact, 1e-6)
    layer.router(x)  # by PyTorch
    truth = gradients(exact)
    for found, true in zip(gradients(layer(x)), truth, strict=True):
        assert_close(found, true, 1e-5)
    for found, true in zip(gradients(layer(x), create_graph=True), truth, strict=True):
        assert found.requires_grad
        assert_close(found, true, 1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, true in zip(gradients(compiled(x)), truth, strict=True):
        assert_close(found, true, 1e-5)
    assert isinstance(layer.router.last.routes, Sets)
    # a layer that follows sends the gradient of its gates to the router of the first
    second = make(layer.spec, (256, 256), device, torch.float32)
    share_router_(torch.nn.ModuleList([layer, second]))
    shared = [x, layer.router.weight, *(getattr(second, name) for name in second.plan.factors)]
    found = torch.autograd.grad((layer(x) + second(x)).square().sum(), shared)
    truth = torch.autograd.grad((plain(layer, x) + plain(second, x)).square().sum(), shared)
    for ours, true in zip(found, truth, strict=True):
        assert_close(ours, true, 1e-5)
    for tokens, size in (
        (200, 1),
        (100, 0),
    ):  # too few for so many sets: a row for each expert of a token, or no kernels
        some = x[:tokens]
        y, exact = layer(some), plain(layer, some)
        routes = layer.router.last.routes
        assert (routes.unit.shape[1] if isinstance(routes, Sets) else 0) == size
        assert_close(y, exact, 1e-6)
        truth = torch.autograd.grad(exact.square().sum(), shared[:-2])
        for ours, true in zip(torch.autograd.grad(y.square().sum(), shared[:-2]), truth, strict=True):
            assert_close(ours, true, 1e-5)


PAIRED = [  # tokens, blocks, n, k, slots, rank
    (70, 2, 64, 64, 2, 8),
    (129, 4, 128, 64, 3, 72),
    (3, 8, 64, 128, 5, 64),
    (1, 8, 64, 64, 8, 24),
    (130, 2, 256, 64, 1, 136),
]


def check_pair(device):
    """The block-sparse product and its input gradient with a product of matrices in the same pass."""
    from structlin.kernels.blocks import sum_of_blocks
    from structlin.testing import assert_as_accurate

    for tokens, blocks, n, k, slots, rank in PAIRED:
        index = torch.arange(blocks, device=device)[:, None] ^ torch.arange(slots, device=device)
        table = tuple(map(tuple, index.tolist()))
        used = tuple(tuple(row + 4096 * slot for slot, row in enumerate(line)) for line in table)
        half = {"device": device, "dtype": torch.float16}
        w = fenced(torch.randn(blocks, n, slots, k, **half))
        cases = {
            False: (table, blocks * k, blocks * n, (blocks * n, rank)),
            True: (used, blocks * n, blocks * k, (rank, blocks * k)),
        }
        for transposed, (places, d_in, d_out, shape) in cases.items():
            x, z = fenced(torch.randn(tokens, d_in, **half)), fenced(torch.randn(tokens, rank, **half))
            u, there = fenced(torch.randn(shape, **half)), torch.randn(tokens, d_out, **half)

            def plain(x, w, z, u, transposed=transposed, blocks=blocks, index=index, d_out=d_out):
                if not transposed:
                    sparse = torch.einsum("tisk,insk->tin", x.unflatten(1, (blocks, -1))[:, index], w)
                else:
                    parts = torch.einsum("tin,insk->tisk", x.unflatten(1, (blocks, -1)), w).flatten(1, 2)
                    sparse = x.new_zeros(len(x), blocks, w.shape[3]).index_add(1, index.flatten(), parts)
                return sparse.reshape(-1, d_out) + z @ (u if transposed else u.T)

            def added(x, w, z, u, there=there, plain=plain):
                return there.to(x.dtype) + plain(x, w, z, u)

            given = x.unflatten(1, (blocks, -1)), w, places, transposed
            torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
            ours = sum_of_blocks(*given, pair=(z, u)), sum_of_blocks(*given, there.clone(), (z, u))
            torch.use_deterministic_algorithms(False)
            for found, wanted in zip(ours, (plain, added), strict=True):
                exact = wanted(x.double(), w.double(), z.double(), u.double())
                assert_as_accurate(found.flatten(1), wanted(x, w, z, u), exact)


def check_sums(device):
    """Whole sums in which a low-rank term joins the block-sparse one: outputs and all gradients."""
    import structlin as sl
    from structlin.plan import Plan

    fly = sl.Pixelfly(block_size=64, butterfly_size=4, nfactors=1, rank=24)
    axes = {"i": 2, "j": 128, "r": 2, "s": 8, "o": 128, "p": 2}
    digits = Plan.einsum("i j, r s i j, o p r s -> o p", names=["down", "up"], **axes)
    sparse = sl.Pixelfly(block_size=64, butterfly_size=4, nfactors=1).plan(256, 256)
    plans = fly.plan(512, 256), (sl.BlockDiagonal(4) + fly).plan(256, 256), sparse + digits.apart(sparse)
    for plan, tokens in zip(plans, (70, 3, 1), strict=True):
        check_plan(plan, tokens, device)


def check_gradients(device):
    """A step whose gradients are one kernel: outputs and all gradients of whole chains."""
    import structlin as sl
    from structlin.kernels import gradients
    from structlin.ops import lowering, moves, schedule

    poison(device)
    enough, gradients.ENOUGH = gradients.ENOUGH, 1  # programs, so that one goes over tokens many times
    check_plan(sl.Blast(nblocks=4, rank=8).plan(64, 96), 1040, device)
    gradients.ENOUGH = enough
    for spec, shape, tokens in (
        (sl.Blast(nblocks=2, rank=24), (64, 48), 264),
        (sl.Blast(nblocks=4, rank=8), (64, 96), 1040),
        (sl.Blast(nblocks=20, rank=8), (320, 320), 8),
    ):
        plan = spec.plan(*shape)
        (steps,) = schedule.schedule(lowering.lower(plan).text, tokens, moves.Kernels(True, True))
        assert any(step.both for step in steps.steps)
        check_plan(plan, tokens, device)


def check_plan(plan, tokens, device):
    """A layer by our kernels is as accurate as by batched GEMMs."""
    from structlin.ops import chain, lowering, moves
    from structlin.testing import assert_as_accurate

    before, kernels = chain.kernels_on, moves.Kernels(True, True)
    chain.kernels_on = lambda *_: kernels
    try:
        program, shapes = lowering.lower(plan), [(tokens, plan.in_features), *plan.shapes.values()]
        given = [torch.randn(shape, device=device, dtype=torch.float16) for shape in shapes]
        dy = torch.randn(tokens, plan.out_features, device=device, dtype=torch.float16)

        def step(run, dtype):
            x, *factors = (tensor.to(dtype).requires_grad_() for tensor in given)
            y = run(x, factors, program)
            return [y, *torch.autograd.grad(y, (x, *factors), dy.to(dtype))]

        ours, naive = step(chain.multiply, torch.float16), step(chain.compose, torch.float16)
        for found, plain, true in zip(ours, naive, step(chain.compose, torch.float64), strict=True):
            assert_as_accurate(found, plain, true)
    finally:
        chain.kernels_on = before


CHECKS = [
    check_exchange,
    check_join,
    check_product,
    check_across,
    check_blocks,
    check_pair,
    check_sums,
    check_gradients,
    check_sets,
    check_added,
    check_mixture,
    check_route,
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a GPU")
@pytest.mark.parametrize("check", [*(check.__name__ for check in CHECKS), "check_mixture_layer"])
def test_on_the_interpreter(check):
    # the interpreter is chosen when triton is imported, so it gets a process of its own
    code = f"import runpy; runpy.run_path({__file__!r})[{check!r}]('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check):
    check("cuda")
