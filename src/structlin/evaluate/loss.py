"""Loss on a text: nats per token, perplexity and bits per byte, every token predicted once.

A document starts after the prefix token and is cut into windows of at most ``context`` predictions. The first window
predicts as many tokens as fit, each later one ``stride``, after as many earlier tokens as fit before them. With the
stride of a whole window (the default) the only token known from before is the last one, which is cheapest and a little
pessimistic; with a smaller one every token has at least ``context - stride`` tokens before it, at more passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from .files import read_rows, read_text
from .score import Request, score
from .tokens import Encoder


def read_documents(path: Path) -> list[str]:
    """Documents of a file: each "text" of a ``.jsonl`` (``.xz``), else the whole file as one.

    Raises:
        ValueError: see `structlin.evaluate.files.read_rows`.
    """
    if ".jsonl" not in path.suffixes:
        return [read_text(path)]
    texts = [row["text"] for row in read_rows(path, ["text"])]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"{path}, object {number}: text is {json.dumps(text)[:40]}, not a string")
    return [text for text in texts if text]


def windows(ids: Sequence[int], prefix: int, context: int, stride: int) -> Iterator[Request]:
    """Requests that predict every one of ``ids`` once, none longer than ``context`` inputs."""
    known = (prefix, *ids)
    start = 0
    while start < len(ids):
        end = min(len(ids), start + (stride if start else context))
        yield Request(known[max(0, end - context) : start + 1], tuple(ids[start:end]))
        start = end


def text_loss(
    model: nn.Module,
    encoder: Encoder,
    documents: Sequence[str],
    context: int,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> dict[str, float | int | None]:
    """Loss of ``model`` on ``documents``.

    Args:
        model: see `structlin.evaluate.score.score`.
        encoder: of the model's tokenizer.
        documents: texts, each read from its start, without knowledge of the others.
        context: the most tokens that the model reads at once.
        stride: tokens that a window after the first predicts, 1 to ``context``; by default ``context``.
        batch_tokens: see `structlin.evaluate.score.score`.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``bits_per_byte`` (of the UTF-8 text), each with ``_stderr``, and the
        counts ``documents``, ``windows``, ``tokens``, ``bytes`` and ``unknown_tokens``. Standard errors are those of a
        ratio of sums over windows (linearised, W - 1 in the denominator), null for one window; they treat windows as
        independent, which neighbours in one document are not quite.

    Raises:
        ValueError: for a ``context`` or ``stride`` out of range, and documents without tokens.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} and context={context} are given; allowed: 1 <= stride <= context")
    encoded = encoder.encode(documents)
    requests = [request for ids in encoded for request in windows(ids, encoder.prefix, context, stride)]
    if not requests:
        raise ValueError("the documents have no tokens")
    nats = -score(model, requests, batch_tokens, "loss")
    counts = torch.tensor([len(request.target) for request in requests], dtype=torch.float64)
    tokens, size, count = int(counts.sum()), sum(len(text.encode()) for text in documents), len(requests)
    loss = float(nats.sum()) / tokens
    spread = (nats - loss * counts).square().sum() * count / max(1, count - 1)
    error = float(spread.sqrt()) / tokens if count > 1 else None
    bits = tokens / size / math.log(2)
    # a model that is far off has a perplexity beyond float64
    perplexity = math.exp(loss) if loss < 700 else None
    return {
        "loss": loss,
        "loss_stderr": error,
        "perplexity": perplexity,
        "perplexity_stderr": None if error is None or perplexity is None else perplexity * error,
        "bits_per_byte": loss * bits,
        "bits_per_byte_stderr": None if error is None else error * bits,
        "documents": len(documents),
        "windows": count,
        "tokens": tokens,
        "bytes": size,
        "unknown_tokens": sum(ids.count(encoder.unknown) for ids in encoded) if encoder.unknown is not None else 0,
    }
