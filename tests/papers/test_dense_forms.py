"""Each structure as its paper defines it, written without plans: the contract alone would accept any matrix."""

import pytest
import torch

import structlin as sl
from structlin.testing import examples

FLOAT = torch.float64


def reader(sizes, order):
    """The permutation matrix whose output, index read in `order`, is its input, index read as `sizes`."""
    n = torch.tensor(sizes).prod().item()
    return torch.eye(n, dtype=FLOAT)[torch.arange(n).reshape(sizes).permute(order).flatten()]


def dense(spec, weight):
    return weight


def low_rank(spec, down, up):
    return up @ down


def block_diagonal(spec, blocks):
    return torch.block_diag(*blocks)


def kronecker(spec, right, left):
    return torch.kron(left, right)


def monarch(spec, first, second):
    """Dao et al. 2022, section 3: M = P L P^T R, blocks of R see the input in chunks, P transposes the block grid."""
    k, j, r, i = first.shape
    o = second.shape[1]
    right = torch.block_diag(*first.reshape(k, j * r, i))
    left = torch.block_diag(*second.reshape(j, o, k * r))
    blocked = left @ reader((k, j, r), (1, 0, 2)) @ right
    return blocked if spec.order == "blocked" else reader((j, o), (1, 0)) @ blocked


def dyad(spec, lower, upper):
    """Chandy et al. 2023: D1 + D2 P_in (it), D1 + P_out^T D2 (ot), both (dt), P[d i + j, j n + d] = 1."""
    n, o, i = lower.shape
    strided_in, strided_out = torch.zeros(n * i, n * i, dtype=FLOAT), torch.zeros(n * o, n * o, dtype=FLOAT)
    for d in range(n):
        for j in range(i):
            strided_in[d * i + j, j * n + d] = 1
        for k in range(o):
            strided_out[d * o + k, k * n + d] = 1
    second = torch.block_diag(*upper)
    if spec.variant in ("it", "dt"):
        second = second @ strided_in
    if spec.variant in ("ot", "dt"):
        second = strided_out.T @ second
    return torch.block_diag(*lower) + second


def btt(spec, first, second):
    """Qiu et al. 2024: block (f, c) of the matrix is the sum over the rank of outer products of two slices."""
    c, f, r, a = first.shape
    e = second.shape[1]
    weight = torch.zeros(f * e, c * a, dtype=FLOAT)
    for row in range(f):
        for column in range(c):
            block = sum(torch.outer(second[row, :, column, s], first[column, row, s]) for s in range(r))
            weight[row * e : (row + 1) * e, column * a : (column + 1) * a] = block
    return weight


DENSE_FORMS = {
    "dense": dense,
    "low_rank": low_rank,
    "block_diagonal": block_diagonal,
    "kronecker": kronecker,
    "monarch": monarch,
    "dyad": dyad,
    "btt": btt,
}


def test_no_structure_is_without_one():
    assert DENSE_FORMS.keys() == sl.STRUCTURES.keys()


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_is_the_papers_matrix(spec, shape):
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=FLOAT)
    expected = DENSE_FORMS[spec.name](spec, *(getattr(layer, name).detach() for name in layer.plan.factors))
    torch.testing.assert_close(layer.to_dense().weight.detach(), expected)


@pytest.mark.parametrize(
    ("spec", "out_features", "in_features", "params"),
    [
        (sl.Monarch(4), 768, 768, 0.5),  # Dao et al. 2022: half of a square layer, 5/16 of a 1:4 one
        (sl.Monarch(4), 3072, 768, 0.3125),
        (sl.Monarch(4), 768, 3072, 0.3125),
        (sl.Dyad(4), 3072, 768, 0.5),  # Chandy et al. 2023: 2 / nblocks
        (sl.Dyad(8), 3072, 768, 0.25),
        (sl.BTT(1), 4096, 4096, 2 / 64),  # Qiu et al. 2024: 2 r d^(3/2)
        (sl.BTT(4), 4096, 4096, 8 / 64),
    ],
    ids=str,
)
def test_params_are_the_papers_share_of_dense(spec, out_features, in_features, params):
    plan = spec.plan(out_features, in_features)
    assert sl.analysis.num_params(plan) == params * out_features * in_features
    assert sl.analysis.compute(plan) == params


@pytest.mark.parametrize(
    ("spec", "width", "scales"),
    [
        (sl.Dense(), 768, {"weight": 1}),
        (sl.BTT(4), 4096, {"first": 32, "second": 8}),  # Qiu et al. 2024: sqrt(d)/2 and sqrt(d)/(2 r)
        (sl.Monarch(4), 768, {"first": 2, "second": 2}),
        (sl.LowRank(96), 768, {"down": 0.5, "up": 4}),
    ],
    ids=str,
)
def test_learning_rates_follow_the_fan_in_of_each_factor(spec, width, scales):
    plan = spec.plan(width, width)
    assert {name: sl.analysis.lr_scale(plan, name) for name in plan.factors} == scales


def test_monarch_holds_the_discrete_fourier_transform():
    """Dao et al. 2022, section 3: with a bit-reversal-like permutation of its input the DFT is a Monarch matrix."""
    n, m = 16, 4
    dft = torch.fft.fft(torch.eye(n, dtype=torch.complex128), dim=0)
    permuted = dft @ reader((m, m), (1, 0)).to(dft.dtype).T
    plan = sl.Monarch(nblocks=m, order="paper").plan(n, n)
    layer = sl.StructuredLinear(n, n, sl.Monarch(nblocks=m), bias=False, dtype=torch.complex128)
    layer.load_state_dict(sl.project(plan, permuted))
    torch.testing.assert_close(layer.to_dense().weight, permuted)
