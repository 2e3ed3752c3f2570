"""What one of several processes does while the others wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from structlin.once import ALONE, alone

CODE = """
import sys, time
from structlin.once import alone
print("ready", flush=True)
sys.stdin.readline()
with alone(), alone():
    begun = time.time()
    time.sleep(0.3)
    print(begun, time.time(), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of files")
@pytest.mark.parametrize("locked", [True, False])
def test_processes_with_one_lock_time_one_after_the_other(locked: bool, tmp_path: Path) -> None:
    given = {ALONE: str(tmp_path / "lock")} if locked else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", CODE], env={**os.environ, **given}, **pipes)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    (_, end), (begin, _) = sorted(tuple(map(float, process.communicate()[0].split())) for process in both)
    assert (begin >= end) == locked


def test_a_block_that_fails_lets_the_next_one_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALONE, str(tmp_path / "lock"))
    with pytest.raises(RuntimeError), alone():
        raise RuntimeError
    with alone():
        assert (tmp_path / "lock").exists()
