"""The queue that makes records anew: what runs beside what, in which order, and that nothing written is lost."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script

from structlin import machine
from structlin.report import records

reproduce = script("reproduce")

WRITER = """
import json, os, sys, time
from pathlib import Path

name, seconds, path = sys.argv[1], float(sys.argv[2]), Path("results/made.json")
document = json.loads(path.read_text())
there = sorted(record["name"] for record in document["records"])
config = {"there": there, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "begun": time.time()}
metrics = {"loss": 1.0, "train_seconds": 2.0}
document["records"].append({**document["records"][0], "name": name, "config": config, "metrics": metrics})

def write():
    Path("fresh").write_text(json.dumps(document))
    os.replace("fresh", path)

write()
time.sleep(seconds)
config["ended"] = time.time()
write()
Path(f"results/{name}.png").write_bytes(name.encode())
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Of the queue, in a folder that commands find the writer in."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "writer.py").write_text(WRITER, encoding="utf-8")
    old: Any = {"kind": "spike", "config": {}, "metrics": {}, "status": "ok", "error": None, "name": "old"}
    old |= machine.provenance("test", 0, torch.device("cpu"))
    (tmp_path / "results").mkdir()
    records.write(tmp_path / "results" / "made.json", [old])
    monkeypatch.setattr(reproduce, "EVERY", 0.05)
    monkeypatch.setattr(reproduce, "FOLDERS", {"tools": "data"})
    return Namespace(folder=str(tmp_path / "runs"), out=str(tmp_path / "results"), gpus=2, limit=120.0,
                     data=str(tmp_path / "tools"))  # fmt: skip


def task(name: str, seconds: float, part: float = 1.0, after: tuple[str, ...] = (), expected: float = 0.0) -> Any:
    return reproduce.Task(name, f"python tools/writer.py {name} {seconds}", expected, part, after)


def made(options: Namespace) -> dict[str, Any]:
    return {name: record["config"] for name, record in reproduce.by_name(Path(options.out) / "made.json").items()}


def test_records_of_tasks_side_by_side_come_together(options: Namespace) -> None:
    tasks = [task("one", 0.5), task("two", 0.5), task("three", 0, after=("one", "two"))]
    assert reproduce.work(tasks, options) == []
    found = made(options)
    assert set(found) == {"old", "one", "two", "three"}
    assert {found["one"]["gpu"], found["two"]["gpu"]} == {"0", "1"}
    assert found["one"]["there"] == found["two"]["there"] == ["old"]
    assert found["three"]["there"] == ["old", "one", "two"]
    assert (Path(options.out) / "two.png").read_text() == "two"
    assert found["three"]["begun"] > max(found["one"]["ended"], found["two"]["ended"])


def test_what_shares_a_gpu_keeps_no_times(options: Namespace) -> None:
    before = reproduce.by_name(Path(options.out) / "made.json")
    timeless = dataclasses.replace(task("shared", 0, 0.5), timeless=True)
    assert reproduce.work([timeless, task("timed", 0, after=("shared",))], options) == []
    found = reproduce.by_name(Path(options.out) / "made.json")
    assert found["shared"]["metrics"] == {"loss": 1.0, "train_seconds": None}
    assert found["timed"]["metrics"] == {"loss": 1.0, "train_seconds": 2.0}
    assert found["old"] == before["old"]


def test_what_is_timed_has_a_gpu_for_itself(options: Namespace) -> None:
    options.gpus = 1
    tasks = [task("shared-1", 1, 0.5), task("shared-2", 1, 0.5), task("alone", 0.1)]
    assert reproduce.work(tasks, options) == []
    found = made(options)
    assert found["shared-2"]["begun"] < found["shared-1"]["ended"]
    assert found["alone"]["begun"] > max(found["shared-1"]["ended"], found["shared-2"]["ended"])


TIMER = """
import time
from pathlib import Path
from structlin.once import alone

for turn in range(3):
    with alone():
        begun = time.time()
        time.sleep(0.3)
        with open("runs/turns", "a") as file:
            file.write(f"{begun} {time.time()}\\n")
    time.sleep(0.2)
"""
TICKS = """
import time

while True:
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
TICKER = """
import subprocess, sys, time
from pathlib import Path

turns = Path("runs/turns")
with open("runs/ticks", "w") as file:  # written by a group of its own, which the signals have to reach too
    child = subprocess.Popen([sys.executable, "tools/ticks.py"], stdout=file, process_group=0)
while not turns.exists() or len(turns.read_text().splitlines()) < 6:
    time.sleep(0.1)
time.sleep(0.3)
child.kill()
"""
PARENT = """
import subprocess, sys, time

