"""Sums, products and transposes of specs: the matrices they name, their text and JSON, and what is refused."""

import json

import pytest
import torch

import structlin as sl
from structlin import BTT, BlockDiagonal, Dense, Dyad, Kronecker, LowRank, Monarch, Product, Spec, Sum, TensorTrain
from structlin.spec import parse
from structlin.testing import assert_close, make
from structlin.widths import balanced, greedy


def matrix(spec, shape, factors):
    layer = sl.StructuredLinear(shape[1], shape[0], spec, bias=False, dtype=torch.float64)
    layer.load_state_dict(factors)
    return layer.to_dense().weight.detach()


@pytest.mark.parametrize(
    ("left", "right", "shape", "width"),
    [
        (Monarch(2), Monarch(2).T, (16, 24), 16),
        (BTT(rank=2), Dense(), (24, 16), 16),
        (Dense(), BlockDiagonal(4), (12, 16), 12),
        (BlockDiagonal(4), BlockDiagonal(2, shuffle=True), (8, 16), 8),
        (Kronecker(), TensorTrain(cores=3, rank=1), (16, 24), 16),
        (LowRank(2), LowRank(3), (10, 12), 7),
        (sl.Blast(2, rank=3), Monarch(4), (16, 16), 16),
        (sl.Einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)), BTT(1, cores=3), (16, 8), 16),
    ],
    ids=str,
)
def test_product_is_the_product_of_both_matrices(left, right, shape, width):
    layer = make(Product((left, right), width=width), shape, "cpu", bias=False)
    state = list(layer.state_dict().values())
    parts = []
    for spec, (rows, columns) in ((right, (width, shape[1])), (left, (shape[0], width))):
        shapes = spec.plan(rows, columns).shapes
        own = {name: state.pop(0).reshape(size) for name, size in shapes.items()}
        parts.append(matrix(spec, (rows, columns), own))
    assert_close(layer.to_dense().weight, parts[1] @ parts[0])


def test_sum_keeps_its_terms_apart():
    spec = LowRank(2) + Monarch(2) + LowRank(3)
    layer = make(spec, (16, 24), "cpu", bias=False)
    assert list(layer.plan.shapes) == ["down", "up", "first", "second", "down1", "up1"]
    state = layer.state_dict()
    expected = state["up"] @ state["down"] + state["up1"] @ state["down1"]
    expected = expected + matrix(Monarch(2), (16, 24), {name: state[name] for name in ("first", "second")})
    assert_close(layer.to_dense().weight, expected)
    assert sl.analysis.num_params(layer.plan) == sum(sl.analysis.num_params(t.plan(16, 24)) for t in spec.terms)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("low_rank:rank=2+monarch:nblocks=4", LowRank(2) + Monarch(4)),
        ("monarch:nblocks=4@monarch:nblocks=4.T", Monarch(4) @ Monarch(4).T),
        ("(dyad:nblocks=2:variant=ot+low_rank:rank=0.5).T", (Dyad(2, "ot") + LowRank(0.5)).T),
        ("dense@8@dense", Product((Dense(), Dense()), width=8)),
        ("dense@8@(dense@dense)", Product((Dense(), Dense() @ Dense()), width=8)),
        ("low_rank:rank=2@dense+btt:rank=2x3:cores=3", LowRank(2) @ Dense() + BTT((2, 3), cores=3)),
        ("btt:rank=1:in_dims=4x6", BTT(in_dims=(4, 6))),
        ("kronecker", Kronecker()),
        ("block_diagonal:nblocks=2:shuffle=true", BlockDiagonal(2, shuffle=True)),
        ("chain:equation=i; o i -> o", sl.Chain("i, o i -> o")),
    ],
)
def test_text_and_json(text, spec):
    assert str(spec) == text
    assert parse(text) == spec
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(spec) == hash(parse(text))


def test_spaces_do_not_matter():
    assert parse(" ( monarch:nblocks=4 + low_rank:rank=2 ).T @ 8 @ dense ") == Product(
        ((Monarch(4) + LowRank(2)).T, Dense()), width=8
    )


def test_nested_sums_and_products_are_flat():
    assert (
        (Dense() + LowRank(1)) + LowRank(2)
        == Dense() + (LowRank(1) + LowRank(2))
        == Sum((Dense(), LowRank(1), LowRank(2)))
    )
    assert (Dense() @ LowRank(1)) @ Monarch(2) == Dense() @ (LowRank(1) @ Monarch(2))
    assert Monarch(2) == Monarch(2).T.T


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sum", "sum needs the parameter 'terms'"),
        ("dense+", "unknown structure ''"),
        ("(dense", "parenthesis"),
        ("dense@8@dense@9@dense", "one width"),
        ("dense@8@dense@dense", "one width"),
        ("monarh+dense", "did you mean 'monarch'"),
        ("btt:rank=x", "must be a positive whole number or several of: a positive whole number"),
        ("btt:in_dims=4x0", "several of: a positive whole number"),
        ("low_rank:rank=1.5", "a positive whole number or a fraction"),
        ("block_diagonal:shuffle=maybe", "true or false"),
        ("chain:equation=i; o i -> o:sizes=i", "axis=size"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ((Dense() + LowRank(1)) @ Dense(), (8, 8), "product of sums"),
        (Product((BlockDiagonal(4), BlockDiagonal(6)), width=12), (12, 12), "no common digits"),
        (sl.Chain("i, o i -> o", "i=4"), (8, 8), "in_features=8 is not i with sizes"),
        (sl.Chain("i, r i, o r -> o"), (8, 8), "axis 'r' has no size"),
        (BTT(in_dims=(3, 4)), (16, 16), "2 numbers whose product is 16; one choice is 4x4"),
        (BTT(rank=(2, 2)), (16, 16), "2 factors have 1 ranks"),
        (BTT(rank=(2, 9), cores=3), (27, 27), "rank may be 1 to 3x3"),
        (TensorTrain(rank=17), (16, 16), "rank may be 1 to 16"),
        (BTT(cores=9), (16, 16), "cores may be 2 to 8"),
        (Monarch(3, factors=3), (16, 16), r"nblocks may be 1, 2"),
        (BlockDiagonal(4, shuffle=True), (8, 8), "smaller nblocks that fit: 1, 2"),
        (sl.BlockDense(4, rank=6), (8, 8), "nblocks may be 1, 2"),
        (sl.Blast(4, rank=9), (8, 8), "rank may be 1 to 8"),
        (sl.Blast(3), (8, 8), "nblocks may be 1, 2, 4, 8"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        spec.plan(*shape)


def test_digits_of_the_published_code():
    """`factorize` of Qiu et al. 2024, at the widths of their models."""
    published = {768: (16, 48), 3072: (32, 96), 512: (16, 32), 2048: (32, 64), 1024: (32, 32), 50304: (24, 2096)}
    assert {width: greedy(width) for width in published} == published
    plan = BTT(rank=2, split="greedy").plan(3072, 768)
    assert plan.shapes == {"first": (48, 32, 2, 16), "second": (32, 96, 48, 2)}
    assert balanced(4096, 3) == (16, 16, 16)
    assert balanced(3072, 3) == (12, 16, 16)


def test_fractions_of_the_width():
    assert LowRank(0.25).plan(64, 128).shapes == {"down": (16, 128), "up": (64, 16)}
    assert sl.Blast(4, rank=0.5).plan(64, 128).shapes["middle"] == (32, 4, 4)
