"""Specs: what may be written, what is refused and with which words, and the way through text and JSON."""

import dataclasses
import json
import pickle
import re
from typing import Literal

import pytest

import structlin as sl
from structlin.spec import STRUCTURES, Spec, find, parse, register
from structlin.testing import examples
from structlin.widths import balanced, divide

every_name = pytest.mark.parametrize("name", sorted(STRUCTURES))


@pytest.fixture
def registry():
    """The registry, put back after the test."""
    before = dict(STRUCTURES)
    yield STRUCTURES
    STRUCTURES.clear()
    STRUCTURES.update(before)


@every_name
def test_every_structure_has_defaults_and_stands_under_its_name(name):
    required = [f.name for f in dataclasses.fields(find(name)) if f.default is dataclasses.MISSING]
    if required:  # made of other specs or of an equation
        with pytest.raises(ValueError, match=f"{name} needs the parameter '{required[0]}'"):
            parse(name)
        return
    spec = parse(name)
    assert type(spec) is STRUCTURES[name] is find(name)
    assert spec == STRUCTURES[name]()
    assert spec.name == name


@every_name
def test_every_structure_has_an_example_that_is_not_square(name):
    assert any(out_features != in_features for _, (out_features, in_features) in STRUCTURES[name].examples())


@pytest.mark.parametrize("spec", [spec for spec, _ in examples()], ids=str)
def test_through_text_and_json(spec):
    assert parse(str(spec)) == spec
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert eval(repr(spec), vars(sl)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(parse(str(spec))) == hash(spec)


def test_text_shows_the_first_parameter_and_what_is_not_the_default():
    assert str(sl.Dyad()) == "dyad:nblocks=4"
    assert str(sl.Dyad(nblocks=8, variant="ot")) == "dyad:nblocks=8:variant=ot"
    assert str(sl.Dense()) == "dense"
    assert repr(sl.Dyad(nblocks=8, variant="ot")) == "Dyad(nblocks=8, variant='ot')"
    assert sl.Dyad(nblocks=8).to_dict() == {"structure": "dyad", "nblocks": 8, "variant": "it"}


def test_specs_of_two_structures_differ_and_none_can_be_changed():
    assert sl.BlockDiagonal(nblocks=4) != sl.Monarch(nblocks=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sl.Monarch().nblocks = 2


def test_parse_allows_spaces_around_and_any_order():
    assert parse(" dyad:variant=ot:nblocks=8\n") == sl.Dyad(nblocks=8, variant="ot")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("monrach", "unknown structure 'monrach'; did you mean 'monarch'? allowed: "),
        ("BTT", "unknown structure 'BTT'; did you mean 'btt'? allowed: "),
        ("low-rank:rank=3", "unknown structure 'low-rank'; did you mean 'low_rank'? "),
        ("", "unknown structure ''; allowed: "),
        ("dyad:nblock=8", "dyad has no parameter 'nblock'; did you mean 'nblocks'? allowed: nblocks, pad, variant"),
        ("dyad:structure=monarch", "dyad has no parameter 'structure'; allowed: nblocks, pad, variant"),
        ("dense:rank=2", "dense has no parameter 'rank'; allowed: pad"),
        ("dyad:variant=to", "dyad: variant='to' is unknown; did you mean 'ot'? allowed: dt, it, narrow, ot"),
        ("dyad:nblocks", "'nblocks' in 'dyad:nblocks' is not of the form parameter=value"),
        ("dyad:", "'' in 'dyad:' is not of the form parameter=value"),
        ("dyad:nblocks=4:nblocks=8", "parameter 'nblocks' is given twice in 'dyad:nblocks=4:nblocks=8'"),
        ("dyad:nblocks=0", "dyad: nblocks=0 must be a positive whole number"),
        ("dyad:nblocks=-2", "dyad: nblocks='-2' must be a positive whole number"),
        ("dyad:nblocks=4.0", "dyad: nblocks='4.0' must be a positive whole number"),
        ("dyad:nblocks=", "dyad: nblocks='' must be a positive whole number"),
        ("low_rank:rank=²", "low_rank: rank='²' must be a positive whole number"),
    ],
)
def test_bad_text_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refusal:
        parse(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "unknown structure ''"),
        ({"nblocks": 4}, "unknown structure ''"),
        ({"structure": 5}, "unknown structure 5; allowed: "),
        ({"structure": ["dyad"]}, "unknown structure"),
        ({"structure": "dyad", "variant": None}, "dyad: variant=None is unknown; allowed: dt, it, narrow, ot"),
        ({"structure": "dyad", "nblocks": "4"}, "dyad: nblocks='4' must be a positive whole number"),
        ({"structure": "dyad", "nblocks": True}, "dyad: nblocks=True must be a positive whole number"),
        ({"structure": "dyad", "nblocks": 4.0}, "dyad: nblocks=4.0 must be a positive whole number"),
        ({"structure": "dyad", "blocks": 4}, "dyad has no parameter 'blocks'; did you mean 'nblocks'?"),
    ],
)
def test_bad_json_is_refused(values, message):
    before = dict(values)
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refusal:
        Spec.from_dict(values)
    assert "\n" not in str(refusal.value)
    assert values == before


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (sl.Dyad(nblocks=5), (24, 16), "nblocks=5 does not divide out_features=24; nblocks may be 1, 2, 4, 8"),
        (sl.Dyad(nblocks=3), (24, 16), "nblocks=3 does not divide in_features=16; nblocks may be 1, 2, 4, 8"),
        (sl.BlockDiagonal(nblocks=7), (24, 16), "nblocks=7 does not divide out_features=24; nblocks may be 1, 2, 4, 8"),
        (sl.Monarch(nblocks=3), (24, 16), "nblocks=3 does not fit 24x16: "),
        (sl.BTT(rank=5), (16, 24), "rank=5 exceeds "),
        (sl.LowRank(rank=17), (24, 16), "rank=17 exceeds min(out_features, in_features); rank may be 1 to 16"),
        (sl.BTT(), (0, 16), "a width of 0 has no factors; widths start at 1"),
        (sl.Kronecker(), (16, -4), "a width of -4 has no factors; widths start at 1"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_refused_with_what_fits(spec, shape, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refusal:
        spec.plan(*shape)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("cls", "parameter", "bad", "shape"),
    [
        (sl.Dyad, "nblocks", 5, (24, 16)),
        (sl.BlockDiagonal, "nblocks", 5, (36, 60)),
        (sl.Monarch, "nblocks", 3, (24, 16)),
        (sl.Monarch, "nblocks", 5, (96, 64)),
        (sl.Monarch, "nblocks", 2, (7, 11)),
        (sl.LowRank, "rank", 99, (24, 16)),
        (sl.BTT, "rank", 99, (24, 16)),
    ],
)
def test_the_values_that_a_refusal_names_are_those_that_fit(cls, parameter, bad, shape):
    def fits(value):
        try:
            cls(**{parameter: value}).plan(*shape)
        except ValueError:
            return False
        return True

    with pytest.raises(ValueError, match=f"{parameter} may be ") as refusal:
        cls(**{parameter: bad}).plan(*shape)
    named = str(refusal.value).partition(f"{parameter} may be ")[2].partition(";")[0]
    if " to " in named:
        low, high = map(int, named.split(" to "))
        values = set(range(low, high + 1))
    else:
        values = set(map(int, named.split(", ")))
    assert values == {value for value in range(1, 100) if fits(value)}


def test_many_allowed_values_are_shortened():
    with pytest.raises(ValueError, match=r"nblocks may be 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, \.\.\., 5040$"):
        divide("nblocks", 11, out_features=5040)


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 768, 3072, 10007, 2**31])
def test_balanced_finds_the_nearest_pair(size):
    small, large = balanced(size)
    assert small <= large
    assert small * large == size
    assert not any(size % d == 0 for d in range(small + 1, min(large, int(size**0.5) + 1)))


