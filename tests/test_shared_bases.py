"""Members of BLAST and of products of Monarch come back by eigenvectors, and what is no member is told apart."""

import pytest
import torch

import structlin as sl
from structlin.nn import recover
from structlin.testing import assert_close, error, make

MONARCH = sl.Monarch(4) @ sl.Monarch(4).T
TALL = sl.BTT(1, in_dims=(8, 2), out_dims=(2, 8))
MEMBERS = [
    (sl.Blast(2, rank=5), (16, 16)),
    (sl.Blast(4, rank=3), (24, 16)),
    (sl.Blast(4, rank=8), (32, 48)),
    (sl.Blast(1, rank=3), (8, 12)),
    (MONARCH, (16, 16)),
    (sl.Monarch(4, order="blocked") @ sl.Monarch(4, order="blocked").T, (16, 16)),
    (TALL @ TALL.T, (16, 16)),
]
every_member = pytest.mark.parametrize(("spec", "shape"), MEMBERS, ids=str)
DTYPES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-5, torch.complex64: 1e-5}


def member(spec, shape, dtype=torch.float64):
    return make(spec, shape, "cpu", dtype, bias=False).to_dense().weight.detach()


def matrix(spec, factors):
    factor = next(iter(factors.values()))
    plan = make(spec, SHAPES[spec], "cpu").plan
    layer = sl.StructuredLinear(plan.in_features, plan.out_features, spec, bias=False, dtype=factor.dtype)
    layer.load_state_dict(factors)
    return layer.to_dense().weight.detach()


SHAPES = dict(MEMBERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_member
def test_a_member_comes_back(spec, shape, dtype):
    weight = member(spec, shape, dtype)
    plan = spec.plan(*shape)
    for factors in (recover(plan, weight), sl.project(plan, weight)):
        assert {name: factor.shape for name, factor in factors.items()} == plan.shapes
        assert all(factor.dtype == dtype and factor.is_contiguous() for factor in factors.values())
        assert_close(matrix(spec, factors), weight, DTYPES[dtype])


def test_the_bases_of_blast_come_back_up_to_order_and_scale():
    layer = make(sl.Blast(4, rank=3), (24, 16), "cpu", bias=False)
    found = recover(layer.plan, layer.to_dense().weight.detach())["left"]
    for theirs, ours in zip(layer.left.detach(), found, strict=True):
        cosines = (theirs / theirs.norm(dim=0)).T @ (ours / ours.norm(dim=0))
        assert sorted(cosines.abs().argmax(1).tolist()) == [0, 1, 2]
        assert_close(cosines.abs().amax(1), torch.ones(3, dtype=torch.float64))


def test_noise_on_a_member_is_not_magnified_by_a_projection():
    spec = sl.Blast(4, rank=3)
    exact = member(spec, (24, 16))
    noise = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = exact + 1e-3 * exact.norm() / noise.norm() * noise
    assert error(matrix(spec, sl.project(spec.plan(24, 16), noisy)), noisy) < 1e-3


def test_a_convolution_is_factored():
    """MM* holds the circulant matrices (Dao et al. 2022, section 3), here as an exact product for a given matrix."""
    kernel = torch.randn(16, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    circulant = torch.stack([kernel.roll(i) for i in range(16)], 1)
    assert_close(matrix(MONARCH, sl.project(MONARCH.plan(16, 16), circulant)), circulant)


@pytest.mark.parametrize(
    ("spec", "weight", "message"),
    [
        (sl.Blast(4, rank=3), torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), "no factors of"),
        (sl.Blast(4, rank=3), torch.zeros(24, 16), "diagonals no zeros"),
        (sl.Blast(4, rank=3), torch.block_diag(*[torch.ones(6, 4)] * 4), "must have rank 3"),
        (sl.Blast(4, rank=5), torch.ones(24, 16), "rank=5 .* exceeds the 4 of a block"),
        (sl.Blast(4, rank=3), torch.ones(16, 24), r"the weight is \(16, 24\), the plan \(24, 16\)"),
        (sl.Monarch(2), torch.ones(24, 16), "no grid of blocks with shared bases"),
        (sl.Blast(4, rank=3) + sl.LowRank(1), torch.ones(24, 16), "no grid of blocks with shared bases"),
        (sl.TensorTrain(3, rank=2, in_dims=(2, 2, 4), out_dims=(2, 3, 4)), torch.ones(24, 16), "no grid of blocks"),
    ],
    ids=str,
)  # fmt: skip
def test_where_the_theorem_does_not_apply_it_says_so(spec, weight, message):
    plan = spec.plan(24, 16)
    with pytest.raises(ValueError, match=message):
        recover(plan, weight)
