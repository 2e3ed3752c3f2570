"""Masked language modelling: some tokens of a window are hidden, and an encoder says what they were.

As BERT (Devlin et al. 2019) has it: of the chosen tokens 80% become [MASK], 10% a random token, and 10% stay. There is
no next-sentence objective, which RoBERTa (Liu et al. 2019) showed to be of no use. A batch is one matrix, ``inputs,
places, targets`` side by side: every window has the same number of places, so that shapes are static and the output
layer runs over these places only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .recipe import Recipe
from .windows import Windows

SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
"""What an encoder needs of its tokenizer, by the names of transformers; [SEP] ends its documents."""
MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens
VALIDATION = (0, 0, 2)
"""Seed of the places in validation windows: the same for all runs, so that their losses compare."""


@dataclass(frozen=True)
class Masking:
    """What is done to windows: ``count`` places of each are chosen; ``cls`` and ``mask`` are ids of tokens, and random
    tokens are ids below ``vocabulary``."""

    count: int
    cls: int
    mask: int
    vocabulary: int

    def __call__(self, windows: Tensor, *seed: int) -> Tensor:
        """A batch of int64 ``windows`` ``[rows, context + 1]``: int64 ``[rows, context + 2 * count]``.

        [CLS] stands in for the first token of a window and is never chosen; the last token of a row is not used. What
        comes out is a function of ``windows`` and ``seed``.
        """
        random = np.random.Generator(np.random.PCG64(seed))
        inputs = windows[:, :-1].clone()
        inputs[:, 0] = self.cls
        rows, context = inputs.shape
        order = random.random((rows, context - 1), np.float32).argpartition(self.count - 1, 1)
        places = torch.from_numpy(np.sort(order[:, : self.count], 1) + 1)
        targets = inputs.gather(1, places)
        kind = torch.from_numpy(random.random(places.shape, np.float32))
        other = torch.from_numpy(random.integers(self.vocabulary, size=places.shape))
        shown = torch.where(kind < MASKED + RANDOM, other, targets).masked_fill(kind < MASKED, self.mask)
        return torch.cat([inputs.scatter(1, places, shown), places, targets], 1)


@dataclass(frozen=True)
class MaskedWindows:
    """The batches of `Windows`, masked anew in every step."""

    windows: Windows
    masking: Masking

    def batch(self, step: int, size: int) -> Tensor:
        """The batch of update ``step``: int64 ``[size, context + 2 * count]``; see `Masking`."""
        return self.masking(self.windows.batch(step, size), self.windows.seed, step, 1)


def count(recipe: Recipe) -> int:
    """Places of a window that are chosen: the recipe's share, rounded, but one at least."""
    return min(max(1, round(recipe.masked * recipe.context)), recipe.context - 1)


def masking(recipe: Recipe, tokenizer: Any) -> Masking:
    """The `Masking` of a recipe, with the ids of a tokenizer of transformers, as `hf_tokenizer` makes it."""
    return Masking(count(recipe), tokenizer.cls_token_id, tokenizer.mask_token_id, len(tokenizer))


def hf_tokenizer(recipe: Recipe, text: str) -> Any:
    """The tokenizer of transformers whose JSON is ``text``: it knows the tokens of `SPECIAL`, and gives no segments."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = ["input_ids", "attention_mask"]
    codec: Any = Tokenizer.from_str(text)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=codec, model_input_names=names, model_max_length=recipe.context, **SPECIAL)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy over the chosen places in nats, a float32 scalar.

    Args:
        model: BertForMaskedLM of transformers.
        batch: what `Masking` makes, with as many inputs as ``model`` has positions.
    """
    bert: Any = model
    context = bert.config.max_position_embeddings
    places, targets = batch[:, context:].chunk(2, 1)
    hidden = bert.bert(input_ids=batch[:, :context]).last_hidden_state
    chosen = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    return F.cross_entropy(bert.cls(chosen).flatten(0, 1).float(), targets.flatten())