def test_register_adds_a_structure_that_parses_and_makes_a_layer(registry):
    @register("shift")
    class Shift(Spec):
        nblocks: int = 2
        kind: Literal["a", "b"] = "a"

        def plan(self, out_features, in_features):
            return sl.BlockDiagonal(self.nblocks).plan(out_features, in_features)

    assert parse("shift:kind=b") == Shift(kind="b")
    assert str(Shift(nblocks=4)) == "shift:nblocks=4"
    assert sl.StructuredLinear(8, 4, Shift()).plan.shapes == {"blocks": (2, 2, 4)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("monarch", "structure 'monarch' is taken by Monarch"),
        ("a:b", "'a:b' is no name for a structure"),
        ("a,b", "'a,b' is no name for a structure"),
        ("", "'' is no name for a structure"),
    ],
)
def test_register_refuses_a_name_that_is_taken_or_cannot_be_parsed(registry, name, message):
    with pytest.raises(ValueError, match=message):
        register(name)(type("Other", (Spec,), {}))
    assert STRUCTURES["monarch"] is sl.Monarch


def test_a_field_of_another_type_is_an_error_of_the_structure(registry):
    @register("loose")
    class Loose(Spec):
        sizes: dict[str, int] = None

    with pytest.raises(TypeError, match="a field of a spec cannot be"):
        Loose()
