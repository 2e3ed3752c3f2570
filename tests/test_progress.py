"""The progress line: what it says on a terminal, and that nobody else sees it."""

from __future__ import annotations

import io

import pytest
from torch import nn

import structlin as sl
from structlin import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(text: str) -> list[str]:
    return [line for line in text.split(progress.ERASE) if line]


def test_a_line_says_what_is_done_and_what_is_left(monkeypatch):
    clock = iter((0.0, 0.0, 2.0, 8.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys, "stderr", terminal := Terminal())
    assert list(progress.shown([("a", 1.0, "A"), ("b", 3.0, "B"), ("c", 4.0, "C")])) == ["A", "B", "C"]
    assert lines(terminal.getvalue()) == [
        "1 of 3, 0% done: a",
        "2 of 3, 12% done, 14 s left: b",
        "3 of 3, 50% done, 8 s left: c",
    ]
    assert terminal.getvalue().endswith(progress.ERASE)


def test_the_line_goes_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", terminal := Terminal())

    def fail() -> None:
        for _ in progress.shown([("a", 1.0, "A")]):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert terminal.getvalue().endswith(f"a{progress.ERASE}")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (61, "2 min"), (3599, "1 h 0 min"), (4801, "1 h 21 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def convert(**how):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 24))
    sl.to_structured_(model, {"*": sl.Monarch(2)}, weights="project", **how)


def test_a_conversion_shows_its_layers_on_a_terminal_when_asked(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", terminal := Terminal())
    convert()
    assert terminal.getvalue() == ""
    convert(progress=True)
    first, second = lines(terminal.getvalue())
    assert first.startswith("1 of 2")
    assert first.endswith(": 0")
    assert second.endswith(": 2")


def test_nothing_is_printed_into_a_file(capsys):
    convert(progress=True)
    assert capsys.readouterr() == ("", "")
