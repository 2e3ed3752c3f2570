"""Few-shot prompts (Brown et al. 2020): examples with their answers, then one without; the likeliest answer is taken.

Answers are compared by the sum of the log-probabilities of their tokens after the prompt. The shots of every example
are drawn anew, from the seed and the number of the example alone, so that the standard error holds the luck of the draw
too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .metrics import measure
from .score import Request, context_of, score
from .tasks import Task
from .tokens import Encoder

BETWEEN = "\n\n"
"""What stands between two shots."""


def kshot(
    model: nn.Module,
    encoder: Encoder,
    task: Task,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    shots: int,
    seed: int,
    limit: int | None = None,
    context: int | None = None,
    batch_tokens: int | None = None,
) -> dict[str, float | int | None]:
    """Quality of the answers that ``model`` gives to the rows of "dev" after ``shots`` rows of "train".

    Args:
        model: see `structlin.evaluate.score.score`.
        encoder: of the model's tokenizer.
        task: with ``words``.
        rows: those of both parts, as `structlin.evaluate.tasks.read_task` reads them.
        shots: examples before each question.
        seed: of the choice of shots, and of rows with a ``limit``.
        limit: answer only so many rows of "dev", chosen at random.
        context: the most tokens that the model reads at once; by default what the config of a model says.
        batch_tokens: see `structlin.evaluate.score.score`.

    Returns:
        The task's metrics, each with ``_stderr`` (see `structlin.evaluate.metrics`); ``majority``, the accuracy of
        always giving the most frequent label of "dev"; the counts ``examples``, ``fewer_shots`` (prompts that were too
        long and lost shots, the first ones first) and ``cut`` (questions too long alone, which lost their beginning).

    Raises:
        ValueError: for a task without words, and ``shots`` or ``limit`` out of range.
    """
    if not task.words:
        raise ValueError("the label of this task is a number; k-shot prompts need labels in words")
    if not 0 <= shots <= len(rows["train"]):
        raise ValueError(f"shots={shots} is given; allowed: 0 to {len(rows['train'])}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is given; allowed: 1 and more")
    context = context or context_of(model)
    dev = list(rows["dev"])
    if limit is not None and limit < len(dev):
        dev = random.Random(seed).sample(dev, limit)
    words, requests, counts = list(task.words), list[Request](), Counter[str]()
    for index, row in enumerate(dev):
        chosen = random.Random(f"{seed}:{index}").sample(rows["train"], shots)
        found, left = _fit(encoder, task, chosen, row, context)
        counts["fewer_shots"] += left < shots
        surplus = max(0, max(map(_length, found)) - context) if context else 0
        counts["cut"] += surplus > 0
        # the prefix stays, and every answer follows the same tokens
        requests += [Request(request.context[:1] + request.context[1 + surplus :], request.target) for request in found]
    scores = score(model, requests, batch_tokens, "kshot").view(len(dev), len(words))
    labels = torch.tensor([words.index(str(row["label"])) for row in dev])
    return {
        **measure(task.metrics, scores.argmax(1), labels),
        "majority": float(labels.bincount().max()) / len(dev),
        "examples": len(dev),
        "fewer_shots": counts["fewer_shots"],
        "cut": counts["cut"],
    }


def prompt(task: Task, shots: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    """The shots with their answers, then the question, up to where its answer begins."""
    return BETWEEN.join([*(task.text(shot) + task.words[str(shot["label"])] for shot in shots), task.text(row)])


def _fit(
    encoder: Encoder, task: Task, shots: Sequence[dict[str, Any]], row: dict[str, Any], context: int | None
) -> tuple[tuple[Request, ...], int]:
    """The requests of all answers with as many of the last shots as fit, and how many these are."""
    words = list(task.words.values())
    for left in range(len(shots), -1, -1):
        requests = encoder.choices(prompt(task, shots[len(shots) - left :], row), words)
        if context is None or all(_length(request) <= context for request in requests):
            break
    return requests, left


def _length(request: Request) -> int:
    return len(request.context) + len(request.target) - 1
