"""Log-probabilities of token sequences given what stands before them: the one operation under every evaluation here.

Sequences are batched by length and padded on the right. Under causal attention no token then sees a pad, and positions
count from the first token as they do without padding, so no attention mask is needed; what the model says at pads is
never read. Equal inputs are run once: equal sequences have equal scores to the last bit, whatever batch they are in,
and label words of one token share the pass over their prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..progress import shown

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a batch by device, pads included, unless told otherwise; logits beyond a CPU's caches cost it time."""

ROWS = 512
"""Positions whose distributions over the vocabulary are held in float32 at a time."""


class Request(NamedTuple):
    """Score ``target`` after ``context``; token ids, at least one in each."""

    context: tuple[int, ...]
    target: tuple[int, ...]


@torch.no_grad()
def score(model: nn.Module, requests: Sequence[Request], batch_tokens: int | None = None, what: str = "") -> Tensor:
    """Natural log-probability of every target given its context, summed over its tokens.

    Args:
        model: causal; maps int64 ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``, or to an object
            that has them as ``logits``. It runs in eval mode on the device of its parameters, and is left in the mode
            it had.
        requests: what to score.
        batch_tokens: the most tokens of a batch, pads included; by default that of `BATCH_TOKENS`. A longer sequence is
            a batch of its own.
        what: name of the work on the terminal, where progress is shown.

    Returns:
        float64 ``[len(requests)]`` on the CPU, in the order of ``requests``. Softmax is in float32 or wider.

    Raises:
        ValueError: for an empty context or target, a sequence that is longer than the model reads, a ``batch_tokens``
            below one, and a score that is not finite.
    """
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(next(model.parameters()).device.type, BATCH_TOKENS["cuda"])
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} is given; allowed: 1 and more")
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (context, target) in enumerate(requests):
        if not context or not target:
            raise ValueError(f"request {index} has an empty {'target' if context else 'context'}")
        inputs.setdefault((*context, *target[:-1]), []).append(index)
    longest, limit = max(map(len, inputs), default=0), context_of(model)
    if limit is not None and longest > limit:
        raise ValueError(f"a sequence has {longest} tokens with the one before it; the model reads at most {limit}")
    sums = torch.zeros(len(requests), dtype=torch.float64)
    batches = list(batched(sorted(inputs, key=len, reverse=True), batch_tokens))
    training = model.training
    model.eval()
    try:
        for batch in shown((what, float(len(batch) * len(batch[0])), batch) for batch in batches):
            owners = [(row, index) for row, ids in enumerate(batch) for index in inputs[ids]]
            _add(sums, model, batch, owners, requests)
    finally:
        model.train(training)
    if not sums.isfinite().all():
        bad = int((~sums.isfinite()).sum())
        raise ValueError(f"{bad} of {len(sums)} log-probabilities are not finite: the logits hold NaN or infinity")
    return sums


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model of transformers reads at once, as its config says; None for other models."""
    limit: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit


def batched(sequences: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Runs of ``sequences``, which are sorted by falling length, of at most ``batch_tokens`` with pads."""
    start = 0
    while start < len(sequences):
        size = max(1, batch_tokens // len(sequences[start]))
        yield list(sequences[start : start + size])
        start += size


def _add(
    sums: Tensor,
    model: nn.Module,
    batch: Sequence[tuple[int, ...]],
    owners: Sequence[tuple[int, int]],
    requests: Sequence[Request],
) -> None:
    """Run one batch and add the log-probabilities of its targets to ``sums``; owners are (row, index of a request)."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # any id may stand where nothing is read
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    indices: list[int] = []
    for row, index in owners:
        context, target = requests[index]
        rows += [row] * len(target)
        columns += range(len(context) - 1, len(context) - 1 + len(target))
        targets += target
        indices += [index] * len(target)
    out = model(ids.to(device))
    logits: Tensor = getattr(out, "logits", out)
    wide = torch.promote_types(logits.dtype, torch.float32)
    places = torch.tensor([rows, columns, targets], device=device)
    found = []
    for row, column, token in (part.unbind() for part in places.split(ROWS, dim=1)):
        picked = logits[row, column].to(wide)
        found.append(picked.gather(1, token[:, None])[:, 0] - picked.logsumexp(1))
    sums.index_add_(0, torch.tensor(indices), torch.cat(found).double().cpu())
