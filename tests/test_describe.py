"""`structlin describe`: its numbers, counted by hand or on the matrix itself, its picture, and what it refuses."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

import structlin as sl
from structlin import analysis, cli
from structlin.describe import describe, picture
from structlin.spec import parse
from structlin.testing import examples, make

SPECS = [
    *examples(),
    *((sl.Dyad(nblocks=n, variant=v), (48, 32)) for n in (2, 4, 8) for v in ("it", "ot", "dt")),
    (sl.Dyad(4) + sl.BlockDiagonal(2) + sl.Dyad(2, "ot"), (16, 32)),
    (sl.BlockDiagonal(4) @ sl.BlockDiagonal(2), (16, 16)),
    (sl.Pixelfly(2, 4) + sl.BlockDiagonal(2), (16, 32)),
    (sl.Pixelfly(2, 4).T + sl.Pixelfly(2, 4, nfactors=1) + sl.Dyad(4), (32, 16)),
]


def run(*options: object) -> int:
    """The exit status of ``structlin describe``, however it is delivered."""
    try:
        return cli.main(["describe", *map(str, options)])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(("spec", "shape"), SPECS, ids=str)
def test_density_is_that_of_a_random_matrix(spec, shape):
    weight = make(spec, shape, "cpu", bias=False).to_dense().weight
    assert analysis.density(spec.plan(*shape)) == (weight != 0).double().mean().item()


@pytest.mark.parametrize(
    ("text", "density"),
    [("dense", 1), ("block_diagonal:nblocks=8", 1 / 8), ("dyad:nblocks=4", 7 / 16), ("monarch:nblocks=4", 1)],
)
def test_density_of_wide_matrices(text, density):
    assert analysis.density(parse(text).plan(4096, 4096)) == density


def test_numbers_of_a_monarch_matrix():
    text = describe(sl.Monarch(nblocks=4), 3072, 768, tokens=100, dtype="float32")
    rows = {line[:17].strip(): line[17:].strip() for line in text.splitlines()[2:-3] if line[:1].strip()}
    assert rows["params"].startswith("737,280 (31.25%")  # 4 * 192 * 192 + 4 * 768 * 192
    assert rows["FLOPs"].startswith("1,474,560 ")
    assert rows["bytes, 100 tokens"].startswith("5,099,520 forward")  # 4 * (100 * (768 + 768 + 768 + 3072) + params)
    assert "4,485,120 with all steps in one kernel" in text  # 4 * (100 * (768 + 3072) + params)
    assert rows["saved"].startswith("1,536 elements")
    assert rows["rank"] == "768 of 768 at most"
    assert rows["density"].startswith("100.00%")
    assert rows["equation"] == "i1 i0, i1 o0 r1 i0, o0 o1 i1 r1 -> o1 o0"
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["first", "i1", "o0", "r1", "i0", "4x4x48x192", "147,456", "192", "192", "0.07217", "2"],
        ["second", "o0", "o1", "i1", "r1", "4x768x4x48", "589,824", "192", "768", "0.07217", "2"],
    ]


@pytest.mark.parametrize(
    ("text", "shape", "parts"),
    [
        (
            "dyad:nblocks=4",
            (1024, 1024),
            ["524,288 (50.00%", "1,048,576 per", "43.75% of the entries", "2 products, 1 relayout\n", "0.04419"],
        ),
        ("low_rank:rank=8", (64, 32), ["768 (37.50%", "8 of 32 at most", "psi 0.55", "40 elements"]),
        ("kronecker", (64, 64), ["128 (3.12%", "2,048 per token forward (25.00%", "omega 0.50, psi 1.00, nu 0.50"]),
        ("dense", (64, 64), ["4,096 (100.00%", "torch.nn.functional.linear", "psi 1.00, nu 1.00"]),
    ],
)
def test_numbers_of_others(text, shape, parts):
    said = describe(parse(text), *shape)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_every_structure_is_described(spec, shape):
    text = describe(spec, *shape)
    assert text.startswith(f"{spec} at {shape[0]}x{shape[1]}\n")
    assert all(f"\n{name} " in text for name in spec.plan(*shape).factors)


def test_the_picture_is_a_png_and_leaves_the_random_state():
    image = pytest.importorskip("matplotlib.image")
    state = torch.get_rng_state()
    small, wide = picture(sl.Dyad(), 32, 64), picture(sl.Monarch(), 3072, 768)
    assert torch.equal(torch.get_rng_state(), state)
    for png in (small, wide):
        pixels = image.imread(io.BytesIO(png))
        assert pixels.std() > 0.05  # not blank
    assert picture(sl.Dyad(), 32, 64) == small


@pytest.mark.parametrize("name", sl.STRUCTURES)
def test_every_structure_is_drawn(name):
    image = pytest.importorskip("matplotlib.image")
    spec, shape = next(iter(sl.STRUCTURES[name].examples()))
    assert image.imread(io.BytesIO(picture(spec, *shape))).std() > 0.05


def test_a_long_name_is_broken_into_lines(monkeypatch):
    """One line would leave the picture at the right."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    titles = []
    monkeypatch.setattr(axes, "set_title", lambda self, text, **_: titles.append(text))
    spec = sl.Dyad(4) + sl.BlockDiagonal(4) + sl.BlockDiagonal(2) + sl.LowRank(8)
    picture(spec, 16, 16)
    (lines,) = (title.splitlines() for title in titles)
    assert "".join(lines).replace(" ", "") == f"{spec}at16x16"
    assert len(lines) > 1
    assert max(map(len, lines)) <= 56


def test_what_is_too_large_to_draw_says_so():
    with pytest.raises(ValueError, match="4099x4099, the smallest that halving gives; widths may be up to 4096"):
        picture(sl.LowRank(4), 4099, 4099)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run("(dyad:nblocks=4+low_rank:rank=2).T", "32x64", "--tokens", 7, "--dtype", "float64") == 0
    said = capsys.readouterr().out
    assert said == describe((sl.Dyad(4) + sl.LowRank(2)).T, 32, 64, 7, "float64") + "\n"
    assert run("dyad:nblocks=4", "32x64", "--png", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["monach", "64x64"], ["'monach'", "did you mean 'monarch'?"]),
        (["monarch:nblocks=5", "64x64"], ["nblocks=5", "1, 2, 4, 8"]),
        (["dense", "64"], ["OUTxIN: '64'", "3072x768"]),
        (["dense", "64x0"], ["64x0", "widths start at 1"]),
        (["dense", "64x64", "--tokens", "0"], ["--tokens: 0", "1 or more"]),
        (["dense", "64x64", "--tokens", "many"], ["--tokens", "'many'", "whole numbers"]),
        (["dense", "64x64", "--dtype", "float61"], ["dtype='float61'", "float64, float32"]),
        (["dense", "64x64", "--png", "a.jpg"], ["--png", "a.jpg", ".png"]),
        (["dense", "64x64", "--png", "gone/a.png"], ["--png", "gone/a.png"]),
        (["dense"], ["OUTxIN"]),
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(
    options: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("structlin describe: error: ")
    assert all(part in said.err for part in parts), said.err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_only_the_picture_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("structlin.options.find_spec", lambda name: None)
    assert run("dense", "64x64") == 0
    assert run("dense", "64x64", "--png", "a.png") == 1
    assert "needs matplotlib" in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints():
    page = (Path(__file__).parents[1] / "docs" / "structures.md").read_text(encoding="utf-8")
    assert f"\n{describe(sl.Dyad(4), 1024, 1024)}\n```" in page
