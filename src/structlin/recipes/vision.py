"""Classifiers of images: the models of the Monarch, Pixelfly and DYAD papers, at sizes for small images."""

from __future__ import annotations

import dataclasses

from ..problems.vision import VisionRecipe


def vit_cifar10() -> VisionRecipe:
    """ViT, 512 wide, patches of 4, for images of 32 pixels (Dosovitskiy et al. 2021)."""
    return VisionRecipe(
        name="vit_cifar10", model="vit", steps=5280, batch=512, lr=1e-3, warmup=0.1, weight_decay=0.1,
        log_every=100, valid_every=440, checkpoint_every=5280, beta2=0.99, compile="reduce-overhead",
    )  # fmt: skip


def mixer_cifar10() -> VisionRecipe:
    """MLP-Mixer, 512 wide, patches of 4, for images of 32 pixels (Tolstikhin et al. 2021)."""
    return dataclasses.replace(vit_cifar10(), name="mixer_cifar10", model="mixer", layers="mlp")


def mnist_mlp() -> VisionRecipe:
    """Perceptron of three hidden layers for digits, as in DYAD's experiment (Chandy et al. 2023)."""
    return VisionRecipe(
        name="mnist_mlp", model="mlp", width=1024, depth=2, steps=2110, batch=256, lr=1e-3, weight_decay=0.01,
        shift=0, mirror=False, compile="none", log_every=100, valid_every=211, checkpoint_every=2110, beta2=0.99,
    )  # fmt: skip


def vit_mnist() -> VisionRecipe:
    """ViT, 128 wide, patches of 7, for digits: a few minutes of a CPU."""
    return dataclasses.replace(
        vit_cifar10(), name="vit_mnist", width=128, depth=3, heads=4, mlp_width=512, token_width=64, patch=7, steps=633,
        batch=256, lr=2e-3, weight_decay=0.05, mirror=False, log_every=50, valid_every=211, checkpoint_every=633,
    )  # fmt: skip


def mixer_mnist() -> VisionRecipe:
    """MLP-Mixer of the same size, for digits."""
    return dataclasses.replace(vit_mnist(), name="mixer_mnist", model="mixer", layers="mlp")


def vit_tiny_imagenet() -> VisionRecipe:
    """ViT, 512 wide, patches of 8, for images of 64 pixels."""
    return dataclasses.replace(vit_cifar10(), name="vit_tiny_imagenet", image=64, patch=8, shift=8)


def mixer_tiny_imagenet() -> VisionRecipe:
    """MLP-Mixer, 512 wide, patches of 8, for images of 64 pixels."""
    return dataclasses.replace(mixer_cifar10(), name="mixer_tiny_imagenet", image=64, patch=8, shift=8)


def tiny_vit() -> VisionRecipe:
    """ViT, 64 wide, for a CPU and seconds."""
    return _tiny(dataclasses.replace(vit_cifar10(), heads=4), "tiny_vit")


def tiny_mixer() -> VisionRecipe:
    """MLP-Mixer, 64 wide, for a CPU and seconds."""
    return _tiny(dataclasses.replace(mixer_cifar10(), token_width=32), "tiny_mixer")


def tiny_mnist() -> VisionRecipe:
    """Perceptron, 64 wide, for a CPU and seconds."""
    return _tiny(mnist_mlp(), "tiny_mnist")


def _tiny(recipe: VisionRecipe, name: str) -> VisionRecipe:
    """``recipe`` at a width of 64 and two blocks, on patches of 8, in float32 and not compiled."""
    return dataclasses.replace(
        recipe, name=name, width=64, depth=2, mlp_width=256, patch=8, steps=60, batch=64, lr=3e-3, dtype="float32",
        compile="none", log_every=10, valid_every=20, valid_images=500, checkpoint_every=20,
    )  # fmt: skip
