"""From a recipe to a model of transformers made from its configuration, with structured layers in place.

The dense model is built first, from the seed, so layers that stay dense have the same weights whatever replaces the
others. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversion import Conversion
from ..models.flops import linear_flops
from ..nn import Router, StructuredLinear, routing_loss
from ..nn.pixelated import PixelatedAttention
from ..optim import param_groups
from ..spec import Spec
from ..surgery import to_structured_
from . import masked, rules
from .attention import WHOLE, whole
from .recipe import Recipe
from .standard import is_standard, mix_

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "bert": "bert.encoder.layer",
}
MLP = {
    "opt": ("*.fc1", "*.fc2"), "gpt2": ("*.mlp.*",), "gpt_neox": ("*.mlp.*",), "llama": ("*.mlp.*",),
    "bert": ("*.intermediate.dense", "*.output.dense"),
}  # fmt: skip
ATTENTION = {"bert": "*.attention.*"}
"""Layers of attention whose names fit the globs of the MLP."""


class LanguageModel(nn.Module):
    """A model and its loss as one module, so that autocast, compilation and sharding see a scalar come out.

    Attributes:
        model: of transformers.
    """

    def __init__(self, model: nn.Module, mode: str = "none") -> None:
        super().__init__()
        self.model = model
        self._loss: Callable[[nn.Module, Tensor], Tensor] = loss if mode == "none" else torch.compile(loss, mode=mode)

    def forward(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar, over int64 ``windows`` ``[batch, context + 1]``.

        For bert ``windows`` are the batches of `structlin.train.masked`, and the mean is over the chosen places.
        In training with what `routing_loss` adds, where layers are mixtures of experts.
        """
        return self._loss(self.model, windows)


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """What `LanguageModel` computes, not compiled."""
    if model.config.model_type == "bert":  # type: ignore[union-attr]
        return masked.loss(model, windows)
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    found = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    return found + routing_loss(model) if model.training and routers(model) else found


def routers(model: nn.Module) -> list[Router]:
    """The routers of its mixtures of experts."""
    return [module for module in model.modules() if isinstance(module, Router)]


def build(recipe: Recipe, vocabulary: int, device: str | torch.device = "cpu") -> tuple[nn.Module, Conversion]:
    """The model of a recipe with new float32 weights, and what was swapped in it.

    Args:
        recipe: sizes, structure, layers and seed.
        vocabulary: entries of the tokenizer; the embedding has the next multiple of ``recipe.pad_vocabulary``.
        device: where it ends up; it is drawn on the CPU, so that weights do not depend on the device.

    Raises:
        OptionError, ValueError: where `check` raises.
    """
    torch.manual_seed(recipe.seed)
    model = dense(recipe, vocabulary)
    sizes = calm_(model, recipe) if recipe.post_norm or recipe.architecture == "bert" else {}
    conversion = to_structured_(model, _rules(recipe, model), init=recipe.init)
    for swap in conversion:
        if swap.name in sizes:
            _rescale_(model.get_submodule(swap.name), sizes[swap.name])
    return model.to(device), conversion


