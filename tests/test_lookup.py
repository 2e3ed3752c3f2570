"""Terms that look up blocks: their transposes and other tables run too, and what cannot be is refused."""

import importlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

import structlin as sl
from structlin import analysis
from structlin.nn.least_squares import matrix
from structlin.ops import lookup
from structlin.ops.lookup import collect, gather
from structlin.plan import Plan, Term
from structlin.testing import CONTRACT, assert_close, inputs, make, plain, promises

FLOAT = torch.float64
TABLE = ((0, 2), (1, 0), (2, 1))
SIZES = (("i", 3), ("k", 4), ("n", 5), ("s", 2))
SPARSE = Plan((Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("i", "n"), ("sparse",), TABLE),), SIZES)
FLY = sl.Pixelfly(block_size=2, butterfly_size=4, nfactors=2, rank=2)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_the_transpose_keeps_the_contract(promise):
    promise(FLY.T, (16, 24), "cpu")


def test_the_sum_with_another_structure_keeps_its_names_apart():
    layer = make(FLY + sl.BlockDiagonal(4) + FLY, (16, 24), "cpu")
    assert [*layer.plan.factors] == ["sparse", "down", "up", "blocks", "sparse1", "down1", "up1"]
    x = inputs(layer, 5)
    assert_close(layer(x), plain(layer, x))


def test_collect_is_the_adjoint_of_gather():
    x, y = torch.randn(5, 12, dtype=FLOAT), torch.randn(5, 24, dtype=FLOAT)
    assert_close((gather(x, TABLE) * y).sum(), (x * collect(y, TABLE)).sum())
    assert gather(torch.arange(3), TABLE).tolist() == [0, 2, 1, 0, 2, 1]


def test_an_index_that_a_tracer_made_is_not_kept():
    table, x = ((4, 1), (3, 0), (2, 1)), torch.randn(5)  # of no other test
    with FakeTensorMode() as mode:
        gather(mode.from_tensor(x), table)
    assert torch.equal(gather(x, table), x[[4, 1, 3, 0, 2, 1]])


def test_an_index_that_a_transform_made_is_not_kept(monkeypatch):
    monkeypatch.setattr(lookup, "_kept", {})
    promises.works_under_transforms(FLY.T, (16, 24), "cpu")
    layer = sl.StructuredLinear(24, 16, FLY)
    torch.func.functionalize(layer)(torch.randn(2, 24))
    layer(torch.randn(2, 24)).sum().backward()
    promises.compiles_whole(FLY.T, (16, 24), "cpu")


@pytest.mark.parametrize("plan", [SPARSE, SPARSE.T], ids=["lookup", "its transpose"])
def test_a_projection_keeps_the_entries_of_the_support(plan):
    torch.manual_seed(0)
    weight = torch.randn(plan.out_features, plan.in_features, dtype=FLOAT)
    (term,) = plan.terms
    support = matrix(plan, term, {"sparse": torch.ones(plan.shapes["sparse"], dtype=FLOAT)})
    assert support.unique().tolist() == [0, 1]
    assert support.mean() == 2 / 3
    assert_close(matrix(plan, term, sl.project(plan, weight)), weight * support)


def test_the_low_rank_term_takes_what_the_cells_leave():
    torch.manual_seed(0)
    weight = torch.randn(16, 24, dtype=FLOAT)
    plan = FLY.plan(16, 24)
    total = sum(matrix(plan, term, sl.project(plan, weight)) for term in plan.terms)
    alone = [sl.Pixelfly(2, 4, 2).plan(16, 24), sl.LowRank(2).plan(16, 24)]
    cells, low = (weight - matrix(p, p.terms[0], sl.project(p, weight)) for p in alone)
    assert (weight - total).norm() < min(cells.norm(), low.norm())


def test_costs_count_what_is_looked_up():
    assert (SPARSE.in_features, SPARSE.out_features) == (12, 15)
    assert analysis.num_params(SPARSE) == analysis.flops(SPARSE) // 2 == 3 * 5 * 2 * 4
    assert analysis.saved_activations(SPARSE) == 12 + 24
    assert analysis.traffic(SPARSE, tokens=1, itemsize=1) == (12 + 24) + (24 + 15) + 120


def test_explain_names_the_lookup():
    spec = sl.Pixelfly(block_size=2, butterfly_size=4, nfactors=1)
    for own, what in ((spec, "look up blocks of the input"), (spec.T, "add up blocks of the output")):
        assert what in [row.what for row in sl.explain(make(own, (16, 24), "cpu"), 5)]


