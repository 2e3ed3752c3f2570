"""Whole decoders and clusters on paper: a training step predicted from the ceilings of one device.

Linear layers follow `structlin.costs`; the rest is assumed, and each assumption is in the docstring of what uses it.
docs/advise.md holds predicted blocks against measured ones; clusters were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import analysis, costs
from ..costs import Ceilings, Product, Work
from ..plan import Plan
from ..spec import Spec
from ..structures import Dense
from .ceilings import predicted

LINK = 4.5e11
"""Bytes/s that a GPU sends and receives at the same time over the fourth generation of NVLink, as published."""
STATE_BYTES = 12  # of AdamW per parameter: weights and two moments in single precision


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder: Llama-like where ``gated``, else as `structlin.models.gpt`."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of the linear layers of one block; query, key and value in one."""
        heads = self.width + 2 * self.width * self.kv_heads // self.heads
        up = [(self.mlp, self.width)] * (2 if self.gated else 1)
        return [(heads, self.width), (self.width, self.width), *up, (self.width, self.mlp)]


DECODERS = {
    "7b": Decoder(32, 4096, 11008, 32, 32, 32000),
    "13b": Decoder(40, 5120, 13824, 40, 40, 32000),
    "34b": Decoder(48, 8192, 22016, 64, 8, 32000),
    "70b": Decoder(80, 8192, 28672, 64, 8, 32000),
}
"""Decoders of the sizes of Llama 2 and Code Llama (Touvron et al. 2023, Roziere et al. 2023)."""


@dataclass(frozen=True)
class Step:
    """A training step of one GPU, in seconds, and the bytes that it holds.

    Attributes:
        linears: of the blocks, forward and backward.
        rest: attention, elementwise work, embedding and head.
        communication: of tensor parallelism, and what data parallelism cannot hide behind the backward pass.
        optimizer: AdamW.
        weights: bytes of weights and gradients in half precision and of the optimizer's share.
        activations: bytes kept between forward and backward.
        params: weights of the whole model.
    """

    linears: float
    rest: float
    communication: float
    optimizer: float
    weights: int
    activations: int
    params: int

    @property
    def seconds(self) -> float:
        """All four, one after another."""
        return self.linears + self.rest + self.communication + self.optimizer


def block_rest(decoder: Decoder, tokens: int, context: int, tensor: int = 1) -> Work:
    """What a block runs forward and backward besides its linear layers, on each of ``tensor`` GPUs.

    Causal attention computes half of all scores, as two products forward and five backward (with the scores computed
    again), at the rate of products with k = 64. Elementwise work moves, forward and backward together, 30 numbers for
    every feature of the width (two norms, rotations, two residuals, operands of attention) and 6 for every feature of
    the MLP, or 9 where it is gated; norms and residuals are not split over GPUs.
    """
    width = decoder.width // tensor
    attention = 7 * (2.0 * tokens * context * width) / 2
    inner = 64
    numbers = tokens * (16 * decoder.width + 14 * width + (9 if decoder.gated else 6) * decoder.mlp // tensor)
    return Work((Product(attention, 0.0, inner),), numbers, 0.0, 14)


def block_seconds(
    decoder: Decoder, spec: Spec | None, tokens: int, context: int, ceilings: Ceilings, tensor: int = 1
) -> tuple[float, float]:
    """Seconds of the linear layers of a block forward and backward, and of the rest of it.

    Under tensor parallelism each GPU does an equal share of every linear layer, dense or structured.

    Raises:
        ValueError: where ``spec`` does not fit a layer.
    """
    plans = [(spec or Dense()).plan(*shape) for shape in decoder.linears]
    linears = sum(predicted(plan, tokens, ceilings) for plan in plans) / tensor
    return linears, costs.seconds(block_rest(decoder, tokens, context, tensor), ceilings)


def step(
    decoder: Decoder,
    spec: Spec | None,
    ceilings: Ceilings,
    *,
    tokens: int = 16384,
    context: int = 4096,
    gpus: int = 1,
    tensor: int = 1,
    link: float = LINK,
) -> Step:
    """A training step of a decoder with the blocks' linear layers structured by ``spec``, or dense.

    Args:
        decoder: its sizes.
        spec: of every linear layer of the blocks; embedding and head stay dense.
        ceilings: of one GPU, in half precision.
        tokens: of a step for each group of ``tensor`` GPUs.
        context: tokens of a sequence.
        gpus: in all; ``gpus / tensor`` groups hold copies of the model.
        tensor: GPUs that share every layer.
        link: bytes/s between GPUs, for rings of any size.

    Raises:
        ValueError: for GPUs that do not divide into groups, or a spec that does not fit.
    """
    if gpus < 1 or tensor < 1 or gpus % tensor or decoder.heads % tensor:
        raise ValueError(f"{gpus} GPUs in groups of {tensor} for {decoder.heads} heads is given; both must divide")
    copies = gpus // tensor
    plans = [(spec or Dense()).plan(*shape) for shape in decoder.linears]
    linears, rest = block_seconds(decoder, spec, tokens, context, ceilings, tensor)
    head = costs.seconds(costs.dense_work(decoder.vocabulary, decoder.width, tokens, True), ceilings) / tensor
    params = decoder.layers * sum(map(analysis.num_params, plans)) + 2 * decoder.vocabulary * decoder.width
    share = params / tensor
    passed = ceilings.itemsize * tokens * decoder.width  # of a block's activations, four times a step
    between = decoder.layers * 4 * _ring(passed, tensor, link)
    gradients = max(0.0, _ring(ceilings.itemsize * share, copies, link) - 2 / 3 * decoder.layers * (linears + rest))
    optimizer = (2 * STATE_BYTES + 2 * ceilings.itemsize) * share / copies / ceilings.bandwidth
    weights = share * (2 * ceilings.itemsize + STATE_BYTES / copies)
    return Step(
        decoder.layers * linears, decoder.layers * rest + head, between + gradients, optimizer, int(weights),
        decoder.layers * _activations(decoder, plans, tokens, ceilings.itemsize, tensor), params,
    )  # fmt: skip


def _ring(nbytes: float, gpus: int, link: float) -> float:
    """Seconds of an all-reduce in a ring: everything crosses twice, but for one part in ``gpus``."""
    return 2 * nbytes * (gpus - 1) / gpus / link


def _activations(decoder: Decoder, plans: list[Plan], tokens: int, itemsize: int, tensor: int) -> int:
    """Bytes of a block: the inputs and intermediates of linear layers, queries, keys and values, both residuals."""
    linears = sum(analysis.saved_activations(plan) for plan in plans)
    heads = decoder.linears[0][0] + (decoder.mlp if decoder.gated else 0)
    return itemsize * tokens * ((linears + heads) // tensor + 2 * decoder.width)