@torch.no_grad()
def calm_(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Draw a model with norms behind the residual sum so that every block begins close to the identity.

    Such a norm shrinks the residual stream to make room for what a block adds. With branches of the usual scale nothing
    of the input is left after 24 blocks, and the frequencies of tokens are all that is learned. So the last layer of a
    branch is over the root of twice the depth, as in OPT (Zhang et al. 2022, section 2.1), with 0.02 at a width of 1024
    for the rest. What leads to and from narrow embeddings keeps their scale: the product of two small factors would
    hardly leave zero.

    Returns:
        The Frobenius norm of each linear layer by name, which a structured one in its place is to have too.
    """
    sizes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
            continue
        std = 0.02 * (1024 / recipe.width) ** 0.5
        if name.endswith(("fc2", "out_proj", "output.dense")):
            std /= (2 * recipe.depth) ** 0.5
        elif "project_" in name:
            std = layer.in_features**-0.5
        layer.weight.normal_(0, std)
        sizes[name] = float(layer.weight.norm())
    return sizes


@torch.no_grad()
def _rescale_(layer: nn.Module, size: float) -> None:
    """Give the matrix of a structured layer the Frobenius norm ``size``."""
    if isinstance(layer, StructuredLinear):
        ratio = size / float(layer.matrix().norm())
        for name in {term.names[-1] for term in layer.plan.terms}:
            layer.stored(name).mul_(ratio)


def check(recipe: Recipe) -> None:
    """See that the structure fits the layers, on shapes alone.

    Raises:
        OptionError: for a structure that is unknown or does not fit, or layers that are not there.
    """
    with torch.device("meta"):
        model = dense(recipe, recipe.vocabulary)
    rules.check(model, _rules(recipe, model), recipe.init)


def dense(recipe: Recipe, vocabulary: int, attention: str = WHOLE) -> nn.Module:
    """The model before conversion, with the standard mixture in place of its MLPs if the recipe says so.

    Every matrix of GPT-2's blocks is an ``nn.Linear`` here, as in the other models.

    Args:
        recipe: sizes.
        vocabulary: as for `build`.
        attention: of transformers; the default is for whole windows, "sdpa" takes padded batches too.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    whole()
    auto = AutoModelForMaskedLM if recipe.architecture == "bert" else AutoModelForCausalLM
    from_config: Any = auto.from_config
    model = from_config(configuration(recipe, vocabulary), dtype=torch.float32, attn_implementation=attention)
    if recipe.attention != "dense":
        from ..hf import attention as pixelated

        pixelated.pixelate_attention_(model, recipe.attention)
        if attention == WHOLE:
            model.set_attn_implementation(pixelated.WHOLE)
    model = _linearised(model)
    return (mix_(recipe, model) if is_standard(recipe) else model).train()


def configuration(recipe: Recipe, vocabulary: int) -> Any:
    """The configuration of transformers that a recipe stands for."""
    from transformers import AutoConfig

    rows = -(-vocabulary // recipe.pad_vocabulary) * recipe.pad_vocabulary
    common: dict[str, Any] = {
        "vocab_size": rows, "tie_word_embeddings": recipe.tied, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None, "use_cache": False,
    }  # fmt: skip
    sizes = {
        "hidden_size": recipe.width, "num_hidden_layers": recipe.depth, "num_attention_heads": recipe.heads,
        "max_position_embeddings": recipe.context,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "opt": {**sizes, "ffn_dim": recipe.mlp_width, "word_embed_proj_dim": recipe.embedding_width or recipe.width,
                "do_layer_norm_before": not recipe.post_norm, "dropout": recipe.dropout, "layerdrop": 0.0},
        "gpt2": {"n_embd": recipe.width, "n_layer": recipe.depth, "n_head": recipe.heads, "n_inner": recipe.mlp_width,
                 "n_positions": recipe.context, "resid_pdrop": recipe.dropout, "embd_pdrop": recipe.dropout,
                 "attn_pdrop": recipe.dropout},
        "gpt_neox": {**sizes, "intermediate_size": recipe.mlp_width, "hidden_dropout": recipe.dropout,
                     "attention_dropout": recipe.dropout},
        "llama": {**sizes, "intermediate_size": recipe.mlp_width, "num_key_value_heads": recipe.kv_heads,
                  "attention_dropout": recipe.dropout},
        "bert": {**sizes, "intermediate_size": recipe.mlp_width, "hidden_dropout_prob": recipe.dropout,
                 "attention_probs_dropout_prob": recipe.dropout},
    }  # fmt: skip
    return AutoConfig.for_model(recipe.architecture, **common, **own[recipe.architecture])


def groups(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of AdamW at their peak rates; norms and biases have no decay."""
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    multipliers = dict.fromkeys(embeddings, recipe.embedding_lr) if recipe.embedding_lr != 1 else None
    return param_groups(model, recipe.lr, recipe.weight_decay, multipliers=multipliers)


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over `groups`, one launch for all parameters."""
    betas = recipe.beta1, recipe.beta2
    return torch.optim.AdamW(groups(recipe, model), betas=betas, eps=recipe.eps, fused=True)


def flops_per_token(recipe: Recipe, model: nn.Module) -> int:
    """Forward FLOPs per token of the linear layers and of attention over the keys that are seen; training costs thrice.

    Norms, activations and lookups are left out. In bert attention has the whole length, and the head runs for the
    chosen tokens only.
    """
    if recipe.architecture == "bert":
        head = linear_flops(model.get_submodule("cls")) * masked.count(recipe) / recipe.context
        return (
            round(linear_flops(model.get_submodule("bert")) + head) + recipe.depth * 4 * recipe.width * recipe.context
        )
    if recipe.attention == "dense":
        return linear_flops(model) + recipe.depth * 2 * recipe.width * (recipe.context + 1)
    pairs = PixelatedAttention.parse(recipe.attention).cost(recipe.context).pairs
    return linear_flops(model) + recipe.depth * 4 * recipe.width * pairs // recipe.context


def _rules(recipe: Recipe, model: nn.Module) -> dict[str, Spec | None]:
    """What `to_structured_` is given."""
    found: dict[str, Spec | None] = {}  # dense layers stay as transformers makes and draws them
    if recipe.lm_head != "dense":
        # by what it is: its name differs between architectures, and between versions of transformers
        head = model.get_output_embeddings()  # type: ignore[operator]
        (name,) = (name for name, module in model.named_modules() if module is head)
        found[name] = rules.spec("--lm-head", recipe.lm_head)
    if recipe.structure != "dense" and not is_standard(recipe):
        blocks = BLOCKS[recipe.architecture]
        known = {"mlp": tuple(f"{blocks}.{glob}" for glob in MLP[recipe.architecture]), "all": (f"{blocks}.*",)}
        chosen = known.get(recipe.layers, tuple(recipe.layers.split()))
        if recipe.layers == "mlp" and recipe.architecture in ATTENTION:
            found[f"{blocks}.{ATTENTION[recipe.architecture]}"] = None
        found |= dict.fromkeys(chosen, rules.spec("--structure", recipe.structure))
    return found


@torch.no_grad()
def portable(model: nn.Module) -> nn.Module:
    """``model`` as transformers builds it: in the blocks of GPT-2 its Conv1D again where `dense` put an ``nn.Linear``.

    Changes ``model`` and returns it. What has a structure stays as it is.
    """
    from transformers.pytorch_utils import Conv1D

    blocks: Any = model.get_submodule(BLOCKS["gpt2"]) if model.config.model_type == "gpt2" else nn.Module()  # type: ignore[union-attr]
    for name, module in list(blocks.named_modules()):
        if type(module) is nn.Linear:
            conv: Any = Conv1D(module.out_features, module.in_features)
            conv.weight = nn.Parameter(module.weight.T.contiguous())
            conv.bias = module.bias
            blocks.set_submodule(name, conv)
    return model


def _linearised(model: nn.Module) -> nn.Module:
    """``model`` with ``nn.Linear`` in place of the Conv1D of transformers, whose weights are transposed."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, device=module.weight.device)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model
