"""A pretraining run of a language model as one frozen value: what every run has, and the sizes and text of a model.

A recipe is made by a Python function of `structlin.recipes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..nn.pixelated import PixelatedAttention
from .settings import Settings, option, setting

Architecture = Literal["opt", "gpt2", "gpt_neox", "llama", "bert"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """One pretraining run of a decoder, or of an encoder (bert).

    Lengths are in tokens, batches in windows of ``context`` tokens.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    TITLE: ClassVar[str] = "language models"
    packages: ClassVar[tuple[str, ...]] = ("transformers", "accelerate", "tokenizers")

    architecture: Architecture = setting("gpt2", "model class of transformers")  # noqa: RUF009, it is a field
    width: int = setting(768, "features of the residual stream")
    depth: int = setting(12, "number of blocks")
    heads: int = setting(12, "attention heads of a block")
    kv_heads: int | None = setting(None, "key and value heads, llama only; none: as many as heads")
    mlp_width: int = setting(3072, "hidden features of the MLP")
    embedding_width: int | None = setting(None, "features of the embedding, opt only; none: the width")
    post_norm: bool = setting(False, "norms after the residual sum, opt only")
    tied: bool = setting(True, "whether embedding and output share their matrix")
    dropout: float = setting(0.0, "share of activations dropped in training")
    context: int = setting(1024, "tokens of a window, and rows of a table of positions")
    masked: float = setting(0.15, "bert: share of the tokens of a window that are hidden and predicted")

    attention: str = setting(
        "dense", "which keys a query sees: dense, or as pixelated:block_size=64:nfactors=3:nglobal=1"
    )
    structure: str = setting(
        "dense",
        "structure of the chosen layers, as dyad:nblocks=4; dense leaves the model as it is, and "
        "moe_ffn:experts=8:top_k=2 is the standard mixture of whole MLPs",
    )
    layers: str = setting(
        "mlp", "layers that get it: mlp, all (of the blocks), or globs over names, with spaces between"
    )
    lm_head: str = setting("dense", "structure of the output layer, which then is not tied to the embedding")
    method: Literal["scratch", "sparsify_reverse", "self_guided"] = setting("scratch", "how they are trained")
    switch: float = setting(0.9, "sparsify_reverse: share of the steps after which layers become dense")
    moments: Literal["reset", "carry"] = setting("reset", "sparsify_reverse: what the optimizer keeps then")
    guided: float = setting(0.5, "self_guided: share of the steps with a guide")

    data: tuple[str, ...] = setting((), "text to train on: files, folders, hf:NAME[:CONFIG], or stdlib")
    valid: tuple[str, ...] = setting((), "text to validate on; none: a share of the training documents")
    valid_share: float = setting(0.01, "share of the documents held out where no validation text is given")
    tokenizer: str | None = setting(None, "tokenizer.json (also as .xz); none: one is trained on the text")
    vocabulary: int = setting(16384, "entries of a trained tokenizer")
    pad_vocabulary: int = setting(64, "the embedding has the next multiple of this many rows")
    cache: str = setting("runs/cache", "folder for tokenised text and trained tokenizers")

    micro_batch: int = setting(64, "windows of one pass on one device at most; the rest is accumulated")
    embedding_lr: float = setting(1.0, "multiplies the rate for the embeddings")
    valid_windows: int = setting(256, "windows of a validation at most")
    trackers: tuple[str, ...] = setting((), "tensorboard, trackio, wandb")
    peak_flops: float | None = setting(None, "FLOP/s of the device, for the utilisation; none: measured")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Option and message of all that is wrong with the fields together."""
        if self.heads > 0 and self.width % self.heads:
            yield "--heads", f"{self.heads} heads do not divide the width {self.width}"
        for name, only in (("kv_heads", "llama"), ("embedding_width", "opt"), ("post_norm", "opt")):
            if getattr(self, name) and self.architecture != only:
                yield option(name), f"is for {only}; the architecture is {self.architecture}"
        if self.kv_heads and self.heads % self.kv_heads:
            yield "--kv-heads", f"{self.kv_heads} does not divide the {self.heads} heads"
        if self.architecture == "bert" and not self.tied:
            yield "--tied", "false is given; bert has one matrix for embedding and output, allowed: true"
        if self.architecture == "bert" and self.context == 1:
            yield "--context", "1 is given; allowed for bert: 2 or more, since the first token is [CLS]"
        if self.lm_head != "dense" and self.tied:
            yield "--lm-head", f"{self.lm_head} cannot be tied to the embedding; give --tied false too"
        yield from self._attention_problems()
        if self.method != "scratch" and self.structure == "dense":
            yield "--method", f"{self.method} needs a structure; give --structure, as dyad:nblocks=4"
        for name, method in (
            ("switch", "sparsify_reverse"),
            ("moments", "sparsify_reverse"),
            ("guided", "self_guided"),
        ):
            if self.method != method and getattr(self, name) != getattr(Recipe, name):
                yield option(name), f"is for --method {method}; the method is {self.method}"
        if unknown := set(self.trackers) - {"tensorboard", "trackio", "wandb"}:
            yield "--trackers", f"{', '.join(sorted(unknown))} is unknown; allowed: tensorboard, trackio, wandb"

    def _attention_problems(self) -> Iterator[tuple[str, str]]:
        if self.attention == "dense":
            return
        try:
            spec = PixelatedAttention.parse(self.attention)
        except ValueError as error:
            yield "--attention", f"{error}, or dense"
            return
        if self.architecture == "bert":
            yield "--attention", f"{self.attention} is given; allowed: dense, as the architecture is bert"
        if not spec.causal:
            yield "--attention", f"{self.attention} is given; allowed: causal=true, as the models are decoders"
        if self.dropout:
            yield "--dropout", f"{self.dropout} is given; allowed with {self.attention}: 0"

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Least and largest value of a number, and how to say so."""
        if name in ("dropout", "valid_share"):
            return 0, 1 - 1e-9, "0 to below 1"
        if name in ("switch", "guided", "masked"):
            return 1e-9, 1 - 1e-9, "between 0 and 1"
        if name in ("embedding_lr", "peak_flops"):
            return 1e-300, 1e300, "positive numbers"
        return super().bounds(name)
