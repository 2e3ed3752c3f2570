"""docs/structures.md: every structure is on it with its picture, and the numbers of its table are those of its plan."""

import runpy
from functools import reduce
from pathlib import Path

import pytest
import torch

import structlin as sl
from structlin import analysis
from structlin.spec import parse
from structlin.testing import assert_close, examples, make

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
PICTURES = ROOT / "docs" / "img" / "structures"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_numbers_of_the_table(row):
    plan = parse(row[0].strip("`")).plan(1024, 1024)
    params = analysis.num_params(plan)
    exponents = " ".join(f"{exponent:.2f}" for exponent in analysis.taxonomy(plan))
    expected = [f"{params:,}", f"{params / 2**20:.1%}", f"{analysis.compute(plan):.1%}", str(analysis.rank_bound(plan))]
    assert row[1:] == [*expected, exponents]


MIXTURES = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if "_moe:" in line[:30]]


@pytest.mark.parametrize("row", MIXTURES, ids=[row[0] for row in MIXTURES])
def test_numbers_of_mixtures(row):
    spec = parse(row[0])
    params, flops = spec.costs(1024, 1024)
    visited = spec.top_k * analysis.num_params(spec.expert_plan(1024, 1024)) + spec.experts * 1024
    assert row[1:] == [f"{params / 2**20:.1%}", f"{visited / 2**20:.1%}", f"{flops / 2**21:.1%}"]


def test_every_structure_has_its_section():
    titles = {name for line in PAGE.splitlines() if line.startswith("## ") for name in line[3:].split(", ")}
    assert sl.STRUCTURES.keys() <= titles


def sections():
    """Heading -> text, for each name that a heading gives."""
    parts = PAGE.split("\n## ")[1:]
    return {name: part for part in parts for name in part.partition("\n")[0].split(", ")}


@pytest.mark.parametrize("name", sl.STRUCTURES)
def test_every_structure_shows_its_picture(name):
    """`make pictures` draws the ones that are missing."""
    assert f"](img/structures/{name}.png)" in sections()[name]
    picture = (PICTURES / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 15_000


def test_no_picture_is_of_nothing():
    assert {path.stem for path in PICTURES.iterdir()} <= sl.STRUCTURES.keys()


def test_pictures_are_drawn_from_the_registry(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    assert script["CHOSEN"].keys() <= sl.STRUCTURES.keys()
    monkeypatch.setitem(script["main"].__globals__, "FOLDER", tmp_path)
    monkeypatch.setattr(sl, "STRUCTURES", {name: sl.STRUCTURES[name] for name in ("dyad", "pixelfly")})
    script["main"]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dyad.png", "pixelfly.png"]


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_the_steps_of_a_picture_make_the_matrix(spec, shape):
    pytest.importorskip("matplotlib")
    steps = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["steps"]
    layer = make(spec, shape, "cpu", bias=False)
    terms = (reduce(torch.matmul, steps(layer, term)) for term in layer.plan.terms)
    assert_close(sum(terms), layer.to_dense().weight.detach())
