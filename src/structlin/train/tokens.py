"""Text turned into tokens once, and kept as flat files of integers that training maps into memory.

The files are found again by a hash of the text, the tokenizer and the split, and carry a hash of their own, which the
run remembers: whatever of it changes, a run that goes on notices.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..once import making
from ..report.records import write_bytes
from .config import OptionError
from .documents import Piece, Source, given, sources
from .masked import SPECIAL
from .recipe import Recipe

FORMAT = 1
META, PARTS = "meta.json", ("train", "valid")
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Tokens that end a document; the first that a tokenizer has."""
CHUNK = 1 << 24  # characters that are tokenised at a time, at least; a book must not hold up many cores often

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tokens:
    """Training and validation tokens, the tokenizer that made them (its JSON), and what identifies them.

    ``about`` holds the sources, sizes and hashes; JSON-ready.
    """

    train: Array
    valid: Array
    vocabulary: int
    tokenizer: str
    about: dict[str, Any]


def prepare(recipe: Recipe) -> Tokens:
    """The tokens of a recipe's text, from ``recipe.cache`` or made now and put there.

    Raises:
        OptionError: for a text or tokenizer that cannot be used, or one too short for a window.
    """
    try:
        text, skipped = sources(given(recipe.data))
        held_out, more = sources(recipe.valid)
    except ValueError as error:
        raise OptionError("--data", str(error)) from None
    Path(recipe.cache).mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = _tokenizer(recipe, text)
        split: Any = [source.identity for source in held_out] or recipe.valid_share
        ends = (SPECIAL["sep_token"],) if recipe.architecture == "bert" else ENDS
        key = _hash([FORMAT, [source.identity for source in text], split, tokenizer, ends])
        folder = Path(recipe.cache) / f"tokens-{key[:16]}"
        with making(folder) as missing:
            if missing:
                _write(folder, text, held_out, tokenizer, recipe.valid_share, ends)
        meta = _checked(folder)
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError("--data", str(error)) from None
    train, valid = (_mapped(folder / f"{part}.bin", meta["dtype"]) for part in PARTS)
    least = recipe.context + 1
    if min(len(train), len(valid)) < least:
        message = f"there are {len(train)} tokens to train on and {len(valid)} to validate on"
        raise OptionError("--data", f"{message}; at least {least} each are needed: give more text, or --valid")
    names = [source.name for source in (*text, *held_out)]
    about = {"sources": names[:100], "files": len(names), "skipped_files": skipped + more, **meta}
    return Tokens(train, valid, meta["vocabulary"], tokenizer, about)


def _mapped(path: Path, dtype: str) -> Array:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _tokenizer(recipe: Recipe, text: Sequence[Source]) -> str:
    """The JSON of the tokenizer that is given, or of one trained on the text."""
    encodes = recipe.architecture == "bert"
    if recipe.tokenizer is not None:
        path = Path(recipe.tokenizer)
        try:
            data = path.read_bytes()
            found = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
            codec = _load(found)
        except (OSError, lzma.LZMAError, ValueError) as error:
            raise OptionError("--tokenizer", f"{path}: {error}; allowed: a tokenizer.json, also as .xz") from None
        return _templated(codec) if encodes else found
    special = list(SPECIAL.values()) if encodes else [ENDS[0]]
    key = _hash([FORMAT, [source.identity for source in text], recipe.vocabulary, *(special if encodes else ())])
    path = Path(recipe.cache) / f"tokenizer-{key[:16]}.json"
    with making(path) as missing:
        if missing:
            codec = _train(text, recipe.vocabulary, special)
            write_bytes(path, (_templated(codec) if encodes else str(codec.to_str())).encode())
    return path.read_text(encoding="utf-8")


def _templated(codec: Any) -> str:
    """The JSON of an encoder's tokenizer, which puts [CLS] and [SEP] around texts, if it did not already."""
    if missing := [token for token in SPECIAL.values() if codec.token_to_id(token) is None]:
        raise OptionError("--tokenizer", f"has no {', '.join(missing)}; allowed for bert: a tokenizer.json with "
                          f"{', '.join(SPECIAL.values())}, or none, and one is trained on the text")  # fmt: skip
    from tokenizers.processors import TemplateProcessing

    cls, sep = SPECIAL["cls_token"], SPECIAL["sep_token"]
    if codec.encode("a").tokens[0] != cls:
        ids = [(token, codec.token_to_id(token)) for token in (cls, sep)]
        single = f"{cls} $A {sep}"
        codec.post_processor = TemplateProcessing(single=single, pair=f"{single} $B {sep}", special_tokens=ids)
    return str(codec.to_str())


