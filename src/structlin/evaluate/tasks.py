"""Classification tasks as data: how an example is put into words, which words are the answers, and what is measured.

A row of a task is an object with its fields, a "label", and "split" where one file holds both parts. The tasks are
those of GLUE (Wang et al. 2018) and others in its form; the metrics are the ones that each task's authors ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from .files import SUFFIXES, read_rows

PARTS = ("train", "dev")


@dataclass(frozen=True)
class Task:
    """A prompt with the fields of a row in braces, the answer for each label, and metrics, the first being the main
    one.

    Labels are compared as text, so that 1 and "1" are the same. Without ``words`` the label is a number to be
    predicted.
    """

    prompt: str
    words: dict[str, str]
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the prompt asks for."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.prompt) if name)

    def text(self, row: dict[str, Any]) -> str:
        """The prompt for a row, up to where the answer begins."""
        return self.prompt.format(**row)


YES_NO = {"0": " no", "1": " yes"}
ENTAILMENT = {"entailment": " yes", "neutral": " maybe", "contradiction": " no"}
TWO_WAY = {"entailment": " yes", "not_entailment": " no"}

TASKS = {
    "boolq": Task("{passage}\nQuestion: {question}?\nAnswer:", YES_NO),
    "cola": Task("{sentence}\nIs this good grammar?", YES_NO, ("matthews", "accuracy")),
    "mnli": Task("{premise}\nQuestion: does it follow that {hypothesis}\nAnswer:", ENTAILMENT),
    "mrpc": Task("{sentence1}\n{sentence2}\nDo both mean the same?", YES_NO, ("f1", "accuracy")),
    "multirc": Task("{paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs this right?", YES_NO, ("f1", "accuracy")),
    "qnli": Task("{sentence}\nQuestion: {question}\nDoes the text answer it?", TWO_WAY),
    "qqp": Task("{question1}\n{question2}\nAre both the same question?", YES_NO, ("f1", "accuracy")),
    "rte": Task("{sentence1}\nQuestion: does it follow that {sentence2}\nAnswer:", TWO_WAY),
    "sick": Task("{sentence1}\nQuestion: does it follow that {sentence2}\nAnswer:", ENTAILMENT),
    "sst2": Task("Review: {sentence}\nThe review is", {"0": " bad", "1": " good"}),
    "stsb": Task("{sentence1}\n{sentence2}\nAre both alike?", {}, ("pearson", "spearman")),
    "subj": Task("{sentence}\nIs this opinion or story?", {"0": " opinion", "1": " story"}),
    "trec": Task(
        "Question: {sentence}\nThe answer is a",
        {"0": " description", "1": " thing", "2": " short form", "3": " person", "4": " place", "5": " number"},
    ),
    "wnli": Task("{sentence1}\nQuestion: does it follow that {sentence2}\nAnswer:", YES_NO),
    "wsc": Task('{text}\nIn this text, does "{span2_text}" mean "{span1_text}"?', YES_NO),
}
"""By name of the file that holds the rows."""


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: naming those there are.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def present(folder: Path) -> list[str]:
    """Names of the tasks with labels in words whose files are in ``folder``.

    Raises:
        ValueError: when there are none.
    """
    found = [name for name, task in TASKS.items() if task.words and _files(folder, name)]
    if not found:
        raise ValueError(f"{folder} holds no task; allowed: {_expected('TASK')}, with TASK of {', '.join(TASKS)}")
    return found


def read_task(folder: Path, name: str) -> tuple[dict[str, list[dict[str, Any]]], list[Path]]:
    """Rows by part, "train" and "dev", and the files they come from.

    Raises:
        ValueError: when the files are missing, or a row lacks a field or has a label or part that the task has not.
    """
    task, paths = task_named(name), _files(folder, name)
    if not paths:
        raise ValueError(f"{folder} holds no {name}; allowed: {_expected(name)}")
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for path in paths:
        alone = path.parent == folder
        for row in read_rows(path, [*task.fields, "label", *(["split"] if alone else [])]):
            part = row["split"] if alone else path.name.partition(".")[0]
            if part not in PARTS:
                raise ValueError(f"{path}: split is {part!r}; allowed: {', '.join(PARTS)}")
            _check_label(path, task, row["label"])
            rows[part].append(row)
    if empty := [part for part in PARTS if not rows[part]]:
        raise ValueError(f"{paths[0]}: no rows of {', '.join(empty)}")
    return rows, paths


def _check_label(path: Path, task: Task, label: Any) -> None:
    if task.words and str(label) not in task.words:
        raise ValueError(f"{path}: label is {label!r}; allowed: {', '.join(task.words)}")
    if not task.words:
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{path}: label is {label!r}; allowed: numbers")


def _files(folder: Path, name: str) -> list[Path]:
    alone = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if alone:
        return _single(alone)
    parts = [[path for suffix in SUFFIXES if (path := folder / name / f"{part}{suffix}").is_file()] for part in PARTS]
    return [path for found in parts for path in _single(found)] if all(parts) else []


def _single(paths: Sequence[Path]) -> list[Path]:
    if len(paths) > 1:
        raise ValueError(f"{' and '.join(map(str, paths))} are given; allowed: one of them")
    return list(paths)


def _expected(name: str) -> str:
    return (
        f"{name}.jsonl with a split of {' or '.join(PARTS)}, or {name}/train.jsonl and {name}/dev.jsonl (.tsv, .xz too)"
    )
