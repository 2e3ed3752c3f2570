"""One small decoder to train and measure structures in: bytes in, a distribution over the next byte out.

Every matrix is a plain `torch.nn.Linear` with a name fit for rules (``blocks.*.attn.*``, ``blocks.*.mlp.*``, ``head``),
so that swapping is left to `structlin.surgery`. Rotary positions and pre-norms are there because they learn most in the
few hundred steps that a small machine affords; there is no dropout and no bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .flops import linear_flops


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`. ``width`` is a multiple of ``2 * heads``; ``context`` is the longest sequence in tokens."""

    context: int = 128
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: int = 4
    vocabulary: int = 256

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} is not a multiple of 2 * heads = {2 * self.heads}")


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``[batch, context, width]`` to the same shape."""
        batch, context, width = x.shape
        heads = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, context, width / heads]
        mixed = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return out


class MLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, context, width]`` to the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``[batch, context, width]`` to the same shape."""
        x = x + self.attn(self.attn_norm(x), rotation)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """A decoder of ``config.depth`` blocks."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.register_buffer("rotation", angles(config), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, context, vocabulary]`` for the byte after each of ``tokens``, int64 ``[batch, context]``."""
        x = self.embedding(tokens)
        rotation = self.rotation[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        out: Tensor = self.head(self.norm(x))
        return out

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a scalar, over ``windows`` (int64, ``[batch, context + 1]``)."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def angles(config: GPTConfig) -> Tensor:
    """Cosines and sines of the rotary angles, float32 ``[2, context, width / heads / 2]``."""
    half = config.width // config.heads // 2
    speeds = 10_000 ** (-torch.arange(half, dtype=torch.float32) / half)
    table = torch.outer(torch.arange(config.context, dtype=torch.float32), speeds)
    return torch.stack([table.cos(), table.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (channel i, channel i + half) of ``x`` (``[..., context, channels]``) by its position's angle."""
    cos, sin = rotation.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def flops_per_token(model: GPT) -> int:
    """Forward FLOPs per token, a multiply-add counted as two; training costs three times that.

    Counts every linear layer, structured ones by their plan and mixtures by what a token visits, and the two products
    of attention over the ``(context + 1) / 2`` positions that a causal token sees on average. Norms, activations and
    lookups are left out.
    """
    config = model.config
    return linear_flops(model) + config.depth * 2 * config.width * (config.context + 1)
