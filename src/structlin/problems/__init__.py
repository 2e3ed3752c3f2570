"""What structured layers are trained on beyond text: images, operators of physics, reconstruction of images."""

from .loop import train
from .problem import Batch, Problem, ProblemRecipe

__all__ = ["Batch", "Problem", "ProblemRecipe", "train"]