@pytest.mark.parametrize(
    ("spec", "paired"),
    [
        (sl.Pixelfly(64, 4, rank=24), {0: 1}),
        (sl.LowRank(8) + sl.Pixelfly(64, 4), {1: 0}),
        (sl.Pixelfly(64, 4, rank=24) + sl.Pixelfly(64, 4, rank=8), {0: 1, 2: 3}),
        (sl.BlockDiagonal(4) + sl.Pixelfly(64, 4, rank=24), {1: 2}),
        (sl.BlockSparse(4, 2) + sl.LowRank(24), {0: 1}),
        (sl.Pixelfly(64, 4), {}),
        (sl.Pixelfly(64, 4, rank=20), {}),
        (sl.Pixelfly(64, 4) + sl.Dyad(4), {}),
        (sl.Pixelfly(32, 16, rank=24), {}),
    ],
    ids=str,
)
def test_a_low_rank_term_pairs_with_the_block_sparse_kernel(spec, paired):
    pytest.importorskip("triton")
    from structlin.ops.lowering import lower
    from structlin.ops.moves import Kernels
    from structlin.ops.products import gradient_pairs, pairs
    from structlin.ops.schedule import schedule

    text = lower(spec.plan(256, 512)).text
    for tokens in (1, 70):
        terms = schedule(text, tokens, Kernels(True, True))
        assert pairs([(term.steps[-1].forward, term.steps[-1].after) for term in terms]) == paired
        assert pairs([(term.steps[0].dgrad, term.undo) for term in terms]) == paired
        assert gradient_pairs({i: term.steps[-1].wgrad for i, term in enumerate(terms)}) == paired
    assert pairs([(t.steps[-1].forward, t.steps[-1].after) for t in schedule(text, 0, Kernels(True, True))]) == {}


def test_only_what_lies_as_the_kernel_reads_it_pairs():
    pytest.importorskip("triton")
    from structlin.ops.lowering import lower
    from structlin.ops.moves import Kernels
    from structlin.ops.products import pairs
    from structlin.ops.schedule import schedule

    sparse = sl.Pixelfly(64, 4).plan(256, 512)
    low_rank = Plan.einsum("i, r i, r o -> o", names=["down", "up"], i=512, r=24, o=256)
    terms = schedule(lower(sparse + low_rank.apart(sparse)).text, 70, Kernels(True, True))
    assert pairs([(term.steps[-1].forward, term.steps[-1].after) for term in terms]) == {}
    assert pairs([(term.steps[0].dgrad, term.undo) for term in terms]) == {0: 1}


def test_explain_names_what_pairs(monkeypatch):
    pytest.importorskip("triton")
    from structlin.ops.moves import Kernels

    explain = importlib.import_module("structlin.nn.explain")
    layer = make(sl.Pixelfly(64, 4, rank=24), (256, 512), "cpu")
    monkeypatch.setattr(explain, "kernels_on", lambda *_: Kernels(True, True))
    rows = explain._lowered(layer, layer._program, 70, True)
    assert [row.backend for row in rows] == ["block-sparse kernel", "mm 70x24x512", "in the block-sparse kernel"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (((0, 1), (1, 0)), "a row and a slot for each value of i and s"),
        (((0, 1), (1, 2), (2,)), "a row and a slot"),
        (((0, 1), (1, 2), (2, 3)), "equally often"),
        (((1, 2), (2, 3), (3, 1)), "from 0 on"),
        (((0, 0), (1, 1), (2, 2)), "once in a row"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, message):
    term = Term(("i", "s", "k"), (("i", "n", "s", "k"),), ("i", "n"), ("sparse",), table)
    with pytest.raises(ValueError, match=message):
        Plan((term,), SIZES)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (sl.Pixelfly(32, 10), (1536, 1536), "butterfly_size may be 2, 3, 4, 6, 8, 12, .* 1536; or pad=True"),
        (sl.Pixelfly(32, 1), (64, 64), "butterfly_size may be 2, 4, 8, "),
        (sl.Pixelfly(32, 16), (15, 16), "none does"),
        (sl.Pixelfly(8, 4, 3), (64, 64), "nfactors may be 1 to 2"),
        (sl.Pixelfly(32, 16), (768, 768), "block_size may be 1, 2, 3, 4, 6"),
        (sl.Pixelfly(32, 16, rank=513), (512, 512), "rank may be 1 to 512"),
        (sl.Pixelfly(2, 4) @ sl.Dense(), (16, 16), "looked-up blocks"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_refused(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        spec.plan(*shape)


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(ValueError, match="adds up blocks"):
        sl.project(FLY.T.plan(16, 24), torch.randn(16, 24), torch.randn(50, 24))
    term = Term(("i", "s", "k"), (("r", "i", "s", "k"), ("n", "r")), ("n",), ("a", "b"), TABLE)
    with pytest.raises(ValueError, match="one factor"):
        sl.project(Plan((term,), (*SIZES, ("r", 2))), torch.randn(5, 12))
