"""Searching for structures: what is drawn, how it is sized, what a task gives, and that a study loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from structlin import analysis, cli
from structlin.nn import StructuredLinear
from structlin.problems.vision import images
from structlin.report import records
from structlin.report.records import Record
from structlin.search import budget, levels, presets, runners, space, tasks, training
from structlin.search.config import Config, configure
from structlin.search.study import JOURNAL, SearchError, Study, open_storage
from structlin.spec import parse
from structlin.surgery import to_structured_
from structlin.train.config import OptionError

THREE = "monarch:nblocks=4,low_rank:rank=4/8"


def config(**options: Any) -> Config:
    return configure(**{"preset": "smoke", "space": THREE, "steps": 8, "device": "cpu", **options})


def quiet(line: str) -> None:
    pass


def search(folder: Path, runner: runners.Runner | None = None, url: str | None = None, **options: Any) -> list[Record]:
    folder.mkdir(exist_ok=True)
    study = Study(config(**options), open_storage(folder, url), "search", "a command")
    return study.run(runner or runners.InProcess(), quiet)


def numbers(record: Record) -> dict[str, Any]:
    """What two runs of the same trial have in common, on any clock."""
    metrics = {name: value for name, value in record["metrics"].items() if name != "train_seconds"}
    return {"name": record["name"], **metrics, "losses": record["series"]["valid_loss"]}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("search")
    return folder, search(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, dark and bright, as arrays."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.Generator(np.random.PCG64(0))
    labels = generator.integers(2, size=200).astype(np.uint8)
    pixels = generator.integers(100, size=(200, 12, 12)) + 150 * labels[:, None, None]
    np.save(folder / "digits_train_x.npy", pixels.astype(np.uint8))
    np.save(folder / "digits_train_y.npy", labels)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"Chapter {index}: a naïve fox met {index} dogs. " * 20, encoding="utf-8")
    return folder


# what is drawn


@pytest.mark.parametrize("shares", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0.3, 0.9, 0.2, 0.8, 1), (0.5, 1, 0.5, 1, 0.5)])
def test_points_are_in_the_space_that_the_paper_searches(shares: tuple[float, ...]) -> None:
    alpha, beta, gamma, delta, epsilon, phi, rho = space.theta_of(*shares)
    assert alpha + beta + gamma == pytest.approx(1)
    assert delta + epsilon + phi == pytest.approx(1)
    assert min(alpha, epsilon) >= min(beta, delta) - 0.01
    assert 0 <= rho <= min(alpha, epsilon) + 0.01
    parse(space.text_of((alpha, beta, gamma, delta, epsilon, phi, rho))).plan(64, 64)


def test_a_point_that_changes_places_has_the_same_matrices() -> None:
    given, turned = (0.17, 0.83, 0.0, 0.5, 0.5, 0.0, 0.0), space.theta_of(0.17, 1.0, 0.5, 1.0, 0.0)
    assert turned[:2] == (0.83, 0.17)
    plans = [parse(space.text_of(theta)).plan(64, 64) for theta in (given, turned)]
    assert sorted(plans[0].shapes.values()) == sorted(plans[1].shapes.values()) or (
        analysis.num_params(plans[0]) == analysis.num_params(plans[1])
    )
    assert analysis.flops(plans[1]) <= analysis.flops(plans[0])


def test_a_grid_has_the_published_points_and_what_is_listed() -> None:
    found = space.parse_space("einsum,monarch:nblocks=2/4,monarch:nblocks=4,dyad:nblocks=4:variant=ot/dt")
    grid = found.grid()
    assert len(space.GRID) >= 12
    assert grid[: len(space.GRID)] == [space.text_of(theta) for theta in space.GRID]
    assert grid[len(space.GRID) :] == [
        "monarch:nblocks=2", "monarch:nblocks=4", "dyad:nblocks=4:variant=ot", "dyad:nblocks=4:variant=dt"
    ]  # fmt: skip
    for theta in space.GRID:
        omega, psi, nu = analysis.taxonomy_of_theta(theta)
        assert 0 <= omega <= 1, theta
        assert 0 < psi <= 1, theta
        assert 0 < nu <= 1, theta


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no structure"),
        ("monarc", "monarch"),
        ("monarch:nblocks=2/x", "nblocks=x"),
        ("head_btt:rnk=1", "rank"),
    ],
)
def test_a_space_that_is_none_is_said(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"--space: .*{message}"):
        space.parse_space(text)


def test_heads_are_axes_of_aligned_btt() -> None:
    """What a head's block of the second factor holds reaches that head's features of q, k or v alone."""
    task = tasks.Pixels.__new__(tasks.Pixels)
    task.sizes, task.context = presets.PRESETS["smoke"]["pixels"], 15
    model = task.model(64)
    to_structured_(model, task.rules("head_btt:rank=2", 64))
    qkv = model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(qkv, StructuredLinear)
    before = qkv.matrix().detach()
    with torch.no_grad():
        qkv.second[5] = 0  # the second head of k, of four
    changed = (qkv.matrix() != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(range(5 * 16, 6 * 16))
    proj = model.get_submodule("blocks.0.attn.proj")
    assert isinstance(proj, StructuredLinear)
    assert proj.first.shape[0] == 4
    before = proj.matrix().detach()
    with torch.no_grad():
        proj.first[1] = 0
    changed = (proj.matrix() != before).any(dim=0)
    assert changed.nonzero().flatten().tolist() == list(range(16, 32))


# how it is sized


@pytest.mark.parametrize("grow", budget.GROW)
@pytest.mark.parametrize("candidate", ["dense", *space.parse_space(THREE).grid(), "einsum", "kronecker"])
def test_equal_flops_are_used_to_the_last_step(candidate: str, grow: str) -> None:
    task = config().load()
    whole = budget.dense_budget(task, "flops")
    size = budget.fit(task, candidate, "flops", grow, whole)
    assert size.steps is not None
    step = 3 * size.flops * task.sizes.batch
    assert whole - step < size.steps * step <= whole
    if grow == "steps" or candidate == "dense":
        assert size.width == task.sizes.width
    else:
        assert size.width > task.sizes.width
    assert size.steps >= task.sizes.steps


@pytest.mark.parametrize("candidate", ["dense", *space.parse_space(THREE).grid()])
def test_equal_parameters_are_those_of_the_widest_model_that_fits(candidate: str) -> None:
    task = config().load()
    whole = budget.dense_budget(task, "params")
    size = budget.fit(task, candidate, "params", "width", None)
    model = task.model(size.width)
    to_structured_(model, task.rules(candidate, size.width))
    assert sum(parameter.numel() for parameter in model.parameters()) == size.params <= whole
    wider = [width for width in budget.widths(task) if width > size.width]
    assert budget.measure(task, candidate, wider[0]).params > whole
    assert size.steps == task.sizes.steps


def test_equal_seconds_leave_the_steps_to_the_clock() -> None:
    task = config().load()
    assert budget.fit(task, "monarch:nblocks=4", "seconds", "width", None).steps is None


def test_what_no_width_can_afford_is_said() -> None:
    with pytest.raises(ValueError, match="costs more than 1e\\+03 FLOPs"):
        budget.fit(config().load(), "dense", "flops", "width", 1e3)
    with pytest.raises(ValueError, match=r"low_rank:rank=8 fits no width from 8 to 512: at most 50 params"):
        budget.fit(config().load(), "low_rank:rank=8", "params", "width", 50)


# what a task gives


def task_of(name: str, pictures: Path, prose: Path) -> tasks.Task:
    data = {"pixels": (str(pictures),), "images": (str(pictures),), "characters": (str(prose),), "bpe": (str(prose),)}
    return presets.load_task(name, "smoke", data.get(name, ()), 1)


@pytest.mark.parametrize("name", presets.TASKS)
def test_every_task_can_be_learned(
    name: str, pictures: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)  # where tokens are kept
    task = task_of(name, pictures, prose)
    json.dumps(task.about)
    for step in (0, 3):
        assert all(torch.equal(*pair) for pair in zip(task.batch(step), task.batch(step), strict=True))
    assert not torch.equal(task.batch(0)[0], task.batch(1)[0])
    torch.manual_seed(0)
    model = task.model(task.sizes.width)
    to_structured_(model, task.rules("btt:rank=1", task.sizes.width))
    structured = [name for name, module in model.named_modules() if isinstance(module, StructuredLinear)]
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(structured) >= task.sizes.depth
    assert kept[-1] == "head"
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def valid() -> float:
        return float(np.mean([task.loss(model, batch).item() for batch in task.validation()]))

    before = valid()
    for step in range(30):
        optimizer.zero_grad()
        task.loss(model, task.batch(step)).backward()
        optimizer.step()
    assert valid() < 0.95 * before
    assert task.flops(model) > 0


def test_targets_of_the_teacher_are_standardised_and_validated_on_others() -> None:
    task = config().load()
    x, y = (torch.cat(parts) for parts in zip(*task.validation(), strict=True))
    assert x.shape == (2048, 8)
    assert y.mean().item() == pytest.approx(0, abs=0.15)
    assert y.std().item() == pytest.approx(1, abs=0.15)
    seen = {tuple(row) for step in range(5) for row in task.batch(step)[0].tolist()}
    assert not seen & {tuple(row) for row in x.tolist()}


def test_images_become_levels(pictures: Path) -> None:
    found = images.read(pictures)
    assert found.pixels is not None
    means = levels.small(found, 3)
    assert means.shape == (200, 3, 3, 1)
    assert means[3, 1, 2, 0].item() == round((found.pixels[3, 4:8, 8:12, 0] // 4).mean())
    found.pixels //= 4
    assert torch.equal(levels.small(found, 3), means)


def test_images_held_out_are_not_trained_on(pictures: Path) -> None:
    task = presets.load_task("pixels", "smoke", (str(pictures),), 0)
    held_out = {tuple(row) for (batch,) in task.validation() for row in batch.tolist()}
    assert len(held_out) == 20
    assert not held_out & {tuple(row) for step in range(40) for row in task.batch(step)[0].tolist()}


def test_characters_are_those_of_the_text(prose: Path) -> None:
    task = presets.load_task("characters", "smoke", (str(prose),), 0)
    assert isinstance(task, tasks.Characters)
    wide = task.train
    text = (prose / "0.txt").read_text(encoding="utf-8")
    assert len({int(token) for token in wide}) == len(
        set("".join(p.read_text("utf-8") for p in prose.iterdir()) + "\n")
    )
    assert wide.max() < task.vocabulary == 96
    narrow = tasks.Characters(replace(task.sizes, vocabulary=5), (str(prose),), 0)
    frequent = {int(token) for token in narrow.train}
    assert frequent == {0, 1, 2, 3, 4}
    assert (narrow.train == 0).mean() > 0.2
    assert "ï" in text


@pytest.mark.skipif(not os.environ.get(images.VARIABLE), reason=f"needs a folder of images in {images.VARIABLE}")
def test_images_of_ones_own_can_be_learned() -> None:
    data = (os.environ[images.VARIABLE],)
    job = Study.__new__(Study)
    job.config = config(task="images", data=data, space="monarch:nblocks=4", steps=60)
    task = job.config.load()
    size = budget.fit(task, "monarch:nblocks=4", "flops", "width", None)
    points = [event for event in training.train(Study._job(job, 0, "monarch:nblocks=4", size, 0)) if "point" in event]
    assert points[-1]["valid_loss"] < 0.95 * math.log(10)


# that nothing is lost


def test_a_search_trains_dense_and_every_candidate(searched: tuple[Path, list[Record]]) -> None:
    folder, results = searched
    assert [record["name"] for record in results] == ["dense", *space.parse_space(THREE).grid()]
    for record in results:
        records.validate(record)
        assert record["status"] == "ok"
        assert len(record["series"]["valid_loss"]) == training.POINTS
        assert record["metrics"]["valid_loss"] == record["series"]["valid_loss"][-1]
        assert record["metrics"]["steps"] == record["series"]["step"][-1]
        share = record["metrics"]["budget_share"]
        assert share is not None
        assert 0.8 < share <= 1
        flops = record["metrics"]["flops_per_example"]
        assert flops is not None
        assert record["metrics"]["train_flops"] == record["series"]["flops"][-1]
        assert record["metrics"]["train_flops"] == flops * 3 * 128 * record["series"]["step"][-1]
    monarch = results[1]
    assert (monarch["config"]["width"], monarch["config"]["factors"]) == (80, "first 4x4x5x20, second 4x20x4x5")
    assert monarch["metrics"]["omega"] == 0
    assert {path.name for path in folder.iterdir()} == {JOURNAL}


def test_what_is_done_is_not_done_again_and_more_can_be_asked_for(tmp_path: Path) -> None:
    first = search(tmp_path, trials=1)
    assert len(first) == 2
    more = search(tmp_path, trials=3)
    assert more[:2] == first
    assert len(more) == 4


def test_the_same_search_gives_the_same_numbers(searched: tuple[Path, list[Record]], tmp_path: Path) -> None:
    assert [numbers(record) for record in search(tmp_path)] == [numbers(record) for record in searched[1]]


def test_another_search_may_not_share_the_study(searched: tuple[Path, list[Record]]) -> None:
    with pytest.raises(OptionError, match=r"--out: holds a search with another seed \(0 there, 1 here\)"):
        search(searched[0], seed=1)


def test_a_database_holds_a_study_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/search.db"
    first = search(tmp_path / "here", url=url, space="monarch:nblocks=4", steps=2)
    assert len(first) == 2
    assert search(tmp_path / "here", url=url, space="monarch:nblocks=4", steps=2) == first
    assert not (tmp_path / "here" / JOURNAL).exists()
    with pytest.raises(OptionError, match=r"--storage: nonsense: .*allowed: the URL of a database"):
        open_storage(tmp_path, "nonsense")


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_samplers_draw_points_of_the_space(sampler: str, tmp_path: Path) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    options = {"space": "einsum", "sampler": sampler, "steps": 2}
    first = search(tmp_path, trials=2, **options)
    both = search(tmp_path, trials=4, **options)
    assert both[:3] == first
    names = [record["name"] for record in both]
    assert len(set(names)) == 5  # after the restart, too, it draws new ones
    assert all(name.startswith("einsum:theta=") for name in names[1:])


def test_a_candidate_that_is_drawn_again_is_not_trained_again(tmp_path: Path) -> None:
    results = search(tmp_path, space="low_rank:rank=4/8", sampler="random", trials=8, steps=2)
    assert sorted(record["name"] for record in results) == ["dense", "low_rank:rank=4", "low_rank:rank=8"]


def test_several_objectives_have_their_front(tmp_path: Path) -> None:
    options = {"minimise": "loss,params", "sampler": "random", "trials": 3, "steps": 2}
    search(tmp_path, **options)
    study = Study(config(**options), open_storage(tmp_path, None), "search", "")
    assert len(study.study.directions) == 2
    best = {trial.user_attrs.get("record") for trial in study.study.best_trials}
    assert best <= {trial.user_attrs.get("record") for trial in study.study.get_trials()}


def test_halving_stops_what_is_worse_early(tmp_path: Path) -> None:
    results = search(tmp_path, space="low_rank:rank=8/1,monarch:nblocks=4,kronecker", halving=True, steps=40)
    stopped = [record for record in results if record["config"]["stopped"]]
    assert stopped
    for record in stopped:
        records.validate(record)
        assert record["metrics"]["valid_loss"] is None
        assert 0 < len(record["series"]["valid_loss"]) < training.POINTS
        share = record["metrics"]["budget_share"]
        assert share is not None
        assert share < 1
    assert not results[0]["config"]["stopped"]
    assert any(not record["config"]["stopped"] for record in results[1:])


def test_equal_seconds_are_those_of_the_dense_model(tmp_path: Path) -> None:
    dense, other = search(tmp_path, equal="seconds", space="monarch:nblocks=4", steps=30)
    seconds = dense["metrics"]["train_seconds"]
    assert other["config"]["spend"] == seconds
    assert other["metrics"]["train_seconds"] >= seconds
    *earlier, last = dict.fromkeys(other["series"]["seconds"])  # a slow step passes several points at once
    assert max(earlier, default=0.0) < seconds <= last  # it stops at the first step past the budget
    assert dense["metrics"]["budget_share"] is None


def test_a_candidate_that_fits_nowhere_fails_alone(tmp_path: Path) -> None:
    results = search(tmp_path, space="low_rank:rank=9999,monarch:nblocks=4", steps=2)
    failed, trained = results[1:]
    assert failed["status"] == "failed"
    assert failed["error"] is not None
    assert "9999" in failed["error"]
    assert trained["status"] == "ok"
    assert search(tmp_path, space="low_rank:rank=9999,monarch:nblocks=4", steps=2) == results


class Dying(runners.InProcess):
    """Workers of some trials die at their first event."""

    def __init__(self, deaths: dict[int, int]) -> None:
        super().__init__()
        self.deaths = deaths

    def event(self) -> tuple[int, runners.Event]:
        (number,) = self._runs
        if self.deaths.get(number, 0) > 0:
            self.deaths[number] -= 1
            return number, {"died": "WorkerCrashedError"}
        return super().event()


def test_a_trial_whose_worker_dies_is_tried_again(searched: tuple[Path, list[Record]], tmp_path: Path) -> None:
    results = search(tmp_path, Dying({-1: 1, 1: 1}))
    assert [numbers(r) for r in sorted(results, key=lambda r: r["name"])] == [
        numbers(r) for r in sorted(searched[1], key=lambda r: r["name"])
    ]
    assert sorted(record["config"]["attempt"] for record in results) == [1, 1, 2, 2]


def test_a_trial_that_kills_its_workers_fails(tmp_path: Path) -> None:
    results = search(tmp_path, Dying(dict.fromkeys((0, 1, 2), 1)), space="monarch:nblocks=4", steps=2)
    assert results[1]["error"] == "its process died 3 times; out of memory?"
    with pytest.raises(SearchError, match="dense model"):
        search(tmp_path / "dense", Dying({-1: 3}))


def test_an_interrupt_loses_nothing_and_is_no_attempt(searched: tuple[Path, list[Record]], tmp_path: Path) -> None:
    class Interrupted(runners.InProcess):
        def event(self) -> tuple[int, runners.Event]:
            number, event = super().event()
            if number == 1 and event.get("point") == 3:
                raise KeyboardInterrupt
            return number, event

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Interrupted())
    results = search(tmp_path)
    assert [record["config"]["attempt"] for record in results] == [1, 1, 1, 1]
    assert sorted(map(str, map(numbers, results))) == sorted(map(str, map(numbers, searched[1])))


def test_a_killed_process_loses_only_its_trial(tmp_path: Path) -> None:
    arguments = ["search", "--preset", "smoke", "--space", THREE, "--device", "cpu", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "structlin", *arguments]
    results = tmp_path / "out" / "results.json"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not results.exists() or len(records.read(results)) < 2):
            time.sleep(0.02)
        time.sleep(0.2)  # into the next trial
        process.send_signal(signal.SIGKILL)
    before = records.read(results)
    assert [record["name"] for record in before] == ["dense", "monarch:nblocks=4"]
    with open(tmp_path / "out" / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code": 5, "wor')  # as if it had been killed while it wrote
    os.symlink("gone", tmp_path / "out" / f"{JOURNAL}.lock")
    assert cli.main(arguments) == 0
    after = records.read(results)
    assert after[:2] == before
    assert sorted(record["name"] for record in after[2:]) == ["low_rank:rank=4", "low_rank:rank=8"]
    assert sorted(record["config"]["attempt"] for record in after) == [1, 1, 1, 2]


# the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task teecher", "--task: 'teecher' is unknown; did you mean 'teacher'?"),
        ("--preset smoke --data somewhere", "--data: is given, but the task teacher makes its own"),
        ("--preset smoke --trials 99", "--trials: 99 is given, and the grid has 17"),
        ("--preset smoke --trials 0", "--trials: 0 is given; allowed: 1 or more"),
        ("--preset smoke --budget -1", "--budget: -1.0 is given; allowed: positive numbers"),
        ("--preset small --sampler cmaes", "--sampler: cmaes needs numbers"),
        ("--preset smoke --minimise params", "--minimise: params is given; allowed: loss, and others each once"),
        ("--preset smoke --minimise loss,memory --device cpu", "--minimise: memory is measured on a GPU only"),
        ("--preset smoke --minimise loss,params --halving", "--minimise: --halving looks at one number"),
        ("--preset smoke --equal params --grow steps", "--grow: steps leaves parameters as they are"),
        ("--preset smoke --device cpu --share 0.5", "--share: 0.5 is given; allowed on a CPU: whole numbers"),
        ("--preset smoke --equal seconds --ray local --device cpu", "--ray: trials that share a CPU disturb"),
        ("--preset smoke --space head_btt:rank=1", "--space: head_btt:rank=1 is for attention"),
        ("--preset smoke --device cpu --share 100000", "--share: 100000 threads are given; allowed: up to "),
        ("--preset smoke --budget 1", "--budget: 1 is given; one step of dense at width 8 costs more than 1 FLOPs"),
        ("--preset smoke --budget 1e300", "--budget: 1e+300 is given; it pays "),
        ("--preset smoke --task images", "--data: 0 paths are given; this task needs one folder of images"),
    ],
)
def test_bad_options_are_said_and_leave_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", *arguments.split(), "--out", str(tmp_path / "out")]) == 2
    assert f"structlin search: error: {message}" in capsys.readouterr().err
    left = tmp_path / "out"
    assert not left.exists() or {path.name for path in left.iterdir()} <= {".lock", "study.journal"}
    assert not (left / "study.journal").exists() or not (left / "study.journal").read_bytes()


def test_a_space_may_not_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--preset", "smoke", "--space", "", "--out", str(tmp_path / "out")]) == 2
    assert "structlin search: error: --space: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_the_folder_of_another_command_is_left_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "results.json").write_text("of a comparison")
    assert cli.main(["search", "--preset", "smoke", "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} holds a run of structlin train or compare" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {name, "results.json"}
    assert (tmp_path / "results.json").read_text() == "of a comparison"


def test_a_search_of_failures_alone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "smoke", "--space", "monarch:nblocks=7", "--steps", "2", "--out", str(tmp_path / "out")]
    assert cli.main(["search", *options]) == 1
    assert "error: every trial failed, as monarch:nblocks=7: " in capsys.readouterr().err


def test_text_that_is_too_short_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a few words, no more than that", encoding="utf-8")
    for name, message in (("bpe", "give more text$"), ("characters", "at least 33 each are needed$")):
        with pytest.raises(OptionError, match=f"--data: there are .* tokens to train on .*{message}"):
            presets.load_task(name, "smoke", ("a.txt",), 0)


@pytest.mark.slow
def test_the_smoke_search_has_a_frontier_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = records.read(tmp_path / "results.json")
    assert len({record["name"] for record in results if record["status"] == "ok"}) >= 13
    assert len({record["config"]["factors"] for record in results}) >= 12
    assert "frontier of loss and model_params: einsum:theta=" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 30_000


@pytest.mark.slow
def test_ray_trains_in_parallel_and_a_killed_worker_is_replaced(
    searched: tuple[Path, list[Record]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    killed: list[int] = []

    class Killing(runners.OnRay):
        def event(self) -> tuple[int, runners.Event]:
            number, event = super().event()
            if number == 1 and "pid" in event:
                assert event["pid"] != os.getpid()
                os.kill(event["pid"], signal.SIGKILL)
                killed.append(number)
            return number, event

    before = sys.path[:]
    results = search(tmp_path, Killing("local", "cpu", 1), steps=8)
    assert sys.path == before
    assert killed == [1]
    assert sorted(record["config"]["attempt"] for record in results) == [1, 1, 1, 2]
    assert sorted(map(str, map(numbers, results))) == sorted(map(str, map(numbers, searched[1])))
    stopped = search(tmp_path / "halving", runners.OnRay("local", "cpu", 1), space="low_rank:rank=8/1,kronecker",
                     halving=True, steps=400)  # fmt: skip
    assert {record["config"]["stopped"] for record in stopped} == {True, False}
    with pytest.raises(OptionError, match=r"--ray: local has .* CPUs; a job needs 4096"):
        runners.OnRay("local", "cpu", 4096)


def test_ray_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "lacks", lambda packages, extra: f"needs ray; install with: structlin[{extra}]")
    with pytest.raises(OptionError, match=r"--ray: needs ray; install with: structlin\[ray\]; or leave the option out"):
        runners.OnRay("local", "cpu", 1)
