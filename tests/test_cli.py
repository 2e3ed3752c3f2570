"""The command line: what it prints and returns, that bad input is one line and leaves nothing, and how it dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from structlin import cli
from structlin.report import records

PROSE = "it was the best of times, it was the worst of times, it was the age of wisdom\n"


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("".join(f"{i} {PROSE}" for i in range(200)), encoding="utf-8")
    return path


def compare(*options: Any) -> int:
    """Run ``structlin compare`` in this process; the exit status, however it is delivered."""
    try:
        return cli.main(["compare", *map(str, options)])
    except SystemExit as end:
        return int(end.code or 0)


def small(prose: Path, out: Path) -> list[Any]:
    return ["--preset", "smoke", "--steps", 3, "--structures", "dense,kronecker", "--data", prose, "--out", out]


def test_a_run_prints_a_table_and_writes_its_files(
    prose: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run"
    assert compare(*small(prose, out)) == 0
    table = capfd.readouterr().out
    results = records.read(out / "results.json")
    for record in results:
        (line,) = [line for line in table.splitlines() if line.startswith(record["name"])]
        assert f"{record['metrics']['valid_loss']:.3f}" in line
        assert record["command"].startswith("structlin compare --preset smoke --steps 3")
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "config.json", "results.json", "curves.png", "pareto.png", "report.html",
    }  # fmt: skip
    # again, for another output: nothing is trained, and standard output is the document alone
    assert compare(*small(prose, out), "--json") == 0
    assert json.loads(capfd.readouterr().out) == json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert records.read(out / "results.json") == results


BAD = [
    (
        ["--structures", "monach"],
        ["--structures:", "'monach'", "did you mean 'monarch'?", "low_rank, monarch"],
    ),
    (["--structures", "dense,monarch:blocks=4"], ["--structures:", "'blocks'", "'nblocks'"]),
    (["--structures", "monarch:nblocks=three"], ["--structures:", "nblocks='three'"]),
    (["--structures", "dyad:variant=xx"], ["--structures:", "'xx'", "it", "ot", "dt"]),
    (["--structures", "dyad:nblocks=7"], ["--structures:", "nblocks=7", "1, 2, 4, 8, 16"]),
    (["--structures", "low_rank:rank=1000"], ["--structures:", "rank=1000"]),
    (["--structures", "dense,dense"], ["--structures:", "'dense' is given twice"]),
    (["--structures", ""], ["--structures:", "''"]),
    (["--where", "mpl"], ["--where:", "'mpl'", "did you mean 'mlp'?", "blocks.0.attn.qkv"]),
    (["--preset", "tiny"], ["--preset:", "'tiny'", "smoke, small"]),
    (["--steps", "0"], ["--steps:", "0 is given", "1 or more"]),
    (["--steps", "-5"], ["--steps:", "-5 is given", "1 or more"]),
    (["--steps", "many"], ["--steps:", "'many'", "whole numbers"]),
    (["--seed", "-1"], ["--seed:", "-1 is given", "0 to 2**63 - 1"]),
    (["--lr", "0"], ["--lr:", "0.0 is given", "positive"]),
    (["--lr", "nan"], ["--lr:", "'nan' is given", "numbers"]),
    (["--lr", "fast"], ["--lr:", "'fast'", "numbers"]),
    (["--device", "tpu"], ["--device:", "'tpu'", "cpu"]),
    (["--dtype", "float61"], ["--dtype:", "'float61'", "float32, bfloat16"]),
    (["--data", "{tmp}/gone.txt"], ["--data:", "gone.txt does not exist"]),
    (["--data", "{tmp}/empty.txt"], ["--data:", "empty.txt is empty"]),
    (["--data", "{tmp}/binary.dat"], ["--data:", "binary.dat is binary"]),
    (["--data", "{tmp}/short.txt"], ["--data:", "short.txt", "at least 65 are needed"]),
    (["--out", "{tmp}/short.txt"], ["--out:", "short.txt is not a folder"]),
    (["--out", "{tmp}/short.txt/below"], ["--out:", "short.txt is not a folder"]),
    (["--data"], ["--data:", "expected at least one argument"]),
    (["--colour", "red"], ["the argument --colour is unknown; allowed: those of structlin compare --help"]),
]


@pytest.mark.parametrize(("options", "parts"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str], parts: list[str], prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.dat").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "short.txt").write_text(PROSE, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    defaults = ["--preset", "smoke", "--steps", "3", "--data", prose, "--out", tmp_path / "out"]
    assert compare(*defaults, *(option.replace("{tmp}", str(tmp_path)) for option in options)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(("structlin compare: error: ", "structlin: error: "))
    assert said.err.count("\n") == 1
    assert all(part in said.err for part in parts), said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trian"], "structlin: error: the command trian is unknown; did you mean train? allowed: "),
        (
            ["describe", "dyad", "8x8", "--tokenz", "3"],
            "unknown; did you mean --tokens? allowed: those of structlin desc",
        ),
        (
            ["describe", "dyad", "8x8", "more"],
            "structlin describe: error: the argument more is unknown; allowed: those",
        ),
    ],
)
def test_what_is_unknown_is_told_with_the_nearest_name(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(given)
    assert message in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m structlin describe dyad:nblocks=4 64x64 | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stderr == ""
    assert ended.stdout.strip() in ("0", "1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_output_that_cannot_be_written_is_one_line() -> None:
    command = f"{sys.executable} -m structlin describe dyad:nblocks=4 64x64 > /dev/full"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr == "structlin describe: error: No space left on device\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert compare(*small(prose, tmp_path / "closed" / "run")) == 2
    assert "closed is not writable" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nothing can be made")
def test_a_folder_that_cannot_be_made(prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*small(prose, Path("/proc/structlin/run"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("structlin compare: error: --out: /proc")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_folder_with_results_of_something_else(
    name: str, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine", encoding="utf-8")
    assert compare(*small(prose, tmp_path / "run")) == 2
    assert f"--out: {tmp_path / 'run'} holds another run's {name}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", 4], "steps (3 there, 4 here)"),
        (["--seed", 1], "seed (0 there, 1 here)"),
        (["--structures", "dense"], 'structures (["dense", "kronecker"] there, ["dense"] here)'),
        (["--where", "all"], 'where ("mlp" there, "all" here)'),
        (["--data", "{tmp}/other.txt"], "data ("),
    ],
)
def test_a_folder_with_another_comparison_names_what_differs(
    options: list[Any], named: str, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from structlin.train import config, data

    (tmp_path / "other.txt").write_text(PROSE * 100, encoding="utf-8")
    there = config.configure(data.read_text([str(prose)]), structures="dense,kronecker", preset="smoke", steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(there.to_dict()), encoding="utf-8")
    options = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    assert compare(*small(prose, tmp_path / "run"), *options) == 2
    error = capsys.readouterr().err
    assert f"--out: {tmp_path / 'run'} holds a run with another {named}" in error
    assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_folder_is_named(name: str, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from structlin.train import config, data

    there = config.configure(data.read_text([str(prose)]), structures="dense,kronecker", preset="smoke", steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(there.to_dict()), encoding="utf-8")
    (tmp_path / "run" / name).write_text("{", encoding="utf-8")
    assert compare(*small(prose, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("structlin compare: error: --out: ")
    assert name in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(prose: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    (out / "work").mkdir(parents=True)
    full = [out / "work" / "1.safetensors", out / "pareto.png"]
    for path in full:
        path.with_name(f"{path.name}.tmp").symlink_to("/dev/full")
    for path, finished in zip(full, (1, 2), strict=True):
        assert compare(*small(prose, out)) == 1
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith(f"structlin compare: error: {path}: No space left on device; ")
        assert f"finished structures ({finished}) are kept" in line
        assert len(records.read(out / "results.json")) == finished
    before = records.read(out / "results.json")
    assert compare(*small(prose, out)) == 0
    assert records.read(out / "results.json") == before


def test_a_failed_structure_makes_the_command_fail(
    prose: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert compare(*small(prose, tmp_path / "run"), "--structures", "kronecker", "--lr", "1e38") == 1
    said = capfd.readouterr().out
    assert "kronecker failed: " in said
    assert " at step " in said
    assert (tmp_path / "run" / "report.html").exists()


def test_missing_packages_are_named(
    prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structlin.options.find_spec", lambda name: None if name == "matplotlib" else True)
    assert compare(*small(prose, tmp_path / "run")) == 1
    assert capsys.readouterr().err == (
        "structlin compare: error: needs matplotlib; install with: pip install 'structlin[report]'\n"
    )


def session(leader: int) -> set[int]:
    """Running processes of a session."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == leader and state != "Z":
                found.add(int(stat.parent.name))
    return found


