"""Text to token ids, the same way for every tokenizer: no special tokens but one, which stands before every text.

Tokenizers differ in what they add by themselves (OPT's puts ``</s>`` first, GPT-2's nothing, Llama's ``<s>``), and a
model has learned to start after one certain token. So nothing is left to the tokenizer: texts are encoded bare, and the
prefix, its beginning-of-text token or the one that is named, is put before them here, exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .score import Request


@dataclass(frozen=True)
class Encoder:
    """``encode`` maps texts to ids without special tokens; ``prefix`` is the id that stands before every text.

    ``unknown`` is the id of what the vocabulary cannot express, if the tokenizer has one.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    prefix: int
    unknown: int | None = None

    def wholes(self, texts: Sequence[str]) -> list[Request]:
        """Requests for texts from their first token on.

        Raises:
            ValueError: for a text without tokens.
        """
        encoded = self.encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise ValueError(f"{text!r} has no tokens")
        return [Request((self.prefix,), tuple(ids)) for ids in encoded]

    def choices(self, context: str, words: Sequence[str]) -> tuple[Request, ...]:
        """A request for each of ``words`` as the end of ``context``.

        Each whole text is encoded, and what all of them and the bare context have in common is the context: where a
        tokenizer merges across the boundary, the words are still compared after the same tokens.
        """
        bare, *wholes = self.encode([context, *(context + word for word in words)])
        shared = min(_common(bare, ids) for ids in wholes)
        return tuple(Request((self.prefix, *ids[:shared]), tuple(ids[shared:])) for ids in wholes)


def encoder(tokenizer: Any, bos: str | None = None) -> Encoder:
    """An `Encoder` of a tokenizer of transformers.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase``.
        bos: the token before every text; by default the tokenizer's beginning-of-text token, else its end-of-text
            token.

    Raises:
        ValueError: when the tokenizer has neither and none is given, or does not know ``bos``.
    """
    vocabulary = tokenizer.get_vocab()
    special = ", ".join(map(repr, tokenizer.get_added_vocab())) or "any token of its vocabulary"
    token = bos or tokenizer.bos_token or tokenizer.eos_token
    if token is None:
        raise ValueError(f"the tokenizer does not say what stands before a text: give bos (--bos); it has {special}")
    if token not in vocabulary:
        raise ValueError(f"bos={token!r} is not a token of the tokenizer; it has {special}")

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    unknown = tokenizer.unk_token_id
    return Encoder(encode, vocabulary[token], None if unknown == vocabulary[token] else unknown)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