with open("runs/ticks", "w") as file:
    child = subprocess.Popen([sys.executable, "tools/timer.py"], process_group=0)
    ended = None
    while ended is None or time.time() < ended + 0.3:
        print(time.time(), file=file)
        time.sleep(0.01)
        ended = ended or (None if child.poll() is None else time.time())
"""


@pytest.mark.skipif(not reproduce.LOCKS.exists(), reason="this system does not say who waits for a lock")
@pytest.mark.parametrize("kind", ["times nothing", "times later", "has a child that times"])
def test_others_stop_while_one_times(options: Namespace, kind: str) -> None:
    options.gpus = 1
    for name, code in (("timer", TIMER), ("ticker", TICKER), ("ticks", TICKS), ("parent", PARENT)):
        Path(options.data, f"{name}.py").write_text(code, encoding="utf-8")
    script, count = ("parent", 1) if kind == "has a child that times" else ("ticker", 2)
    timers = [reproduce.Task(f"timer-{n}", "python tools/timer.py", 0, 0.1, turns=True) for n in range(count)]
    ticker = reproduce.Task("ticker", f"python tools/{script}.py", 0, 0.5, turns=kind != "times nothing")
    assert reproduce.work([ticker, *timers], options) == []
    runs = Path(options.folder, "runs")
    ticks = [float(line) for line in (runs / "ticks").read_text().splitlines()]
    times = sorted(tuple(map(float, line.split())) for line in (runs / "turns").read_text().splitlines())
    assert len(times) == 6
    for begun, ended in times:
        assert not [tick for tick in ticks if begun < tick < ended]
    assert all(ended < begun for (_, ended), (begun, _) in pairwise(times))
    assert ticks[-1] > times[-1][1]


def test_without_word_of_who_waits_kinds_do_not_share_a_gpu(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "LOCKS", Path(options.folder, "no such file"))
    options.gpus = 1
    timed = [dataclasses.replace(task(name, 1, 0.33), turns=True) for name in ("timed-1", "timed-2")]
    assert reproduce.work([timed[0], task("loss", 0.1, 0.33), timed[1]], options) == []
    found = made(options)
    assert found["timed-2"]["begun"] < found["timed-1"]["ended"]
    assert found["loss"]["begun"] > max(found["timed-1"]["ended"], found["timed-2"]["ended"])


def test_what_was_written_before_time_was_up_is_kept(options: Namespace) -> None:
    options.limit = 4.0
    tasks = [task("slow", 600), task("long", 0, expected=1e4), task("later", 0, after=("slow",))]
    assert reproduce.work(tasks, options) == ["slow", "long", "later"]
    assert set(made(options)) == {"old", "slow"}
    assert "ended" not in made(options)["slow"]


def test_what_ends_badly_is_said(options: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    bad = reproduce.Task("bad", "python -c 'raise SystemExit(\"it broke\")'", 0)
    assert reproduce.work([bad, task("good", 0)], options) == ["bad"]
    assert capsys.readouterr().out.count("exit 1; it broke") == 2
    assert "good" in made(options)


def test_what_fails_is_started_once_more_before_what_follows(options: Namespace) -> None:
    code = "import os; os.path.exists('runs/tried') or [open('runs/tried', 'w'), os._exit(1)]"
    first = reproduce.Task("first", f'python -c "{code}" {{limit}}', 0)
    assert reproduce.work([first, task("then", 0, after=("first",))], options) == []
    assert "then" in made(options)


def test_every_task_names_a_script_and_earlier_tasks() -> None:
    names: list[str] = []
    for each in reproduce.TASKS:
        words = each.command.split()
        assert words[0] == "structlin" or (reproduce.ROOT / words[1]).exists(), each.command
        assert set(each.after) <= set(names)
        names.append(each.name)
    assert len(set(names)) == len(names)


def test_bad_options_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert reproduce.main(["nothing"]) == 2
    assert "nothing: no such task; allowed: those of --list" in capsys.readouterr().err
    assert reproduce.main(["dyad"]) == 2
    assert "--data: needed" in capsys.readouterr().err
    assert reproduce.main(["monarch_no-1e-3-s0", "speed-minilm"]) == 2  # an option of the first is called --models
    assert "--data, --models: needed" in capsys.readouterr().err
    assert reproduce.main(["monarch_no-1e-3-s0", "--limit", "0", "--folder", str(tmp_path)]) == 1
    assert "1 of 1 tasks did not end" in capsys.readouterr().out
    assert reproduce.main(["--list", "mlps"]) == 0
    assert "structlin bench --preset mlp" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="devices are told apart by a variable of CUDA")
def test_the_gpus_of_cuda_visible_devices_are_used(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert reproduce.work([task("one", 0.5), task("two", 0.5)], options) == []
    assert {made(options)[name]["gpu"] for name in ("one", "two")} == {"4", "7"}
