"""A training run as one frozen value: all numbers that fix what comes out, checked as a whole before it starts.

A recipe is made by a Python function of `structlin.recipes`; each field is also an option of ``structlin train``, and
all of them are saved with the run. Two runs with equal recipes, text and versions see the same weights, batches and
learning rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..nn.pixelated import PixelatedAttention
from .config import OptionError

Architecture = Literal["opt", "gpt2", "gpt_neox", "llama"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

ELSEWHERE = ("device", "cache", "trackers", "log_every")
"""Fields that do not change what comes out of a run; a run may go on with others."""


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pretraining run of a decoder. Lengths are in tokens, batches in windows of ``context`` tokens.

    Raises:
        OptionError: one message with every field that does not fit.
    """

    name: str = _field("", "what the run is called in its record")

    architecture: Architecture = _field("gpt2", "model class of transformers")  # noqa: RUF009, it is a field
    width: int = _field(768, "features of the residual stream")
    depth: int = _field(12, "number of blocks")
    heads: int = _field(12, "attention heads of a block")
    kv_heads: int | None = _field(None, "key and value heads, llama only; none: as many as heads")
    mlp_width: int = _field(3072, "hidden features of the MLP")
    embedding_width: int | None = _field(None, "features of the embedding, opt only; none: the width")
    post_norm: bool = _field(False, "norms after the residual sum, opt only")
    tied: bool = _field(True, "whether embedding and output share their matrix")
    dropout: float = _field(0.0, "share of activations dropped in training")
    context: int = _field(1024, "tokens of a window, and rows of a table of positions")

    attention: str = _field(
        "dense", "which keys a query sees: dense, or as pixelated:block_size=64:nfactors=3:nglobal=1"
    )
    structure: str = _field(
        "dense",
        "structure of the chosen layers, as dyad:nblocks=4; dense leaves the model as it is, and "
        "moe_ffn:experts=8:top_k=2 is the standard mixture of whole MLPs",
    )
    layers: str = _field(
        "mlp", "layers that get it: mlp, all (of the blocks), or globs over names, with spaces between"
    )
    lm_head: str = _field("dense", "structure of the output layer, which then is not tied to the embedding")
    init: str = _field("spectral", "how factors are drawn")
    method: Literal["scratch", "sparsify_reverse", "self_guided"] = _field("scratch", "how they are trained")
    switch: float = _field(0.9, "sparsify_reverse: share of the steps after which layers become dense")
    moments: Literal["reset", "carry"] = _field("reset", "sparsify_reverse: what the optimizer keeps then")
    guided: float = _field(0.5, "self_guided: share of the steps with a guide")

    data: tuple[str, ...] = _field((), "text to train on: files, folders, hf:NAME[:CONFIG], or stdlib")
    valid: tuple[str, ...] = _field((), "text to validate on; none: a share of the training documents")
    valid_share: float = _field(0.01, "share of the documents held out where no validation text is given")
    tokenizer: str | None = _field(None, "tokenizer.json (also as .xz); none: one is trained on the text")
    vocabulary: int = _field(16384, "entries of a trained tokenizer")
    pad_vocabulary: int = _field(64, "the embedding has the next multiple of this many rows")
    cache: str = _field("runs/cache", "folder for tokenised text and trained tokenizers")

    steps: int = _field(1000, "updates")
    batch: int = _field(64, "windows of an update, over all devices")
    micro_batch: int = _field(64, "windows of one pass on one device at most; the rest is accumulated")
    lr: float = _field(1e-3, "peak learning rate of a dense layer, from which those of factors follow")
    embedding_lr: float = _field(1.0, "multiplies it for the embeddings")
    warmup: float = _field(0.05, "share of the steps in which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = _field("cosine", "how the rate falls afterwards")
    final_lr: float = _field(0.0, "share of the peak that it falls to")
    weight_decay: float = _field(0.1, "of matrices")
    beta1: float = _field(0.9, "of AdamW")
    beta2: float = _field(0.95, "of AdamW")
    eps: float = _field(1e-8, "of AdamW")
    clip: float = _field(1.0, "largest norm of the gradient")
    seed: int = _field(0, "of weights and order of the text")

    dtype: Literal["bfloat16", "float32"] = _field("bfloat16", "of the matrix products; weights stay float32")
    compile: Compile = _field("default", "mode of torch.compile, or none")  # noqa: RUF009, it is a field
    device: Literal["auto", "cpu", "cuda"] = _field("auto", "auto: a GPU if there is one")
    log_every: int = _field(20, "steps between two lines of progress; losses are read back only then")
    valid_every: int = _field(250, "steps between two validations")
    valid_windows: int = _field(256, "windows of a validation at most")
    checkpoint_every: int = _field(250, "steps between two checkpoints")
    trackers: tuple[str, ...] = _field((), "tensorboard, trackio, wandb")
    peak_flops: float | None = _field(None, "FLOP/s of the device, for the utilisation; none: measured")

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise OptionError(problems[0][0], "; ".join([problems[0][1], *(f"{n}: {m}" for n, m in problems[1:])]))

    def to_dict(self) -> dict[str, Any]:
        """Every field; JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return Recipe(**fields)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``, counted from 0: a linear rise, then the schedule."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        part = (step - rise) / max(1, self.steps - rise)
        fall = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}[self.schedule]
        return self.final_lr + (1 - self.final_lr) * fall


def kinds() -> dict[str, Any]:
    """Name -> type of every field of a `Recipe`."""
    return get_type_hints(Recipe)


def option(name: str) -> str:
    """A field as it is written on the command line: ``valid_every`` is ``--valid-every``."""
    return "--" + name.replace("_", "-")


def override(recipe: Recipe, texts: Mapping[str, Any]) -> Recipe:
    """``recipe`` with fields from the command line, each a text or a list of texts.

    Raises:
        OptionError: one message with every field that is not of its type, or does not fit.
    """
    values: dict[str, Any] = {}
    problems = []
    for name, text in texts.items():
        kind = kinds()[name]
        try:
            values[name] = tuple(text) if get_origin(kind) is tuple else _parse(kind, text)
        except ValueError:
            problems.append((option(name), f"{text!r} is given; allowed: {_described(kind)}"))
    if problems:
        raise OptionError(problems[0][0], "; ".join([problems[0][1], *(f"{n}: {m}" for n, m in problems[1:])]))
    return dataclasses.replace(recipe, **values)


def _parse(kind: Any, text: str) -> Any:
    options = get_args(kind)
    if NoneType in options:
        return None if text.lower() == "none" else _parse(next(o for o in options if o is not NoneType), text)
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else float("no bool")
    return kind(text) if kind in (int, float) else text  # choices are checked with the recipe as a whole


def _described(kind: Any) -> str:
    named = {int: "whole numbers", float: "numbers", bool: "true, false"}
    options = [option for option in get_args(kind) if option is not NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(options)
    return f"{_described(options[0])}, none" if NoneType in get_args(kind) else named.get(kind, "text")


def _problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Option and message of everything that is wrong with the values."""
    for name, kind in kinds().items():
        value = getattr(recipe, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            yield option(name), f"{value!r} is given; allowed: {_described(kind)}"
        if isinstance(value, bool | str | tuple | NoneType):
            continue
        low, high, words = _range(name)
        if not low <= value <= high or not math.isfinite(value):
            yield option(name), f"{value} is given; allowed: {words}"
    if recipe.heads > 0 and recipe.width % recipe.heads:
        yield "--heads", f"{recipe.heads} heads do not divide the width {recipe.width}"
    for name, only in (("kv_heads", "llama"), ("embedding_width", "opt"), ("post_norm", "opt")):
        if getattr(recipe, name) and recipe.architecture != only:
            yield option(name), f"is for {only}; the architecture is {recipe.architecture}"
    if recipe.kv_heads and recipe.heads % recipe.kv_heads:
        yield "--kv-heads", f"{recipe.kv_heads} does not divide the {recipe.heads} heads"
    if recipe.lm_head != "dense" and recipe.tied:
        yield "--lm-head", f"{recipe.lm_head} cannot be tied to the embedding; give --tied false too"
    yield from _attention_problems(recipe)
    if recipe.method != "scratch" and recipe.structure == "dense":
        yield "--method", f"{recipe.method} needs a structure; give --structure, as dyad:nblocks=4"
    if unknown := set(recipe.trackers) - {"tensorboard", "trackio", "wandb"}:
        yield "--trackers", f"{', '.join(sorted(unknown))} is unknown; allowed: tensorboard, trackio, wandb"


def _attention_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.attention == "dense":
        return
    try:
        spec = PixelatedAttention.parse(recipe.attention)
    except ValueError as error:
        yield "--attention", f"{error}, or dense"
        return
    if not spec.causal:
        yield "--attention", f"{recipe.attention} is given; allowed: causal=true, as the models are decoders"
    if recipe.dropout:
        yield "--dropout", f"{recipe.dropout} is given; allowed with {recipe.attention}: 0"


def _range(name: str) -> tuple[float, float, str]:
    if name in ("seed", "weight_decay"):
        return 0, 2**63 - 1, "0 or more"
    if name in ("dropout", "warmup", "final_lr", "beta1", "beta2", "valid_share"):
        return 0, 1 - 1e-9, "0 to below 1"
    if name in ("switch", "guided"):
        return 1e-9, 1 - 1e-9, "between 0 and 1"
    if name in ("lr", "embedding_lr", "eps", "clip", "peak_flops"):
        return 1e-300, 1e300, "positive numbers"
    return 1, 2**31, "1 or more"
