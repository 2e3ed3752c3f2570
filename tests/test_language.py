"""Plans of language-model runs, the runner that trains them side by side, and the claims made from its records."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts import script

from structlin import recipes
from structlin.report import records
from structlin.train import model as models
from structlin.train.settings import override

ROOT = Path(__file__).parents[1]


plans = script("language_plans")
language = script("language")
claims = script("claims")
RACE = plans.time_to_loss(plans.Race(768, 12))


def record(run: Any, loss: float | None, speed: float = 6e5) -> dict[str, Any]:
    """What a run leaves, as far as later stages read it."""
    seconds = [step * plans.STEP / speed for step in (0, 10, 20)]
    config = {**run.fields, "layers": run.fields.get("layers", "mlp"), "given": dict(run.fields), "parts": ["train"]}
    series = {"step": [0, 10, 20], "seconds": seconds}
    metrics = {"valid_loss": loss, "flops_per_token": 1e6 if "moe" in run.name else 2e6, "train_seconds": seconds[-1]}
    return {"name": run.name, "config": config, "metrics": metrics, "series": series, "status": "ok"}


def losses(run: Any) -> float | None:
    """Dense is best at 2e-3, DYAD reaches it in half of the time and no less, Monarch 8 never."""
    lr, share = run.fields.get("lr", 1e-3), float(run.name.split("-x")[1].split("-lr")[0]) if "-x" in run.name else 1.0
    if lr > 3e-3 and "dense" in run.name:
        return None
    base = {"dense": 4.0, "monarch8": 4.3}.get(next((n for n in ("dense", "monarch8") if n in run.name), ""), 3.95)
    return base + abs(math.log2(lr / 2e-3)) / 10 + (0.3 * (0.6 - share) if share < 0.6 else 0.0)


@pytest.mark.parametrize("name", plans.PLANS)
def test_all_runs_of_a_plan_fit_their_recipe_and_have_names_of_their_own(name: str) -> None:
    found: list[dict[str, Any]] = []
    checked = set()
    for stage in range(1, plans.STAGES[name] + 1):
        runs = plans.PLANS[name](stage, found)
        assert runs
        for run in runs:
            recipe = override(recipes.find(run.recipe), {key: str(value) for key, value in run.fields.items()})
            shape = recipe.architecture, recipe.width, recipe.structure, recipe.layers
            if shape not in checked:
                models.check(dataclasses.replace(recipe, depth=1))
            checked.add(shape)
            tiny = run.recipe.startswith("tiny")
            assert tiny or language.Job(run, "train").seconds < 560, "a run fits into one call"
            assert tiny or recipe.embedding_lr == 8
            assert recipe.batch * recipe.context == plans.STEP or tiny
        found += [record(run, losses(run), 8e5 if "dyad8" in run.name else 6e5) for run in runs]
    assert len({run["name"] for run in found}) == len(found)


def test_time_to_loss_follows_from_the_records() -> None:
    plan, found = RACE, []
    for stage in range(1, 5):
        runs = {run.name: run for run in plan(stage, found)}
        slowed = {name: 0.9 if name.endswith("-sweep-lr0.002") else 1.0 for name in runs}
        found += [
            record(run, losses(run), slowed[name] * (8e5 if "dyad8" in name else 6e5)) for name, run in runs.items()
        ]
        if stage == 1:
            assert {run.fields["lr"] for run in runs.values()} == {1e-3, 2e-3, 4e-3}
        if stage == 2:  # 180 seconds at 600,000 tokens a second
            assert {"w768-dense-x1-lr0.001-s0", "w768-dense-x1-lr0.0014-s0", "w768-dense-x1-lr0.002-s0"} < set(runs)
            assert runs["w768-dense-x1-lr0.002-s0"].fields["steps"] == math.ceil(180 * 6e5 / plans.STEP)
            assert runs["w768-dyad8-all-x0.5-lr0.002-s0"].fields["steps"] == math.ceil(0.5 * 180 * 8e5 / plans.STEP)
        if stage == 3:
            assert "w768-dyad8-all-x0.42-lr0.002-s0" in runs
            assert "w768-monarch8-all-x0.65-lr0.002-s0" in runs
            reverse = runs["w768-dyad8-all-reverse-x0.58-lr0.002-s0"].fields
            assert (reverse["method"], reverse["switch"]) == ("sparsify_reverse", plans.SWITCH)
            both = 0.58 * 180 / (plans.SWITCH / 8e5 + (1 - plans.SWITCH) / 6e5)
            assert reverse["steps"] == math.ceil(both / plans.STEP)
    assert {f"w768-dense-x1-lr0.002-s{seed}" for seed in (1, 2)} < set(runs)
    assert sum("-x0.5-" in name for name in runs) == 4, runs.keys()
    with pytest.raises(ValueError, match=r"w768-dense-sweep-lr0\.002, which is not in the records"):
        plan(2, [])


def test_contenders_are_held_to_the_mean_of_denses_seeds() -> None:
    plan, found = RACE, []
    for stage in (1, 2):
        found += [record(run, losses(run), 6e5) for run in plan(stage, found)]
    (again,) = (run for run in plan(4, found) if run.name == "w768-dense-x1-lr0.002-s1")
    for lucky, reached in ((3.97, True), (3.9, False)):  # DYAD is at 3.98, the other seed of dense at 4
        shares = {run.name.split("-x")[1][:4] for run in plan(3, [*found, record(again, lucky)])}
        assert ("0.42" in shares) == reached


def test_narrow_models_race_over_larger_shares() -> None:
    plan, found = plans.PLANS["time768"], []
    shares: list[set[tuple[str, str]]] = []
    for stage in range(1, 4):
        runs = plan(stage, found)
        found += [record(run, losses(run), 8e5 if "dyad8" in run.name else 6e5) for run in runs]
        shares.append({(run.name.split("-", 1)[1].split("-x")[0], run.name.split("-x")[-1].split("-lr")[0])
                       for run in runs})  # fmt: skip
    assert {name for name, _ in shares[0]} == {f"{name}-sweep-lr{lr}" for name in ("dense", *plans.FASTEST)
                                               for lr in ("0.0005", "0.001", "0.002")}  # fmt: skip
    assert shares[1] == {("dense", "1"), ("dyad8-all", "0.8"), ("monarch8-all", "0.8")}
    assert {("dyad8-all", "0.65"), ("monarch8-all", "1"), ("dyad8-all-reverse", "0.8")} <= shares[2]
    assert {run["config"]["lr"] for run in found if "-dense-x1-" in run["name"]} == {2e-3, 3e-3, 4e-3}


def test_no_speed_is_taken_from_a_shared_gpu() -> None:
    run = plans.PLANS["mixtures"](2, [])[0]
    shared = record(run, 4.0)
    shared["config"]["share"] = 3
    assert plans.speed(record(run, 4.0)) == pytest.approx(6e5)
    with pytest.raises(ValueError, match=f"{run.name} ran with --share 3"):
        plans.speed(shared)


def test_the_page_of_claims_is_that_of_the_records() -> None:
    page = claims.PAGE.read_text(encoding="utf-8")
    assert claims.filled(page) == page, "run benchmarks/claims.py"


def test_verdicts_follow_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    for stage in range(1, 5):
        runs = {run.name: run for run in RACE(stage, found)}
        found += [record(run, losses(run), 8e5 if "dyad8" in run.name else 6e5) for run in runs.values()]
    for run in found:
        share = float(run["name"].split("-x")[1].split("-lr")[0]) if "-x" in run["name"] else 1.0
        run["metrics"] |= {"train_seconds": 180 * share, "tokens": 1e8}
    steps = {
        model: [
            {"name": name, "metrics": {"speedup_over_dense": ratio}}
            for name, ratio in (("dense", 1.0), ("dyad:nblocks=4", slower), ("dyad:nblocks=8", 1.3))
        ]
        for model, slower in (("opt125m", 1.1), ("opt350m", 1.06))
    }
    files = {"language-time768": found, **{f"step-time-{model}-h200": runs for model, runs in steps.items()}}
    monkeypatch.setattr(claims, "named", lambda name: {run["name"]: run for run in files.get(name, [])})
    rows = claims.time_rows()
    assert "| 768 | dyad8-all, 0.002 | 100M | 0.50 | 3.980 ± 0.000 (3 seeds) | yes |" in rows
    assert "| 768 | dense, 0.002 | 100M | 1.00 | 4.000 ± 0.000 (3 seeds) | yes |" in rows
    assert any(row.startswith("| 768 | monarch8-all, 0.002 | 100M | 0.65") and row.endswith("| no |") for row in rows)
    assert claims.dyad_speed("opt125m")() == ("dyad4-it 1.10, dyad8-it 1.30 times as fast, whole step, bf16", True)
    assert claims.dyad_speed("opt350m")()[1] is False, "8 blocks are not what the paper says it of"
    assert claims.dyad_speed("pythia160m")() is None
    assert claims.monarch_loss() is None


def test_what_is_slow_to_come_is_ended_and_the_rest_not_started(tmp_path: Path) -> None:
    run = plans.run("tiny_gpt2", 1, name="one", speed=1e6)
    slow, late = language.Job(run, "train"), language.Job(plans.run("tiny_gpt2", 10**6, name="two"), "train")
    place = language.Place(tmp_path, None)
    code = "import subprocess, time; subprocess.Popen(['sleep', '99']); time.sleep(99)"
    place.command = lambda job: [sys.executable, "-c", code]  # type: ignore[method-assign]
    now = [0.0]  # a clock that goes on in sleep alone
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    language.time, real = clock, language.time
    try:
        left = language.work([slow, late], place, 2, slow.seconds + 0.5, lambda *_: pytest.fail("it did not end"))
    finally:
        language.time = real
    assert [job.run.name for job in left] == ["two", "one"]
    assert not (tmp_path / "two").exists()


def test_a_stage_is_planned_when_the_one_before_has_run_and_failures_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(stage: int, found: Any) -> list[Any]:
        if stage == 1:
            return [plans.run("tiny_gpt2", 1, name=name, speed=1e9) for name in ("a", "b", "broken")]
        lr = plans.best([plans.found(found, name) for name in ("a", "b")])["config"]["lr"]
        return [plans.run("tiny_gpt2", 1, name=f"again-{lr:g}", speed=1e9)]

    def command(self: Any, job: Any) -> list[str]:
        """Leaves a record with the loss of the run; "b" and "broken" fail, the former once."""
        made = records.read(ROOT / "results" / "language-methods.json")[0]
        loss = {"a": 3.0, "b": 2.0}.get(job.run.name, 1.0)
        made = {
            **made,
            "name": job.run.name,
            "metrics": {"valid_loss": loss, "tokens_per_second": 1.0},
            "config": {**made["config"], "lr": loss, "text": dict.fromkeys(("train", "valid", "tokenizer"))},
        }
        records.write(tmp_path / job.run.name / "made.json", [made])
        tried = tmp_path / job.run.name / "tried"
        fails = job.run.name == "broken" or (job.run.name == "b" and not tried.exists())
        tried.touch()
        here = tried.parent
        return ["false"] if fails else ["cp", str(here / "made.json"), str(here / "record.json")]

    monkeypatch.setitem(language.PLANS, "smoke", plan)
    monkeypatch.setitem(language.STAGES, "smoke", 2)
    monkeypatch.setattr(language.Place, "command", command)
    monkeypatch.setattr(language.Place, "fields", lambda self: {})
    monkeypatch.setattr(language, "prepare", lambda recipe: SimpleNamespace(train=[]))
    options = ["smoke:1", "smoke:2", "--data", "x", "--out", str(tmp_path), "--folder", str(tmp_path)]
    assert language.main([*options, "--dry-run"]) == 0
    assert "then smoke:2" in capsys.readouterr().out
    assert language.main(options) == 0
    assert {found["name"] for found in records.read(tmp_path / "language-smoke.json")} == {"a", "b", "again-2"}
    out = capsys.readouterr().out
    assert out.count("broken train: ") == 2
    assert "0 jobs left" in out


def test_only_runs_that_take_turns_wait_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print(os.environ.get('STRUCTLIN_TIMING_LOCK'))"
    monkeypatch.setattr(language.Place, "command", lambda self, job: [sys.executable, "-c", code])
    job = language.Job(plans.run("tiny_gpt2", 1, name="one"), "train")
    own = str(tmp_path / "gpu0.lock")
    for share, turns, given, lock in ((3, 1, "another", "None"), (1, 2, "another", "another"), (1, 2, "", own)):
        monkeypatch.setenv("STRUCTLIN_TIMING_LOCK", given)
        place = language.Place(tmp_path, None, share=share, turns=turns)
        place.start(job, 0, 1).wait()
        assert (tmp_path / "one" / "train.log").read_text().strip() == lock
        assert place.crowd == max(share, turns)


def test_a_run_is_expected_to_wait_for_the_training_of_those_beside_it(tmp_path: Path) -> None:
    job = language.Job(
        plans.run("tiny_gpt2", 1000, name="long", speed=1.05 * plans.STEP), "train", 30.0
    )  # 1,000 seconds of steps
    short = language.Job(plans.run("tiny_gpt2", 100, name="short", speed=1.05 * plans.STEP), "train", 30.0)
    after = language.Job(plans.run("tiny_gpt2", 1, name="long"), "eval")
    turns, share = language.Place(tmp_path, None, turns=2), language.Place(tmp_path, None, share=2)
    assert turns.end(short, [], 10.0) == pytest.approx(140.0)
    assert turns.end(short, [(job, 0.0), (after, 5.0)], 500.0) == pytest.approx(1130.0), "it starts meanwhile"
    assert turns.end(short, [(job, 0.0)], 1020.0) == pytest.approx(1150.0), "the other ends meanwhile"
    assert turns.end(after, [(job, 0.0)], 500.0) == pytest.approx(600.0)
    assert share.end(short, [(job, 0.0)], 500.0) == pytest.approx(730.0)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.slow
def test_a_plan_on_the_cpu_leaves_records_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for part in ("train", "valid"):
        write(data / "text" / f"{part}.jsonl", [{"text": f"{part} {i} it was the best of times"} for i in range(400)])
    pair = {"sentence_good": "it was", "sentence_bad": "was it", "UID": "order", "field": "syntax"}
    write(data / "blimp" / "blimp.jsonl", [{**pair, "linguistics_term": "order"}] * 4)
    rows = [{"sentence": f"good {i}", "label": i % 2, "split": part} for part in ("train", "dev") for i in range(8)]
    write(data / "glue" / "sst2.jsonl", rows)
    out, folder = tmp_path / "language-smoke.json", tmp_path / "runs"
    options = ["smoke", "--out", str(tmp_path), "--folder", str(folder), "--data", str(data), "--gpus", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(language, "START", {"train": 10.0, "eval": 1e6, "glue": 1e6})
        assert language.main([*options, "--limit", "1000"]) == 1, "evaluations are thought not to fit"
    assert {found["name"] for found in records.read(out)} == {"tiny_gpt2-dense", "tiny_gpt2-dyad4"}
    assert (folder / "tiny_gpt2-dense" / "model").exists()
    assert language.main([*options, "--limit", "1000"]) == 0
    found = {record["name"]: record for record in records.read(out)}
    dense = found["tiny_gpt2-dense"]
    assert dense["config"]["parts"] == ["train", "eval", "glue:sst2"]
    assert {"blimp/accuracy", "kshot/sst2/accuracy", "finetune/sst2/accuracy", "total_seconds"} <= set(dense["metrics"])
    assert str(tmp_path) not in out.read_text()
    assert not list(folder.glob("*/model"))
    capsys.readouterr()
    assert language.main([*options, "--dry-run"]) == 0
    assert "0 jobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["time768:6"],
            "time768:6 is given; allowed: dyad:1 to 3, dyad_models:1 to 3, monarch:1 to 2, methods:1,",
        ),
        (["time768:2"], "w768-dense-sweep-lr0.001, which is not in the records"),
        (["dyad", "--only", "none-*"], "none-\\* is given; allowed: globs"),
        (["smoke"], "--data: .*nowhere is given; allowed: a folder with text/train.jsonl"),
    ],
)
def test_what_cannot_run_is_said(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert language.main([*options, "--out", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
