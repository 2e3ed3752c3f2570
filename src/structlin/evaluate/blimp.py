"""Minimal pairs (Warstadt et al. 2020, BLiMP): does the model find the grammatical sentence the more probable one?

The score of a sentence is the sum of the log-probabilities of all its tokens after the prefix token, without division
by length. A pair counts 1 when the good sentence scores higher, 1/2 when both score the same, else 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import SUFFIXES, read_rows
from .score import score
from .tokens import Encoder

GROUPS = ("field", "term", "paradigm")


@dataclass(frozen=True)
class Pair:
    """Two sentences of a paradigm, and the field and linguistic term that it belongs to ("" where none is given)."""

    good: str
    bad: str
    paradigm: str
    term: str = ""
    field: str = ""


def files(path: Path) -> list[Path]:
    """The file, or the ``.jsonl`` and ``.jsonl.xz`` files right in the folder, in the order of their names.

    Raises:
        ValueError: when there are none.
    """
    found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path} holds no pairs; allowed: .jsonl files, also as .xz, or a folder of them")
    return found


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, or of all files in a folder, in the published format.

    ``sentence_good``, ``sentence_bad`` and ``UID`` are needed; ``field`` and ``linguistics_term`` are used where
    present. The published data write one field as both ``syntax/semantics`` and ``syntax_semantics``; it is one here.

    Raises:
        ValueError: see `structlin.evaluate.files.read_rows`, and for a sentence that is empty or no text.
    """
    pairs = []
    for file in files(path):
        for row in read_rows(file, ["sentence_good", "sentence_bad", "UID"]):
            sentences = row["sentence_good"], row["sentence_bad"]
            if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
                raise ValueError(f"{file}: {row['UID']} has a pair {sentences}; allowed: two sentences")
            field = str(row.get("field", "")).replace("/", "_")
            pairs.append(Pair(*sentences, str(row["UID"]), str(row.get("linguistics_term", "")), field))
    return pairs


def score_pairs(
    model: nn.Module,
    encoder: Encoder,
    pairs: Sequence[Pair],
    batch_tokens: int | None = None,
    leading_space: bool = False,
) -> Tensor:
    """Log-probabilities of both sentences of each pair, float64 ``[len(pairs), 2]``, good ones first.

    Args:
        model: see `structlin.evaluate.score.score`.
        encoder: of the model's tokenizer.
        pairs: what to score.
        batch_tokens: see `structlin.evaluate.score.score`.
        leading_space: put a space before every sentence, as the task of lm-eval 0.4 does (its ``target_delimiter``).

    Raises:
        ValueError: for a sentence without tokens.
    """
    lead = " " if leading_space else ""
    sentences = [lead + sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    return score(model, encoder.wholes(sentences), batch_tokens, "blimp").view(-1, 2)


def accuracy(pairs: Sequence[Pair], scores: Tensor) -> dict[str, float | int | None]:
    """Accuracies from the scores of `score_pairs`.

    Returns:
        ``accuracy``, the mean over paradigms, each of one weight; ``pairs``, ``paradigms`` and ``ties``; and for every
        paradigm, term and field ``paradigm/NAME``, ``term/NAME``, ``field/NAME``, the last two as means over their
        paradigms. Each accuracy with ``_stderr``: of a paradigm the sample standard deviation over ``sqrt(pairs)``,
        null for one pair; of a mean over paradigms the root of the summed squares over their number.
    """
    points = torch.where(scores[:, 0] > scores[:, 1], 1.0, torch.where(scores[:, 0] == scores[:, 1], 0.5, 0.0)).double()
    members: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        members[pair.paradigm].append(index)
    single = {name: _mean(points[indices]) for name, indices in members.items()}
    # a paradigm stands under one field and term, except one that is published with two spellings of its field
    parents = {name: pairs[indices[0]] for name, indices in members.items()}
    groups: dict[str, set[str]] = defaultdict(set)
    for name, pair in parents.items():
        for group, value in zip(GROUPS, (pair.field, pair.term, name), strict=True):
            if value:
                groups[f"{group}/{value}"].add(name)
    mean, error = _mean_of(single.values())
    metrics: dict[str, float | int | None] = {"accuracy": mean, "accuracy_stderr": error}
    metrics |= {"pairs": len(pairs), "paradigms": len(single), "ties": int((points == 0.5).sum())}
    for group in sorted(groups, key=lambda name: (GROUPS.index(name.partition("/")[0]), name)):
        metrics[group], metrics[f"{group}_stderr"] = _mean_of(single[name] for name in groups[group])
    return metrics


def blimp(
    model: nn.Module,
    encoder: Encoder,
    pairs: Sequence[Pair],
    batch_tokens: int | None = None,
    leading_space: bool = False,
) -> dict[str, float | int | None]:
    """`accuracy` of what `score_pairs` finds; both say what the arguments and the metrics are."""
    return accuracy(pairs, score_pairs(model, encoder, pairs, batch_tokens, leading_space))


def _mean(points: Tensor) -> tuple[float, float | None]:
    error = float(points.std()) / math.sqrt(len(points)) if len(points) > 1 else None
    return float(points.mean()), error


def _mean_of(found: Iterable[tuple[float, float | None]]) -> tuple[float, float | None]:
    means, errors = zip(*found, strict=True)
    known = None not in errors
    return sum(means) / len(means), math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None
