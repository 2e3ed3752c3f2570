"""Classification of images: a vision transformer, an MLP-Mixer and a perceptron, dense or structured."""

from .recipe import VisionRecipe

__all__ = ["VisionRecipe"]
