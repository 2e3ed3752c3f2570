"""Sentence similarity: do the embeddings of a model lie as near to each other as people find the sentences alike?

The embedding of a sentence is the mean of the last hidden states over its tokens, special ones included (Reimers and
Gurevych 2019, "mean"). Two sentences are as alike as the cosine of their embeddings, and what is measured is the
correlation of the cosines with the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import shown
from .metrics import measure
from .score import BATCH_TOKENS, batched, context_of
from .tasks import read_task

METRICS = ("pearson", "spearman")


def read_sentences(path: Path) -> tuple[list[tuple[str, str]], Tensor, list[Path]]:
    """Pairs of sentences of the part "dev" of STS-B, their labels, float64 ``[pairs]``, and the files.

    Args:
        path: a folder with the task ``stsb``, see `structlin.evaluate.tasks.read_task`.

    Raises:
        ValueError: as `read_task`.
    """
    parts, paths = read_task(path, "stsb")
    rows = parts["dev"]
    labels = torch.tensor([float(row["label"]) for row in rows], dtype=torch.float64)
    return [(str(row["sentence1"]), str(row["sentence2"])) for row in rows], labels, paths


def embed(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], batch_tokens: int | None = None, what: str = ""
) -> Tensor:
    """Embeddings of ``sentences``, float32 ``[sentences, hidden]`` on the CPU; gradients are not kept.

    Args:
        model: gives ``last_hidden_state`` for ``input_ids`` and ``attention_mask``. It runs in eval mode on the device
            of its parameters, and is left in the mode it had.
        tokenizer: of transformers; what it puts around a sentence by itself stays. Sentences that are longer than the
            model reads lose their end, as they do in every use of such models.
        batch_tokens: the most tokens of a batch, pads included; by default that of `structlin.evaluate.score`.
        what: name of the work on the terminal, where progress is shown.
    """
    device = next(model.parameters()).device
    size = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"]) if batch_tokens is None else batch_tokens
    limit = context_of(model)
    encoded = tokenizer(list(sentences), truncation=limit is not None, max_length=limit)["input_ids"]
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(encoded):
        inputs.setdefault(tuple(ids), []).append(index)
    batches = list(batched(sorted(inputs, key=len, reverse=True), size))
    found: Tensor | None = None
    training = model.training
    model.eval()
    try:
        for batch in shown((what, float(len(batch) * len(batch[0])), batch) for batch in batches):
            with torch.no_grad():
                rows = pooled(model, *padded(batch, tokenizer.pad_token_id or 0, device)).float().cpu()
            found = torch.zeros(len(encoded), rows.shape[1]) if found is None else found
            for row, ids in zip(rows, batch, strict=True):
                found[inputs[ids]] = row
    finally:
        model.train(training)
    return torch.zeros(0, 0) if found is None else found


def padded(batch: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both int64 ``[sentences, tokens]``, filled up with ``pad`` on the right."""
    ids = torch.full((len(batch), max(map(len, batch))), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def pooled(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens that ``mask`` keeps, ``[sentences, hidden]``."""
    states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(1) / weights.sum(1)


def similarity(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    labels: Tensor,
    batch_tokens: int | None = None,
) -> dict[str, float | int | None]:
    """Correlation of the cosines of ``pairs`` with ``labels``.

    Returns:
        ``pearson`` and ``spearman``, each with ``_stderr`` (the jackknife's), and ``pairs``.
    """
    embeddings = embed(model, tokenizer, [sentence for pair in pairs for sentence in pair], batch_tokens, "sts")
    first, second = embeddings.double().view(len(pairs), 2, -1).unbind(1)
    cosines = torch.cosine_similarity(first, second)
    return {**measure(METRICS, cosines, labels), "pairs": len(pairs)}
