"""The standard mixture of experts in place of the MLPs of a decoder, as ``--structure moe_ffn:experts=8:top_k=2``."""

from __future__ import annotations

from torch import nn

from ..nn import MoEFFN
from .config import OptionError
from .recipe import Recipe

NAME = "moe_ffn"
ARCHITECTURES = ("gpt2", "gpt_neox")  # whose MLP is two layers with an activation between


def is_standard(recipe: Recipe) -> bool:
    """Whether the structure of a recipe is that mixture, and not one of linear layers."""
    return recipe.structure.partition(":")[0] == NAME


def mix_(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Put `MoEFFN` in place of every MLP of ``model``, in place: a token visits as many weights as in the dense model,
    so an expert's hidden width is mlp_width / top_k.

    Raises:
        OptionError: for other parameters than experts and top_k, an architecture with other MLPs, or layers that are
            not the MLPs.
    """
    values = {"experts": 8, "top_k": 2}
    for part in recipe.structure.split(":")[1:]:
        name, _, value = part.partition("=")
        if name not in values or not value.isdecimal():
            raise OptionError("--structure", f"{part!r} in {recipe.structure!r}; allowed: experts=8, top_k=2")
        values[name] = int(value)
    if recipe.architecture not in ARCHITECTURES or recipe.layers != "mlp":
        given = f"architecture={recipe.architecture} and layers={recipe.layers}"
        raise OptionError(
            "--structure", f"{NAME} takes architecture {' or '.join(ARCHITECTURES)} and layers=mlp, not {given}"
        )
    if not 1 <= values["top_k"] <= values["experts"] or recipe.mlp_width % values["top_k"]:
        raise OptionError(
            "--structure", f"top_k={values['top_k']} must divide mlp_width={recipe.mlp_width} and be at most experts"
        )
    for name, block in list(model.named_modules()):
        if name.endswith(".mlp"):
            weight = next(block.parameters())
            ffn = MoEFFN(
                recipe.width, recipe.mlp_width // values["top_k"], values["experts"], values["top_k"],
                activation=block.act, device=weight.device, dtype=weight.dtype,
            )  # fmt: skip
            model.set_submodule(name, nn.Sequential(ffn, nn.Dropout(recipe.dropout)))
    return model
