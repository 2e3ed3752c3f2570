"""Accelerated magnetic resonance imaging: simulated and measured coils, SENSE, and models that reconstruct."""

from .models import MonarchSense, UNet
from .recipe import MriRecipe

__all__ = ["MonarchSense", "MriRecipe", "UNet"]
