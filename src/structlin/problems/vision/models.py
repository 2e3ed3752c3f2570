"""From a recipe to a dense classifier of images: a vision transformer, an MLP-Mixer, or a perceptron of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...models.mixer import Mixer
from ...models.mlp import MLP
from ...train.attention import whole

if TYPE_CHECKING:
    from .recipe import VisionRecipe


def build(recipe: VisionRecipe, shape: Sequence[int], classes: int) -> nn.Module:
    """The dense float32 model for images of ``shape`` (height, width, channels), drawn from the global generator.

    Raises:
        ValueError: for images that it cannot cut into patches.
    """
    return MODELS[recipe.model](recipe, shape, classes)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """``[batch, classes]`` of images ``[batch, channels, height, width]``, from models of transformers or others."""
    out = model(images)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers that "all" and "mlp" stand for, by name: all but the one that gives the classes, and those of
    the MLPs; of a Mixer the MLPs across channels, of a perceptron the square layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = linear[:-1]
    outside = (".attention.", ".tokens.", "inputs")
    return {"all": inner, "mlp": [name for name in inner if not any(part in name for part in outside)]}


def _vit(recipe: VisionRecipe, shape: Sequence[int], classes: int) -> nn.Module:
    """A ViT of Hugging Face transformers with a class token (Dosovitskiy et al. 2021)."""
    from transformers import AutoConfig, ViTForImageClassification

    config: Any = AutoConfig.for_model(
        "vit", image_size=_side(shape, recipe.patch), patch_size=recipe.patch, num_channels=shape[2],
        num_labels=classes, hidden_size=recipe.width, intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.depth, num_attention_heads=recipe.heads, attn_implementation=whole(),
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config)
    return model


def _mixer(recipe: VisionRecipe, shape: Sequence[int], classes: int) -> nn.Module:
    side = _side(shape, recipe.patch)
    sizes = recipe.width, recipe.depth, recipe.token_width, recipe.mlp_width
    return Mixer(side, recipe.patch, shape[2], classes, *sizes)


def _mlp(recipe: VisionRecipe, shape: Sequence[int], classes: int) -> nn.Module:
    height, width, channels = shape
    return nn.Sequential(nn.Flatten(), MLP(height * width * channels, recipe.width, recipe.depth, classes))


def _side(shape: Sequence[int], patch: int) -> int:
    height, width, _ = shape
    if height != width:
        raise ValueError(f"images of {height}x{width} are not square; give --image, pixels on a side")
    if height % patch:
        fitting = ", ".join(str(size) for size in range(1, height + 1) if height % size == 0)
        raise ValueError(f"--patch {patch} does not divide the {height} pixels of an image; allowed: {fitting}")
    return height


MODELS: dict[str, Callable[[Any, Sequence[int], int], nn.Module]] = {"vit": _vit, "mixer": _mixer, "mlp": _mlp}
"""Architecture -> what builds it."""
