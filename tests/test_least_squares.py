"""Projection without a single SVD: sums, long chains, and the error over typical inputs instead of over all."""

import pytest
import torch

import structlin as sl
from structlin.nn import least_squares
from structlin.nn.least_squares import truncated
from structlin.testing import assert_close, error, examples, make

FLOAT = torch.float64
SEVERAL = [(spec, shape) for spec, shape in examples() if len(spec.plan(*shape).factors) > 2 or "dyad" in str(spec)]
several = pytest.mark.parametrize(("spec", "shape"), SEVERAL, ids=str)
UNMASKED = [(spec, shape) for spec, shape in examples() if not spec.masks(spec.plan(*shape))]
every = pytest.mark.parametrize(("spec", "shape"), UNMASKED, ids=str)


def nearest(spec, weight, inputs=None):
    layer = sl.StructuredLinear(weight.shape[1], weight.shape[0], spec, bias=False, dtype=weight.dtype)
    layer.load_state_dict(sl.project(layer.plan, weight, inputs))
    return layer.to_dense().weight.detach()


def correlated(tokens, width, dtype=FLOAT):
    torch.manual_seed(2)
    return torch.randn(tokens, width, dtype=dtype) @ torch.randn(width, width, dtype=dtype)


def on_inputs(matrix, inputs):
    return float((inputs @ matrix.T).norm())


@several
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_members_come_back(spec, shape, dtype):
    member = make(spec, shape, "cpu", dtype, bias=False).to_dense().weight.detach()
    # BLAST of a rank above the size of its blocks and sums with a low-rank term are fitted step by step, and stop when
    # that no longer pays
    plan = spec.plan(*shape)
    open_rank = isinstance(spec, sl.Blast) and plan.sizes["r"] > min(plan.sizes["p"], plan.sizes["q"])
    fitted = open_rank or (len(plan.terms) > 1 and not isinstance(spec, sl.Dyad))
    product = isinstance(spec, sl.Product)
    limit = 0.1 if fitted else 1e-5 if product or dtype == torch.float32 else 1e-10
    assert error(nearest(spec, member), member) < limit


@pytest.mark.parametrize("spec", [sl.Dyad(4), sl.Dyad(4, "ot"), sl.Dyad(4, "dt")], ids=str)
def test_dyad_takes_every_entry_of_its_support(spec):
    torch.manual_seed(0)
    weight = torch.randn(32, 16, dtype=FLOAT)
    support = make(spec, (32, 16), "cpu").to_dense().weight.detach() != 0
    assert_close(nearest(spec, weight), weight * support)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (sl.TensorTrain(cores=3, rank=2), (27, 27)),
        (sl.Blast(2, rank=3), (16, 16)),
        (sl.Monarch(2) + sl.LowRank(2), (16, 16)),
    ],
    ids=str,
)
def test_no_small_step_is_much_nearer(spec, shape):
    """A local optimum, or within the bound of the tensor train: sqrt(factors - 1) of the best."""
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=FLOAT)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=FLOAT)
    layer.load_state_dict(sl.project(layer.plan, weight))
    before = error(layer.to_dense().weight, weight)
    eye = torch.eye(shape[1], dtype=FLOAT)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (layer(eye).T - weight).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    after = error(layer.to_dense().weight, weight)
    assert before < after * 1.03


@every
def test_fitted_to_inputs_is_no_worse_on_them(spec, shape):
    torch.manual_seed(3)
    weight, x = torch.randn(shape, dtype=FLOAT), correlated(64, shape[1])
    plain, aware = nearest(spec, weight), nearest(spec, weight, x)
    assert on_inputs(aware - weight, x) <= on_inputs(plain - weight, x) * (1 + 1e-6) + 1e-8
    if not isinstance(spec, sl.Dense):
        assert on_inputs(aware - weight, x) < 0.98 * on_inputs(plain - weight, x)


def test_low_rank_on_inputs_is_the_svd_of_the_outputs():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 16, dtype=FLOAT), correlated(400, 16)
    rest = torch.linalg.svdvals(x @ weight.T)[5:].norm()
    assert on_inputs(nearest(sl.LowRank(5), weight, x) - weight, x) == pytest.approx(float(rest), rel=1e-5)


def test_block_diagonal_on_inputs_is_a_regression_of_each_block():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 16, dtype=FLOAT), correlated(400, 16)
    blocks = [torch.linalg.lstsq(x[:, 4 * g : 4 * g + 4], x @ weight[6 * g : 6 * g + 6].T).solution.T for g in range(4)]
    assert_close(nearest(sl.BlockDiagonal(4), weight, x), torch.block_diag(*blocks), 1e-5)


@pytest.mark.parametrize("spec", [sl.LowRank(3), sl.Monarch(2), sl.BlockDiagonal(4), sl.Dyad(4)], ids=str)
def test_a_member_is_its_own_fit_on_any_inputs(spec):
    member = make(spec, (16, 16), "cpu", bias=False).to_dense().weight.detach()
    assert_close(nearest(spec, member, correlated(40, 16)), member, 1e-6)


LARGE = [(sl.Blast(2, rank=3), 16), (sl.Kronecker(), 16), (sl.TensorTrain(cores=3, rank=2), 16),
         (sl.BlockDiagonal(2), 128)]  # fmt: skip


