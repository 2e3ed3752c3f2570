"""Each structure as its paper defines it, written without plans: the contract alone would accept any matrix."""

import itertools
import math

import numpy as np
import pytest
import torch

import structlin as sl
from structlin.testing import examples, padded_examples

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
    """With shuffle, `BlockdiagLinear`: the input read as (group, channel), written as (channel, group), comes first."""
    n = spec.nblocks
    weight = torch.block_diag(*blocks.reshape(n, blocks.shape[1], -1))
    return weight @ reader((n, weight.shape[1] // n), (1, 0)) if spec.shuffle else weight


def block_dense(spec, blocks, up):
    """Wei et al. 2024: y = lr (blkdiag x)."""
    return up.flatten(1) @ torch.block_diag(*blocks)


def block_shuffle(spec, first, second):
    """Dao et al. 2022, `blockdiag_butterfly_multiply`: (k, p) -> (k, q), read as (r, n) -> (n, s), written (s, n)."""
    w1, w2 = first.flatten(1, 2), second.flatten(2)
    (k, _, p), (n, _, r) = w1.shape, w2.shape
    columns = []
    for x in torch.eye(k * p, dtype=FLOAT):
        z = torch.stack([w1[block] @ x.reshape(k, p)[block] for block in range(k)])
        z = z.flatten().reshape(r, n).T
        columns.append(torch.stack([w2[block] @ z[block] for block in range(n)]).T.flatten())
    return torch.stack(columns, 1)


def tensor_train(spec, *cores):
    """Qiu et al. 2024, `TT`: one entry is a product of matrices, one matrix for each pair of digits."""
    cores = [core.movedim(-1, 0) if i else core.unsqueeze(0) for i, core in enumerate(cores)]  # left rank first
    cores = [core.movedim(2, -1) if i < len(cores) - 1 else core.unsqueeze(-1) for i, core in enumerate(cores)]
    outs, ins = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    weight = torch.zeros(*outs, *ins, dtype=FLOAT)
    for index in itertools.product(*map(range, outs + ins)):
        digits = zip(index[: len(outs)], index[len(outs) :], cores, strict=True)
        weight[index] = torch.linalg.multi_dot([core[:, o, i] for o, i, core in digits]) if len(cores) > 1 else 0
    return weight.reshape(math.prod(outs), math.prod(ins))


def einsum(spec, first, second):
    """Potapczynski et al. 2024, all seven letters: 'gba,fdrga->fdrgb' and 'fdrgb,fergb->fed'."""
    _, b, _, d, e, f, r = spec.dims or (4, 2, 2, 2, 4, 2, 2)
    a, g = first.shape[-1], first.shape[0]
    core_a, core_b = torch.zeros(f, d, r, g, a, dtype=FLOAT), torch.zeros(f, e, r, g, b, dtype=FLOAT)
    for index in itertools.product(*map(range, (f, d, r, g))):
        core_a[index] = first[index[3], index[0], index[1], index[2]]
    for index in itertools.product(*map(range, (f, e, r, g))):
        core_b[index] = second[index[0], index[1], index[3], index[2]]
    x = torch.eye(g * b * a, dtype=FLOAT).reshape(-1, g, b, a)
    z = torch.einsum("tgba,fdrga->tfdrgb", x, core_a)
    return torch.einsum("tfdrgb,fergb->tfed", z, core_b).reshape(g * b * a, -1).T


def gaudi_mask(n, width, location, sigma):
    """Lee et al. 2024, the Gaussian-Dirichlet mask, with normalised sinc."""
    f = np.arange(n // 2 + 1)
    box = width * np.sinc(f * width) / np.sinc(f / n) * np.exp(-(f**2) / (2 * sigma**2))
    phase = -2 * np.pi * f * location + np.pi * f * (1 / n - width)
    return torch.from_numpy(np.fft.irfft(box * np.exp(1j * phase), n, norm="forward"))


def gblr(spec, down, up):
    """Lee et al. 2024: W = sum_k (m2_k * u_k) (m1_k * v_k)^T; widths "splr", locations "linspace"."""
    components, half = len(down), spec.width / 2
    weight = torch.zeros(len(up), down.shape[-1], dtype=FLOAT)
    for k in range(components):
        width, location, ends = 1 if k < round(half * components) else half / (1 - half), k / components, []
        for n in weight.shape:
            if spec.rounding:
                boxcar = torch.tensor([1.0] * round(n * width) + [0.0] * (n - round(n * width)), dtype=FLOAT)
                ends.append(boxcar.roll(round(n * location)))
            else:
                ends.append(gaudi_mask(n, width, location, spec.sigma))
        weight += (ends[0][:, None] * up[:, k]) @ (ends[1] * down[k])
    return weight


def chain(spec, w1, w2):
    """The example only: the same right matrix for every group, a left one of its own, groups after rows."""
    rows = [torch.kron(left, w1) for left in w2]  # (e d) x (b a) for each group
    g, (e, d) = len(rows), (w2.shape[1], w1.shape[0])
    return reader((g, e, d), (1, 0, 2)) @ torch.block_diag(*rows)


def summed(spec, *factors):
    """The example only."""
    blocks, down, up = factors
    return torch.block_diag(*blocks) + up @ down


def product(spec, *factors):
    """The examples only: the last structure first."""
    if spec.width:
        down, up, right, left = factors
        return torch.kron(left, right) @ up.flatten(0, 1) @ down
    blocks, first, second = factors
    first, second = first.reshape(2, 2, 3, 6), second.reshape(2, 6, 2, 3)
    return monarch(sl.Monarch(nblocks=2), first, second) @ torch.block_diag(*blocks.flatten(0, 1))


def transpose(spec, *factors):
    """The examples only: the dense form of the transposed shape, transposed; a chain lists its factors reversed."""
    if isinstance(spec.of, sl.Monarch):
        return monarch(spec.of, *reversed(factors)).T
    lower, upper, up, down = factors
    return (dyad(spec.of.terms[0], lower, upper) + up @ down).T


def pixelfly(spec, sparse, down=None, up=None):
    """Dao et al. 2022b: the union of butterfly factors of strides 1, 2, ... with dense cells, plus low rank.

    The support is that of the published code: one factor of stride j is blocks of 2j with three diagonals.
    """
    if sparse.shape[1] == sparse.shape[3] == spec.block_size:
        return stretched_pixelfly(spec, sparse, 32)  # the example
    size, (rows, columns) = spec.butterfly_size, (sparse.shape[1], sparse.shape[3])
    weight, cells = torch.zeros(size * rows, size * columns, dtype=FLOAT), butterfly(size, spec.nfactors)
    order = [torch.eye(size)] if size & (size - 1) else None
    if order is not None:  # ours, of the paper's idea: mixed radix, the cells of a row by how far a digit is turned
        order += [turn for level in radices(size)[: spec.nfactors] for turn in turns(size, *level)]
    for row in range(size):
        found = cells[row].nonzero().flatten().tolist()
        assert len(found) == sparse.shape[2]
        for column in found:
            if order is None:
                slot = abs(row - column).bit_length()  # the diagonal first, then the strides
            else:
                (slot,) = [slot for slot, turn in enumerate(order) if turn[row, column]]
            weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = sparse[row, :, slot]
    return weight if down is None else weight + up @ down


def radices(size):
    """(stride, radix) for each prime factor of ``size``, ascending."""
    primes = [p for p in range(2, size + 1) if all(p % q for q in range(2, p))]
    found = [p for p in primes for n in range(1, size.bit_length()) if size % p**n == 0]
    return [(math.prod(found[:i]), p) for i, p in enumerate(found)]


def turns(size, stride, radix):
    """The permutations that turn the digit of this stride by 1, 2, ..., radix - 1."""
    eye = torch.eye(radix)
    return [
        torch.kron(torch.kron(torch.eye(size // (stride * radix)), eye.roll(n, 1)), torch.eye(stride))
        for n in range(1, radix)
    ]


def butterfly(size, nfactors):
    cells = torch.zeros(size, size, dtype=torch.bool)
    for stride, radix in radices(size)[:nfactors]:
        eye = torch.eye(stride, dtype=torch.bool)
        factor = torch.cat([torch.cat([eye, eye], 1)] * 2) if radix == 2 else torch.ones(radix, radix).kron(eye)
        cells |= torch.block_diag(*[factor.int()] * (size // (radix * stride))).bool()
    return cells


def block_butterfly(spec, *factors):
    """The product, the largest stride last, each factor with two (or radix) blocks in every row of blocks."""
    weight = None
    for (stride, radix), factor in zip(radices(spec.butterfly_size), factors, strict=False):
        p, q, groups = factor.shape[-1], factor.shape[-3], spec.butterfly_size // (stride * radix)
        blocks = factor.reshape(groups, stride, radix, q, radix, p)
        matrix = torch.zeros(spec.butterfly_size * q, spec.butterfly_size * p, dtype=FLOAT)
        for high, low, o, i in itertools.product(range(groups), range(stride), range(radix), range(radix)):
            row, column = ((high * radix + digit) * stride + low for digit in (o, i))
            matrix[row * q : (row + 1) * q, column * p : (column + 1) * p] = blocks[high, low, o, :, i]
        weight = matrix if weight is None else matrix @ weight
    return weight


def block_sparse(spec, sparse):
    """The dense cells of each row, from left to right, where the mask has them."""
    n, rows, slots, columns = sparse.shape
    if isinstance(spec.mask, str):
        bits = "".join(f"{int(digit, 16):04b}" for digit in spec.mask[2:])[: n * n]
    else:  # a seed: pinned, as checkpoints depend on it
        bits = {(4, 2, 1): "1001011011000011", (6, 3, 7): "110001011100000111101100100011011010"}[n, slots, spec.mask]
    weight, cells = torch.zeros(n, rows, n, columns, dtype=FLOAT), sparse.transpose(1, 2).flatten(0, 1)
    for at, cell in zip([i for i, bit in enumerate(bits) if bit == "1"], cells, strict=True):
        weight[at // n, :, at % n] = cell
    return weight.reshape(n * rows, n * columns)


def stretched_blocks(spec, out_features, in_features):
    """`FlatBlockButterflySparsityConfig`: cells repeated to the shape of the matrix, a block kept if any entry is."""
    rows, columns = out_features // spec.butterfly_size, in_features // spec.butterfly_size
    entries = torch.kron(butterfly(spec.butterfly_size, spec.nfactors).int(), torch.ones(rows, columns).int())
    blocks = entries.unflatten(1, (-1, spec.block_size)).unflatten(0, (-1, spec.block_size))
    return blocks.amax((1, 3)).bool()


def stretched_pixelfly(spec, sparse, in_features):
    """`BlockSparseLinear`: the kept blocks, row by row."""
    n = spec.block_size
    blocks = stretched_blocks(spec, sparse.shape[0] * n, in_features)
    weight = torch.zeros(*blocks.shape, n, n, dtype=FLOAT)
    weight[blocks] = sparse.transpose(1, 2).flatten(0, 1)
    return weight.transpose(1, 2).flatten(0, 1).flatten(1)


def blast(spec, right, middle, left):
    """Lee et al. 2024: block (i, j) is B_i diag(d_ij) C_j."""
    n = spec.nblocks
    rows = ([left[i] @ torch.diag(middle[:, i, j]) @ right[j] for j in range(n)] for i in range(n))
    return torch.cat([torch.cat(row, 1) for row in rows])


def kronecker(spec, right, left):
    return torch.kron(left, right)


def monarch(spec, first, second, third=None):
    """Dao et al. 2022, section 3: M = P L P^T R, blocks of R see the input in chunks, P transposes the block grid.

    Fu et al. 2023, order p: one block-diagonal factor for each digit, the digits permuted before and after.
    """
    if third is not None:
        return monarch_of_order_three(first, second, third)
    k, j, r, i = first.shape
    o = second.shape[1]
    right = torch.block_diag(*first.reshape(k, j * r, i))
    left = torch.block_diag(*second.reshape(j, o, k * r))
    blocked = left @ reader((k, j, r), (1, 0, 2)) @ right
    return blocked if spec.order == "blocked" else reader((j, o), (1, 0)) @ blocked


def monarch_of_order_three(first, second, third):
    k2, k1, j0, r1, i = first.shape
    j1, r2 = second.shape[2:4]
    o = third.shape[2]
    a = torch.block_diag(*first.reshape(k2 * k1, j0 * r1, i))
    b = torch.block_diag(*second.reshape(k2 * j0, j1 * r2, k1 * r1))
    c = torch.block_diag(*third.transpose(0, 1).reshape(j0 * j1, o, k2 * r2))
    to_b, to_c = reader((k2, k1, j0, r1), (0, 2, 1, 3)), reader((k2, j0, j1, r2), (1, 2, 0, 3))
    return reader((j0, j1, o), (2, 1, 0)) @ c @ to_c @ b @ to_b @ a


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
    variant = spec.variant if spec.variant != "narrow" else "it" if i <= o else "ot"  # ours, of two of the paper's
    if variant in ("it", "dt"):
        second = second @ strided_in
    if variant in ("ot", "dt"):
        second = strided_out.T @ second
    return torch.block_diag(*lower) + second


def btt(spec, first, second, third=None):
    """Qiu et al. 2024: block (f, c) of the matrix is the sum over the rank of outer products of two slices."""
    if third is not None:
        return btt_of_three_cores(first, second, third)
    c, f, r, a = first.shape
    e = second.shape[1]
    weight = torch.zeros(f * e, c * a, dtype=FLOAT)
    for row in range(f):
        for column in range(c):
            block = sum(torch.outer(second[row, :, column, s], first[column, row, s]) for s in range(r))
            weight[row * e : (row + 1) * e, column * a : (column + 1) * a] = block
    return weight


def btt_of_three_cores(first, second, third):
    """Qiu et al. 2024, class `BTT` (einsum 'rtpmnq,btpnq->brpmq' for each core), digits of both ends reversed."""
    cores = [  # as (rank out, rank in, outputs done, output, input, inputs that wait), waiting digits reversed
        first.permute(3, 2, 4, 1, 0).unsqueeze(1).unsqueeze(2).flatten(5),
        second.permute(3, 5, 1, 2, 4, 0),
        third.permute(4, 0, 1, 2, 3).unsqueeze(0).flatten(2, 3).unsqueeze(-1),
    ]
    n2, n1, n0 = first.shape[0], first.shape[1], first.shape[4]
    m0, m1, m2 = third.shape[:3]
    v = torch.eye(n2 * n1 * n0, dtype=FLOAT).reshape(-1, n2, n1, n0).permute(0, 3, 2, 1)
    for core in cores:
        _, t, p, _, n, q = core.shape
        v = torch.einsum("rtpmnq,btpnq->brpmq", core, v.reshape(-1, t, p, n, q))
    return v.reshape(-1, m0 * m1 * m2).T


DENSE_FORMS = {
    "dense": dense,
    "low_rank": low_rank,
    "block_diagonal": block_diagonal,
    "kronecker": kronecker,
    "monarch": monarch,
    "dyad": dyad,
    "btt": btt,
    "block_dense": block_dense,
    "block_shuffle": block_shuffle,
    "tensor_train": tensor_train,
    "blast": blast,
    "sum": summed,
    "product": product,
    "transpose": transpose,
    "einsum": einsum,
    "chain": chain,
    "pixelfly": pixelfly,
    "gblr": gblr,
    "block_butterfly": block_butterfly,
    "block_sparse": block_sparse,
}


def test_no_structure_is_without_one():
    assert DENSE_FORMS.keys() == sl.STRUCTURES.keys()


@pytest.mark.parametrize(("spec", "shape"), examples() + padded_examples(), ids=str)
def test_is_the_papers_matrix(spec, shape):
    """Where widths are padded the layer is the first rows and columns of the matrix."""
    torch.manual_seed(0)
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=FLOAT)
    expected = DENSE_FORMS[spec.name](spec, *(layer.stored(name).detach() for name in layer.plan.factors))
    torch.testing.assert_close(layer.to_dense().weight.detach(), expected[: shape[0], : shape[1]])


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
        (sl.Pixelfly(32, 8, 2), 1024, 1024, 0.375),  # Dao et al. 2022b: (nfactors + 1) / butterfly_size
        (sl.Pixelfly(32, 16, 2), 4096, 1024, 0.1875),
        (sl.Pixelfly(32, 16, 3), 1024, 4096, 0.25),
        (sl.Pixelfly(32, 16, 4), 512, 512, 0.3125),
        (sl.Pixelfly(32, 32, 3), 1024, 1024, 0.125),
        (sl.BlockButterfly(16, 2), 1024, 1024, 0.25),  # 2 nfactors / butterfly_size
        (sl.BlockSparse(16, 4), 4096, 1024, 0.25),
    ],
    ids=str,
)
def test_params_are_the_papers_share_of_dense(spec, out_features, in_features, params):
    plan = spec.plan(out_features, in_features)
    assert sl.analysis.num_params(plan) == params * out_features * in_features
    assert sl.analysis.compute(plan) == params


@pytest.mark.parametrize("nfactors", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(128, 128), (64, 16), (16, 64), (128, 32), (48, 64), (96, 96), (256, 32)], ids=str)
def test_pixelfly_has_the_blocks_of_the_published_code_where_rows_have_equally_many(shape, nfactors):
    spec = sl.Pixelfly(block_size=8, butterfly_size=16, nfactors=nfactors)
    blocks = stretched_blocks(spec, *shape)
    if len({*blocks.sum(0).tolist()}) > 1 or len({*blocks.sum(1).tolist()}) > 1:
        with pytest.raises(ValueError, match="block_size=8 does not divide"):
            spec.plan(*shape)
        return
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=FLOAT)
    weight = layer.to_dense().weight.detach()
    assert torch.equal((weight != 0).unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).all(3).all(1), blocks)
    assert sl.analysis.density(layer.plan) == blocks.double().mean() == (weight != 0).double().mean()
    assert sl.analysis.num_params(layer.plan) == blocks.sum() * 64
    if min(shape) < 128:  # else there is a factor for each cell, not for each block
        torch.testing.assert_close(weight, stretched_pixelfly(spec, layer.sparse.detach(), shape[1]))


def test_pixelfly_of_less_than_a_block_is_refused():
    for shape in ((16, 32), (32, 16), (48, 32)):
        with pytest.raises(ValueError, match="block_size=32 does not divide"):
            sl.Pixelfly(block_size=32, butterfly_size=16).plan(*shape)


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
