"""The mask of Pixelated attention: a flat block butterfly over blocks of tokens, and global blocks; and what it costs.

Which keys a query sees follows from their two positions alone, not from the length. So a row of the mask is the same
row whenever it is computed, which is what a cache of keys and values needs, and lengths that blocks do not divide need
no padding: the last block is a short one.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "pixelated"
GLOBAL_SHARE = 1 / 3  # of a budget that goes to the low-rank part first, as in the paper's rule of thumb


@dataclass(frozen=True)
class AttentionCost:
    """What a mask costs for one head and one sequence.

    Attributes:
        pairs: pairs of a query and a key that see each other; forward takes ``4 * head_dim`` FLOPs for each.
        dense_pairs: those of dense attention with the same causality.
        blocks: blocks of ``block_size`` x ``block_size`` in which there is a pair, all of which are computed.
        dense_blocks: those of dense attention with the same causality.
    """

    pairs: int
    dense_pairs: int
    blocks: int
    dense_blocks: int

    @property
    def density(self) -> float:
        """Pairs as a fraction of those of dense attention with the same causality; exact."""
        return self.pairs / self.dense_pairs

    @property
    def compute(self) -> float:
        """Blocks as a fraction of those of dense attention: its work, where whole blocks are computed."""
        return self.blocks / self.dense_blocks

    def flops(self, head_dim: int, heads: int = 1, batch: int = 1) -> int:
        """FLOPs of the two products of a forward pass; backward takes 2.5 times as many, recomputed scores included."""
        return 4 * head_dim * heads * batch * self.pairs


@dataclass(frozen=True)
class PixelatedAttention:
    """Which keys each query sees: the attention mask of Pixelated Butterfly (Chen et al. 2022, section 3).

    Token t lies in block ``t // block_size``. The queries of block i see the keys of block j where

    - j is i, or i xor 1, i xor 2, ..., i xor 2**(nfactors - 1): the flat block butterfly, the supports of the first
      ``nfactors`` butterfly factors together. Partners that lie past the end of the sequence are left out;
    - i or j is one of the first ``nglobal`` blocks: the low-rank part. Masked scores have no low-rank term that could
      be added before the softmax, so the paper's "flat block butterfly plus low rank" becomes global columns and rows:
      outside the butterfly the matrix of attention weights has nonzeros in ``nglobal * block_size`` columns and as many
      rows only, and so a rank of at most ``2 * nglobal * block_size`` (half of that if causal);

    and, if ``causal``, where the key is not later than the query. Every query sees itself.

    Attributes:
        block_size: tokens of a block, a power of two. On a GPU products run in tiles of 128 tokens, so smaller blocks
            are exact there but save nothing more.
        nfactors: butterfly factors, 0 or more; more than log2 of the number of blocks add nothing.
        nglobal: global blocks, 0 or more.
        causal: whether a query sees no later key.

    Raises:
        ValueError: for values that are not allowed, all in one message.
    """

    block_size: int = 128
    nfactors: int = 4
    nglobal: int = 1
    causal: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} must be a whole number, {least} or more"
            for name, least in (("block_size", 1), ("nfactors", 0), ("nglobal", 0))
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least
        ]
        if not problems and self.block_size & (self.block_size - 1):
            below = 1 << self.block_size.bit_length() - 1
            problems = [f"block_size={self.block_size} is no power of two; the nearest are {below} and {2 * below}"]
        if not isinstance(self.causal, bool):
            problems += [f"causal={self.causal!r} must be true or false"]
        if problems:
            raise ValueError(f"{NAME}: {'; '.join(problems)}")

    def __str__(self) -> str:
        """The spec as `parse` reads it, every field written out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ":".join([NAME, *(f"{name}={str(value).lower()}" for name, value in values.items())])

    @staticmethod
    def parse(text: str) -> PixelatedAttention:
        """The spec from a line of text, as ``pixelated:block_size=64:nfactors=3``; what is left out has its default.

        Raises:
            ValueError: for another name, parameters that are unknown, given twice or not ``name=value``, a bad value.
        """
        name, *parts = text.strip().split(":")
        known = list(PixelatedAttention.__annotations__)
        if name != NAME:
            raise ValueError(f"{text!r} is no attention; allowed: {NAME}, as {PixelatedAttention()}")
        values: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or key not in known or key in values:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near and key not in known else ""
                raise ValueError(f"{part!r} in {text!r} is not allowed; {hint}allowed: each once, {', '.join(known)}")
            words = {"true": True, "false": False}
            values[key] = int(value) if value.isdecimal() else words.get(value, value)
        return PixelatedAttention(**values)

    @staticmethod
    def for_budget(compute: float, length: int, block_size: int = 128, causal: bool = True) -> PixelatedAttention:
        """The largest mask that computes at most this share of the blocks of dense attention at ``length`` tokens.

        Up to a third of the budget goes to global blocks, the rest to butterfly factors, and what is left, where all
        factors fit, to global blocks again (the budget rule of Chen et al. 2022).

        Args:
            compute: share of the work, above 0 and at most 1.
            length: tokens.
            block_size: as in the class.
            causal: as in the class; the share is of dense attention with the same causality.

        Raises:
            ValueError: for a share out of range, or one that the diagonal blocks alone exceed.
        """

        def share(nfactors: int, nglobal: int) -> float:
            return PixelatedAttention(block_size, nfactors, nglobal, causal).cost(length).compute

        least = share(0, 0)
        if not 0 < compute <= 1 or compute < least:
            raise ValueError(
                f"compute={compute} is given for {length} tokens; allowed: {least:.4g}, which the diagonal blocks of "
                f"{block_size} take, to 1; smaller blocks take less"
            )
        blocks = -(-length // block_size)
        most = (blocks - 1).bit_length()
        third = min(compute, least + compute * GLOBAL_SHARE)
        nglobal = max(n for n in range(blocks + 1) if share(0, n) <= third)
        nfactors = max(n for n in range(most + 1) if share(n, nglobal) <= compute)
        if nfactors == most:
            nglobal = max(n for n in range(nglobal, blocks + 1) if share(nfactors, n) <= compute)
        return PixelatedAttention(block_size, nfactors, nglobal, causal)

    def linked(self, query_block: Tensor, key_block: Tensor) -> Tensor:
        """Whether blocks see each other, before causality: int tensors that broadcast -> bool."""
        return _linked(query_block, key_block, 2**self.nfactors, self.nglobal)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the query at a position sees the key at another: int tensors that broadcast -> bool."""
        shift = self.block_size.bit_length() - 1
        return _sees(query, key, shift, 2**self.nfactors, self.nglobal, self.causal)

    def mask(self, queries: int, keys: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The mask of the last ``queries`` of ``keys`` positions, bool ``[queries, keys]``; by default of all of them.

        Raises:
            ValueError: for more queries than keys.
        """
        keys = queries if keys is None else keys
        if queries > keys:
            raise ValueError(
                f"{queries} queries for {keys} keys; allowed: as many queries as keys, or the last of them"
            )
        position = torch.arange(keys, device=device)
        return self.sees(position[keys - queries :, None], position)

    def cost(self, length: int) -> AttentionCost:
        """Exact costs for a sequence of ``length`` tokens.

        Raises:
            ValueError: for a length below 1.
        """
        if length < 1:
            raise ValueError(f"a sequence of {length} tokens is given; allowed: 1 or more")
        blocks, size = -(-length // self.block_size), self.block_size
        sizes = torch.full((blocks,), size, dtype=torch.int64)
        sizes[-1] = length - (blocks - 1) * size
        index = torch.arange(blocks)
        table = self.linked(index[:, None], index)
        if self.causal:
            table = table.tril()
            pairs = sizes @ table.tril(-1).long() @ sizes + (sizes * (sizes + 1) // 2).sum()
            dense_pairs, dense_blocks = length * (length + 1) // 2, blocks * (blocks + 1) // 2
        else:
            pairs, dense_pairs, dense_blocks = sizes @ table.long() @ sizes, length**2, blocks**2
        return AttentionCost(int(pairs), dense_pairs, int(table.sum()), dense_blocks)


def _linked(query_block: Tensor, key_block: Tensor, reach: int, nglobal: int) -> Tensor:
    apart = query_block ^ key_block
    butterfly = ((apart & (apart - 1)) == 0) & (apart < reach)
    return butterfly | (query_block < nglobal) | (key_block < nglobal)


def _sees(query: Tensor, key: Tensor, shift: int, reach: int, nglobal: int, causal: bool) -> Tensor:
    seen = _linked(query >> shift, key >> shift, reach, nglobal)
    return seen & (key <= query) if causal else seen