@pytest.mark.parametrize(("spec", "width"), LARGE, ids=str)
def test_large_systems_go_step_by_step_to_the_same_fit(spec, width, monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(16, width, dtype=FLOAT), correlated(400, width)
    direct = on_inputs(nearest(spec, weight, x) - weight, x)
    monkeypatch.setattr(least_squares, "LARGEST", 1)
    monkeypatch.setattr(least_squares, "STEPS", 3)
    assert on_inputs(nearest(spec, weight, x) - weight, x) == pytest.approx(direct, rel=0.02)


def test_blocks_on_inputs_end_where_exact_rounds_do():
    """All blocks by one SVD each, round after round, until nothing falls any more."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32, dtype=FLOAT), correlated(400, 32)
    fitted = nearest(sl.Monarch(4, rank=2), weight, x)
    blocks = [slice(j, None, 4) for j in range(4)]
    exact = torch.zeros_like(weight)
    cover = x.T @ x
    for _ in range(300):
        for k in range(4):
            into = slice(8 * k, 8 * k + 8)
            root = torch.linalg.cholesky(cover[into, into])
            exact[:, into] = 0
            free = torch.linalg.solve(cover[into, into], ((weight - exact) @ cover[:, into]).T).T
            for rows in blocks:
                u, s, v = torch.linalg.svd(free[rows] @ root, full_matrices=False)
                exact[rows, into] = (u[:, :2] * s[:2]) @ v[:2] @ root.inverse()
    assert on_inputs(fitted - weight, x) <= 1.02 * on_inputs(exact - weight, x)


def test_fewer_inputs_than_features_are_enough():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 16, dtype=FLOAT), correlated(5, 16)
    fitted = nearest(sl.LowRank(5), weight, x)
    assert on_inputs(fitted - weight, x) < 1e-2 * on_inputs(weight, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(("shape", "rank"), [((160, 144), 20), ((144, 160), 144), ((144, 160), 150)])
def test_large_matrices_in_single_precision(dtype, shape, rank):
    """They go another way than small ones, with the same result."""
    torch.manual_seed(0)
    blocks = torch.randn(2, *shape, dtype=dtype)
    up, down = truncated(blocks, rank)
    u, s, vh = torch.linalg.svd(blocks.to(torch.complex128))
    best = (u[..., :, : min(shape)] * s[:, None])[..., :rank] @ vh[:, : min(shape)][:, :rank]
    assert up.shape == (2, shape[0], rank)
    assert error(up @ down, best) < 1e-5
    member = up[..., :7] @ down[:, :7]
    up, down = truncated(member, rank)
    assert error(up @ down, member) < 1e-5
    up, down = truncated(torch.zeros_like(blocks), rank)
    assert (up @ down).abs().max() == 0


def test_blast_is_as_near_as_the_published_descent_comes():
    """Lee et al. 2024, preconditioned gradient descent, 300 steps: 0.72 of a Gaussian 64x64 matrix remains."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=FLOAT)
    assert error(nearest(sl.Blast(4, rank=8), weight), weight) < 0.73


@pytest.mark.parametrize(("rank", "left"), [(8, 0.4903), (16, 0.2649), (24, 0.1107)])
def test_blast_takes_few_sweeps_without_the_matrix(rank, left, monkeypatch):
    """``left`` is the error of 300 sweeps from random factors, less where a sweep gained a share of 1e-5 before."""
    calls = {"solve": 0, "matrix": 0}

    def counted(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=FLOAT) * torch.arange(1, 65, dtype=FLOAT) ** -0.5
    weight = weight @ torch.randn(64, 64, dtype=FLOAT)
    plan = sl.Blast(4, rank).plan(64, 64)
    counted(torch.linalg, "solve")
    counted(least_squares, "matrix")
    factors = sl.project(plan, weight)
    assert calls["solve"] < 300
    assert calls["matrix"] < 10
    layer = sl.StructuredLinear(64, 64, sl.Blast(4, rank), bias=False, dtype=FLOAT)
    layer.load_state_dict(factors)
    assert error(layer.to_dense().weight.detach(), weight) < left


def test_blast_finds_blocks_that_low_rank_does_not_reach():
    """The singular vectors of a block-diagonal matrix are zero in all blocks but one, those of few rows past them."""
    torch.manual_seed(0)
    diagonal = torch.block_diag(*torch.randn(4, 16, 16, dtype=FLOAT))
    assert error(nearest(sl.Blast(4, rank=24), diagonal), diagonal) < 1e-3
    thin = torch.randn(64, 5, dtype=FLOAT) @ torch.randn(5, 64, dtype=FLOAT)
    assert error(nearest(sl.Blast(4, rank=12), thin), thin) < 1e-10


def test_experts_are_projected_one_by_one():
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 24, 16)
    plan = sl.Monarch(2).plan(24, 16)
    factors = sl.project(plan, weight)
    assert {name: f.shape for name, f in factors.items()} == {n: (2, 3, *s) for n, s in plan.shapes.items()}
    one = sl.project(plan, weight[1, 2])
    assert all(torch.equal(factors[name][1, 2], one[name]) for name in one)


def test_fits_repeat_and_leave_the_random_state_alone():
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    state, plan = torch.get_rng_state(), sl.Blast(2, rank=5).plan(16, 16)
    first, second = sl.project(plan, weight), sl.project(plan, weight)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(3, 15), r"width 16, not of shape \(3, 15\)"),
        (torch.full((3, 16), float("nan")), "must be finite"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        sl.project(sl.LowRank(2).plan(24, 16), torch.randn(24, 16), inputs)