def _train(text: Sequence[Source], vocabulary: int, special: list[str]) -> Any:
    """A byte-level BPE with ``vocabulary`` entries, as GPT-2's; ``special`` are the first of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet) + len(special):
        least = len(alphabet) + len(special) + 1  # all bytes, and the end of a document
        raise OptionError("--vocabulary", f"{vocabulary} is given; allowed: {least} or more")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((piece for piece, _ in _all(text)), trainer)
    return tokenizer


def _write(
    folder: Path, text: Sequence[Source], held_out: Sequence[Source], tokenizer: str, share: float, named: Sequence[str]
) -> None:
    """Tokenise everything into ``folder``, which is there as a whole or not at all; ``named`` end documents."""
    codec = _load(tokenizer)
    size = codec.get_vocab_size()
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    end = _end(codec, named)
    if end is None:
        raise OptionError("--tokenizer", f"has no token that ends a document; allowed: one with {' or '.join(named)}")
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        outs = {part: _Out(fresh / f"{part}.bin", dtype, codec.token_to_id(end)) for part in PARTS}
        try:
            for part, found in (("train", text), ("valid", held_out)):
                for piece, ids in _encoded(codec, _all(found)):
                    own = part if held_out or not _is_held_out(piece[0], share) else "valid"
                    outs["train" if own == "valid" else "valid"].close_document()
                    outs[own].add(piece, ids)
        finally:
            abouts = {part: out.close() for part, out in outs.items()}
        meta = {"format": FORMAT, "vocabulary": size, "dtype": dtype, "tokenizer": _hash(tokenizer), **abouts}
        write_bytes(fresh / META, (json.dumps(meta, indent=1) + "\n").encode())
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _end(codec: Any, named: Sequence[str]) -> str | None:
    """The first of the tokens ``named`` that a tokenizer has."""
    return next((token for token in named if codec.token_to_id(token) is not None), None)


def hf_tokenizer(tokenizer: str, context: int) -> Any:
    """The tokenizer of transformers whose JSON is ``tokenizer``, of a decoder: it knows what ends a document."""
    from transformers import PreTrainedTokenizerFast

    codec = _load(tokenizer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=codec, eos_token=_end(codec, ENDS), model_max_length=context)


class _Out:
    """A file of tokens in the making."""

    def __init__(self, path: Path, dtype: str, ends: int) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115, closed below
        self._dtype, self._ends = dtype, ends
        self._tokens = self._bytes = self._documents = 0
        self._open, self._hash = False, hashlib.sha256()

    def add(self, piece: Piece, ids: list[int]) -> None:
        self._put(ids)
        self._bytes += len(piece[0].encode())
        self._open = True
        if piece[1]:
            self.close_document()

    def close_document(self) -> None:
        """End the document; one that was cut in two by the split ends in both parts."""
        if self._open:
            self._put([self._ends])
            self._documents += 1
        self._open = False

    def close(self) -> dict[str, Any]:
        self.close_document()
        self._file.close()
        sizes = {"tokens": self._tokens, "bytes": self._bytes, "documents": self._documents}
        return {**sizes, "sha256": self._hash.hexdigest()}

    def _put(self, ids: list[int]) -> None:
        data = np.asarray(ids, self._dtype).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self._tokens += len(ids)


def _encoded(codec: Any, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    for some in _chunks(pieces):
        coded = codec.encode_batch([piece for piece, _ in some], add_special_tokens=False)
        yield from ((piece, found.ids) for piece, found in zip(some, coded, strict=True))


def _chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    some: list[Piece] = []
    characters = 0
    for piece in pieces:
        some.append(piece)
        characters += len(piece[0])
        if characters >= CHUNK:
            yield some
            some, characters = [], 0
    yield some


def _checked(folder: Path) -> dict[str, Any]:
    """What is written about the tokens in ``folder``, which are as they were written."""
    meta: dict[str, Any] = json.loads((folder / META).read_bytes())
    for part in PARTS:
        with open(folder / f"{part}.bin", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != meta[part]["sha256"]:
                raise ValueError(f"{folder / part}.bin is damaged; remove {folder}, and it is made again")
    return meta


def _all(text: Sequence[Source]) -> Iterator[Piece]:
    return chain.from_iterable(source.pieces() for source in text)


def _is_held_out(piece: str, share: float) -> bool:
    return int(hashlib.sha256(piece.encode()).hexdigest()[:8], 16) < share * 16**8


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _load(text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"is not a tokenizer ({error})") from None
