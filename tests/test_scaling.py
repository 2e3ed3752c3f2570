"""Scaling laws: what is fitted to made-up runs is what made them."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from structlin import cli
from structlin.report import records
from structlin.scaling.curves import at, averaged, by_structure, curves, frontier, hull
from structlin.scaling.laws import Interval, loss_ratio, multiplier, paired, parametric, resampled, straight

RESULTS = Path(__file__).parents[1] / "results"


def run(structure="dense", size=100, seed=0, law=lambda flops: 3 * flops**-0.25, steps=(10, 100, 1000), **changes):
    """A record whose losses are ``law`` of the training FLOPs."""
    flops = [3.0 * size * 8 * step for step in steps]
    (record,) = records.read(RESULTS / "taxonomy-cpu.json")[:1]
    return {
        **record,
        "name": f"{structure} {size} {seed}",
        "seed": seed,
        "config": {"structure": structure},
        "metrics": {"flops_per_token": size, "tokens": 8 * steps[-1], "steps": steps[-1]},
        "series": {
            "step": list(steps),
            "seconds": [0.01 * step for step in steps],
            "valid_loss": [law(x) for x in flops],
        },
        **changes,
    }


def grouped(made):
    return by_structure(curves(made))


def test_flops_are_those_of_training():
    (curve,) = curves([run(size=100, steps=(10, 20))])
    assert curve.flops == (3 * 100 * 8 * 10, 3 * 100 * 8 * 20)
    assert curve.points("seconds")[0][0] == pytest.approx(0.1)
    (trained,) = curves([run(series={"step": [1], "seconds": [1.0], "train_loss": [9.0], "valid_step": [1000],
                                     "valid_seconds": [5.0], "valid_loss": [2.0]})])  # fmt: skip
    assert trained.loss == (2.0,)
    assert trained.flops == (3 * 100 * 8 * 1000,)
    assert curves([run(status="failed", error="died", metrics={}, series={})]) == []


def test_committed_runs_are_read():
    compared = curves(records.read(RESULTS / "compare-small-cpu.json"))
    assert {curve.structure for curve in compared} >= {"dense"}
    first, *_ = records.read(RESULTS / "compare-small-cpu.json")
    metrics = first["metrics"]
    assert compared[0].flops[-1] == pytest.approx(3 * metrics["flops_per_token"] * metrics["tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"tokens": 8, "steps": 1}}, "no training run"),
        ({"series": {"step": [1], "seconds": [1.0, 2.0], "valid_loss": [1.0]}}, "no training run"),
        ({"series": {"step": [1], "seconds": [1.0], "valid_loss": [0.0]}}, "allowed: positive"),
    ],
    ids=["metrics", "series", "loss"],
)
def test_what_is_no_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        curves([run(**changes)])


def test_the_frontier_takes_the_best_size_and_the_mean_of_seeds():
    small = run(size=10, law=lambda x: max(1.0, 100 * x**-0.5))
    large = run(size=1000, law=lambda x: max(0.2, 900 * x**-0.5))
    front = frontier(curves([small, large]))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))
    assert front[0][0] == 3 * 10 * 8 * 10
    assert front[-1][0] == 3 * 1000 * 8 * 1000
    pooled = averaged(curves([run(seed=0), run(seed=1, law=lambda x: 4 * 3 * x**-0.25)]))
    (points,) = pooled.values()
    assert points[0][1] == pytest.approx(2 * 3 * points[0][0] ** -0.25)


def test_the_hull_lies_below():
    points = [(math.exp(x), math.exp(y)) for x, y in ((0, 4), (1, 3.5), (2, 1), (3, 0.9), (4, 0), (5, 1))]
    assert [round(math.log(x)) for x, _ in hull(points)] == [0, 2, 4]


def test_interpolation_is_straight_in_logarithms():
    points = [(1.0, 16.0), (100.0, 1.0)]
    assert at(points, 10.0) == pytest.approx(4.0)
    assert at(points, 1.0) == pytest.approx(16.0)
    assert at(points, 100.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="outside"):
        at(points, 101.0)


def test_laws_come_back():
    plain = [(c, 3 * c**-0.25) for c in (1e3, 1e4, 1e5, 1e6)]
    assert straight(plain)[:2] == pytest.approx((0.25, 3.0))
    floored = [(10.0**k, 0.5 + 40 * 10 ** (-0.4 * k)) for k in range(3, 12)]
    assert parametric(floored) == pytest.approx((0.4, 40.0, 0.5), rel=1e-3)
    with pytest.raises(ValueError, match="no law"):
        straight(plain[:1])
    with pytest.raises(ValueError, match="no law"):
        parametric(plain[:3])


def test_multipliers_compare_equal_losses_and_ratios_equal_flops():
    dense = [(10.0**k, 10 ** (-0.5 * k)) for k in range(6)]
    cheaper = [(c / 4, loss) for c, loss in dense]
    assert multiplier(cheaper, dense) == pytest.approx(4)
    assert multiplier(dense, cheaper) == pytest.approx(1 / 4)
    assert loss_ratio(cheaper, dense) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no loss in common"):
        multiplier([(1.0, 9.0), (2.0, 8.0)], [(1.0, 2.0), (2.0, 1.0)])
    with pytest.raises(ValueError, match="no cost in common"):
        loss_ratio([(1.0, 9.0), (2.0, 8.0)], [(3.0, 9.0), (4.0, 8.0)])


def test_intervals_are_over_seeds():
    scale = {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}
    made = [run("a", seed=s, law=lambda x, f=f: f * 2 * x**-0.25) for s, f in scale.items()]
    made += [run("b", seed=s, law=lambda x, f=f: f * x**-0.25) for s, f in scale.items()]
    runs = grouped(made)
    assert paired(runs, ["a"], ["b"]) == pytest.approx((2, 2, 2))  # seeds shift both alike
    found = resampled(runs, lambda some: frontier(some["a"])[0][1])
    assert found.low < found.value < found.high
    assert found.high / found.low < 1.3
    alone = grouped([run("a"), run("b")])
    assert paired(alone, ["a"], ["b"]) == Interval(pytest.approx(1), None, None)
    assert resampled(alone, lambda some: 1.0) == (1.0, None, None)
    with pytest.raises(ValueError, match="no seed in common"):
        paired(grouped([run("a", seed=1), run("b", seed=2)]), ["a"], ["b"])


def test_students_interval_is_that_of_the_logarithms():
    scale = {0: 1.0, 1: 2.0, 2: 4.0}
    made = [run("a", seed=s, law=lambda x, f=f: f * x**-0.25) for s, f in scale.items()]
    made += [run("b", seed=s, law=lambda x: x**-0.25) for s in scale]
    found = paired(grouped(made), ["a"], ["b"])
    half = 4.302653 * math.log(2) / math.sqrt(3)  # t of two degrees of freedom, deviation log 2
    assert found == pytest.approx((2, 2 * math.exp(-half), 2 * math.exp(half)), rel=1e-5)


def test_the_command_writes_a_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made = [run(name, size, seed, lambda x, f=f: 0.1 + f * x**-0.3) for name, f in (("dense", 9), ("monarch", 6))
            for size in (100, 1000) for seed in (0, 1)]  # fmt: skip
    (tmp_path / "one").mkdir()
    records.write(tmp_path / "one" / "results.json", made[:4])
    records.write(tmp_path / "two.json", made[4:])
    out = tmp_path / "report"
    assert cli.main(["scaling", str(tmp_path / "one"), str(tmp_path / "two.json"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "report.md").read_text())
    dense, monarch = json.loads((out / "scaling.json").read_text())
    assert (dense["structure"], dense["runs"], dense["multiplier"]) == ("dense", 4, None)
    assert monarch["multiplier"]["value"] == pytest.approx((9 / 6) ** (1 / 0.3), rel=0.1)
    assert monarch["floor"]["value"] == pytest.approx(0.1, rel=0.05)
    assert (out / "flops.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "seconds.png").exists()
    assert not (out / "taxonomy.png").exists()


def test_the_taxonomy_is_drawn_where_it_is_known(tmp_path):
    pytest.importorskip("matplotlib")
    found = [r for r in records.read(RESULTS / "taxonomy-cpu.json") if r["seed"] == 0][:9]
    records.write(tmp_path / "runs.json", found)
    assert cli.main(["scaling", str(tmp_path / "runs.json"), "-o", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "taxonomy.png").exists()


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    failed = run(status="failed", error="died", metrics={}, series={})
    records.write(tmp_path / "failed.json", [failed])
    for given, message in (
        ("absent", "no file of records and no folder with results.json or record.json"),
        ("failed.json", "no run ended well"),
        (".", "no file of records"),
    ):
        assert cli.main(["scaling", str(tmp_path / given), "-o", str(tmp_path / "report")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
