"""Plans: what an equation means, what is refused, and that the transposed plan is the transposed matrix."""

import pytest
import torch

from structlin.ops import reference
from structlin.ops.lookup import collect, gather
from structlin.plan import Plan, Step, Term
from structlin.testing import assert_close, examples

MONARCH = Plan.einsum("k i, k j r i, j o k r -> o j", k=4, j=4, i=5, o=3, r=2)
KRONECKER = Plan.einsum("b a, d a, e b -> e d", a=2, b=3, d=4, e=5)
TRAIN = Plan.einsum("a b c, a d r, r b e s, s c f -> d e f", a=2, b=3, c=2, d=3, e=2, f=3, r=2, s=3)


def matrix(plan, factors):
    """The dense matrix by one einsum over all factors of a term, which no step of the chain takes part in."""
    letter = {axis: chr(ord("a") + i) for i, axis in enumerate(plan.sizes)}
    total = 0
    for term in plan.terms:
        # the output may read an axis of the input, so the input's axes get letters of their own, tied by an identity
        tied = [axis for axis in term.x if axis in term.y]
        spell = [[letter[axis] for axis in axes] for axes in (*term.weights, term.y)]
        columns = [letter[axis].upper() if axis in tied else letter[axis] for axis in term.x]
        eyes = [torch.eye(plan.sizes[axis], dtype=torch.float64) for axis in tied]
        left = [*map("".join, spell[:-1]), *(letter[axis] + letter[axis].upper() for axis in tied)]
        equation = ",".join(left) + "->" + "".join([*spell[-1], *columns])
        weight = torch.einsum(equation, *(factors[name] for name in term.names), *eyes)
        weight = weight.reshape(plan.size(term.y), plan.size(term.x))
        weight = weight if term.table is None else collect(weight, term.table)
        total = total + (weight if term.out_table is None else collect(weight.T, term.out_table).T)
    return total


def draw(plan):
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in plan.shapes.items()}


def test_roles_of_the_axes_of_each_step():
    first, second = MONARCH.terms[0].steps
    assert (first.group, first.contract, first.free, first.out) == (("k",), ("i",), (), ("j", "r"))
    assert (second.group, second.contract, second.free, second.out) == (("j",), ("k", "r"), (), ("o",))
    first, second = KRONECKER.terms[0].steps
    assert (first.group, first.contract, first.free, first.out) == ((), ("a",), ("b",), ("d",))
    assert (second.group, second.contract, second.free, second.out) == ((), ("b",), ("d",), ("e",))


def test_steps_keep_what_a_later_factor_or_the_output_needs():
    assert [step.equation for step in TRAIN.terms[0].steps] == [
        "t a b c, a d r -> t b c d r",
        "t b c d r, r b e s -> t c d e s",
        "t c d e s, s c f -> t d e f",
    ]


def test_sizes_shapes_and_text():
    assert (MONARCH.out_features, MONARCH.in_features) == (12, 20)
    assert MONARCH.shapes == {"w1": (4, 4, 2, 5), "w2": (4, 3, 4, 2)}
    assert str(MONARCH) == "k i, k j r i, j o k r -> o j"
    assert str(MONARCH + Plan.einsum("x, y x -> y", names=["w"], x=20, y=12)).endswith("  +  x, y x -> y")


def test_equal_plans_are_equal_and_hash_alike():
    again = Plan.einsum(str(MONARCH), **dict(reversed(MONARCH.axes)))
    assert again == MONARCH
    assert len({again, MONARCH, KRONECKER}) == 2
    assert Plan.einsum("i, o i -> o", i=4, o=3) != Plan.einsum("i, o i -> o", i=3, o=4)


@pytest.mark.parametrize(
    "plan",
    [MONARCH, KRONECKER, TRAIN, *(spec.plan(*shape) for spec, shape in examples())],
    ids=str,
)
def test_chain_and_transpose_are_the_matrix(plan):
    factors = draw(plan)
    dense = matrix(plan, factors)
    for chain, wanted in ((plan, dense), (plan.T, dense.T)):
        assert (chain.out_features, chain.in_features) == wanted.shape
        total = 0
        for term in chain.terms:
            z = torch.eye(chain.in_features, dtype=torch.float64)
            z = z if term.table is None else gather(z, term.table)
            z = z.reshape(-1, *chain.shape(term.x))
            for name, step in zip(term.names, term.steps, strict=True):
                z = reference.contract(z, factors[name], step.equation)
            z = z.reshape(-1, chain.size(term.y))
            total = total + (z if term.out_table is None else collect(z, term.out_table))
        assert_close(total.T, wanted)


