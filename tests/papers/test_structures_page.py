"""docs/structures.md: every structure is on it, and the numbers of its table are those of the plans."""

from pathlib import Path

import pytest

import structlin as sl
from structlin import analysis
from structlin.spec import parse

PAGE = (Path(__file__).parents[2] / "docs" / "structures.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_numbers_of_the_table(row):
    plan = parse(row[0].strip("`")).plan(1024, 1024)
    params = analysis.num_params(plan)
    exponents = " ".join(f"{exponent:.2f}" for exponent in analysis.taxonomy(plan))
    expected = [f"{params:,}", f"{params / 2**20:.1%}", f"{analysis.compute(plan):.1%}", str(analysis.rank_bound(plan))]
    assert row[1:] == [*expected, exponents]


def test_every_structure_has_its_section():
    titles = {name for line in PAGE.splitlines() if line.startswith("## ") for name in line[3:].split(", ")}
    assert sl.STRUCTURES.keys() <= titles
