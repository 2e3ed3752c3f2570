"""Inputs of the layers of a language model on a text, for a projection that is fitted to them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from ..calibration import record_inputs
from ..spec import Spec
from ..surgery import planned
from .convert import open_dense

LENGTH = 512  # tokens of a sequence, or what the model allows


def text_inputs(
    source: str | os.PathLike[str],
    rules: Mapping[str, Spec | None],
    files: Iterable[str | os.PathLike[str]],
    tokens: int = 2048,
) -> dict[str, Tensor]:
    """What the layers that ``rules`` convert see on the beginning of some text files.

    Args:
        source: folder of a language model with its tokenizer. The whole dense model is loaded.
        rules: as for `structlin.hf.convert`.
        files: texts in UTF-8, joined.
        tokens: how many to run the model on; the inputs take this many rows times the widths of the layers in memory.

    Returns:
        Name of a layer -> inputs (tokens, in_features), for `structlin.hf.convert`.

    Raises:
        ValueError: for a folder without tokenizer, files that cannot be read, or too short a text.
    """
    source = Path(source)
    model, _ = open_dense(source)
    conversion, problems = planned(model, rules, "init")
    if problems:
        raise ValueError(f"cannot convert {source}:\n  " + "\n  ".join(problems))
    cls = getattr(transformers, type(model).__name__)
    batches = text_batches(source, model.config, files, tokens)
    return record_inputs(cls.from_pretrained(source), [swap.name for swap in conversion], batches)


def text_batches(
    source: str | os.PathLike[str], config: Any, files: Iterable[str | os.PathLike[str]], tokens: int
) -> list[dict[str, Tensor]]:
    """The beginning of some text files as batches of one sequence each.

    Args:
        source: folder with a tokenizer.
        config: of the model, which may limit the length of a sequence.
        files: texts in UTF-8, joined.
        tokens: how many in all.

    Raises:
        ValueError: for a folder without tokenizer, files that cannot be read, or too short a text.
    """
    try:
        text = "\n".join(Path(file).read_text(encoding="utf-8") for file in files)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"calibration needs texts in UTF-8 and the tokenizer of {source}: {error}") from None
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    if tokens < 1 or len(ids) < tokens:
        raise ValueError(
            f"the texts have {len(ids)} tokens, {tokens} are asked for; give 1 to {len(ids)}, or more text"
        )
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    return [{"input_ids": part[None].to(torch.long)} for part in ids[:tokens].split(length)]