@pytest.mark.parametrize("plan", [MONARCH, KRONECKER, TRAIN], ids=str)
def test_transposing_twice_gives_the_plan_back(plan):
    assert plan == plan.T.T
    assert plan.T.shapes == dict(reversed(plan.shapes.items()))


def test_only_an_ordinary_weight_is_dense():
    assert Plan.einsum("i, o i -> o", i=4, o=3).is_dense
    assert not Plan.einsum("i, i o -> o", i=4, o=3).is_dense
    assert not Plan.einsum("a b, o a b -> o", a=2, b=2, o=3).is_dense
    assert not Plan.einsum("g i, g o i -> g o", g=2, i=4, o=3).is_dense
    assert not Plan.einsum("f i, o i -> f o", f=2, i=4, o=3).is_dense
    assert not Plan.einsum("i, r i, o r -> o", i=4, r=2, o=3).is_dense
    assert not (Plan.einsum("i, o i -> o", i=4, o=3) + Plan.einsum("i, o i -> o", names=["v"], i=4, o=3)).is_dense


@pytest.mark.parametrize(
    ("equation", "sizes", "problem"),
    [
        ("i -> o", {"i": 2, "o": 2}, "not of the form"),
        ("i, o i", {"i": 2, "o": 2}, "not of the form"),
        ("i, o i -> o -> o", {"i": 2, "o": 2}, "not of the form"),
        ("i, o i -> o", {"i": 2}, "axis 'o' has no size"),
        ("i, o i -> o", {"i": 2, "o": 2, "q": 3}, "has no axis 'q'"),
        ("i, o i -> o", {"i": 2, "o": 0}, "axis 'o' has size 0"),
        ("i, o i -> o", {"i": 2, "o": -3}, "axis 'o' has size -3"),
        ("i, o i -> o", {"i": 2.0, "o": 3}, "axis 'i' has size 2.0"),
        ("t, o t -> o", {"t": 2, "o": 2}, "reserved for tokens"),
        ("i i, o i -> o", {"i": 2, "o": 2}, "axis 'i' occurs twice"),
        ("i, o i q -> o", {"i": 2, "o": 2, "q": 2}, "axis 'q' occurs in one operand only"),
        ("i k, o i -> o", {"i": 2, "o": 2, "k": 2}, "axis 'k' occurs in one operand only"),
        ("i, o i -> o p", {"i": 2, "o": 2, "p": 2}, "axis 'p' occurs in one operand only"),
        ("i, -> i", {"i": 2}, "one axis or more in each factor"),
        ("i, o_i! -> o", {"i": 2, "o": 2}, "'o_i!'"),
        ("1i, o 1i -> o", {"i": 2, "o": 2}, "'1i'"),
    ],
)
def test_a_malformed_equation_is_refused_by_name(equation, sizes, problem):
    with pytest.raises(ValueError, match=problem) as refusal:
        Plan.einsum(equation, **sizes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a"], "2 factors in .* but 1 names: a"),
        (["a", "a"], "unique, not a, a"),
        (["a", "bias"], "'bias' is no name for a factor"),
        (["a", "b.c"], "'b.c' is no name for a factor"),
    ],
)
def test_factor_names_are_checked(names, problem):
    with pytest.raises(ValueError, match=problem):
        Plan.einsum("i, r i, o r -> o", names=names, i=2, r=2, o=2)


def test_a_term_without_factors_is_refused():
    with pytest.raises(ValueError, match="one factor or more"):
        Plan((Term(("i",), (), ("i",), ()),), (("i", 2),))


def test_sums_have_one_shape_one_size_per_axis_and_unique_names():
    def block(name, **sizes):
        return Plan.einsum("g i, g o i -> g o", names=[name], **sizes)

    total = block("a", g=2, i=3, o=4) + Plan.einsum("p, q p -> q", names=["b"], p=6, q=8)
    assert list(total.shapes) == ["a", "b"]
    with pytest.raises(ValueError, match=r"one shape \(out, in\), not \[\(4, 6\), \(8, 6\)\]"):
        block("a", g=2, i=3, o=4) + Plan.einsum("p, q p -> q", names=["b"], p=6, q=4)
    with pytest.raises(ValueError, match="axis 'g' has sizes 2 and 4; rename one"):
        block("a", g=2, i=4, o=4) + block("b", g=4, i=2, o=2)
    with pytest.raises(ValueError, match="unique, not a, a"):
        block("a", g=2, i=3, o=4) + block("a", g=2, i=3, o=4)


def test_a_step_is_checked_by_itself():
    with pytest.raises(ValueError, match="axis 'k' occurs in one operand only"):
        Step(("k", "i"), ("o", "i"), ("o",))