def wait(what: str, condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_an_interrupt_and_a_kill_leave_no_process_and_a_run_that_goes_on(prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # long enough that a worker without its parent would still run when the test looks for it
    options = ["--preset", "smoke", "--steps", "1000", "--structures", "dense", "--data", str(prose), "--out", str(out)]
    checkpoint = out / "work" / "0.safetensors"

    def step() -> int:
        if not checkpoint.exists():
            return 0
        with safe_open(checkpoint, framework="pt") as file:
            return int(json.loads(file.metadata()["state"])["step"])

    # Ctrl-C reaches the whole foreground group, SIGKILL only the process that a user names
    stops = {130: lambda pid: os.killpg(pid, signal.SIGINT), -9: lambda pid: os.kill(pid, signal.SIGKILL)}
    for status, stop in stops.items():
        before = step()
        process = subprocess.Popen(
            [sys.executable, "-m", "structlin", "compare", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wait("a checkpoint", lambda before=before: step() > before, seconds=120)
        stop(process.pid)
        wait("the last process of the run to end", lambda pid=process.pid: session(pid) <= {pid}, seconds=15)
        out_text, error = process.communicate(timeout=15)
        assert process.returncode == status
        assert out_text == ""
        if status == 130:
            command = f"structlin compare {' '.join(options)}"
            assert error == f"structlin compare: error: interrupted with 0 structures finished; to go on: {command}\n"
        else:
            assert error == ""
    assert step() > before == 100  # so the second run went on from the first


def test_tune_measures_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    asked = ["tune", "monarch:nblocks=2@24x16", "dyad:nblocks=4@16x16", "--tokens", "5", "--device", "cpu"]
    assert cli.main([*asked, "--inference"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[:4] for line in table.splitlines()[1:]] == [
        ["monarch:nblocks=2@24x16", "8", "float32", "inference"], ["dyad:nblocks=4@16x16", "8", "float32", "inference"]
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2
    assert cli.main([*asked, "--inference"]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["monarch:nblocks=2@24"], "--problem: 'monarch:nblocks=2@24' is not of the form SPEC@OUTxIN"),
        (["block monarch:nblocks=2@64x16"], "a block is given; allowed: SPEC@OUTxIN"),
        (["dense@64x64"], "dense@64x64 is given; allowed: structures, as a dense layer runs in one way"),
        (["dyad@16x16", "--tokens", "0"], "--tokens: 0 is given"),
        (["dyad@16x16", "--device", "tpu"], "--device: 'tpu' is unknown"),
        (["dyad@16x16", "--dtype", "int8"], "--dtype: 'int8' is unknown"),
    ],
)
def test_tune_refuses_in_one_line(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("structlin tune: error: ")
    assert problem in said
    assert said.count("\n") == 1
