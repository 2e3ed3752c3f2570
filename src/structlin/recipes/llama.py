"""A decoder as Llama (Touvron et al. 2023) has it: RMS norms, gated MLPs, rotary positions, no biases."""

from __future__ import annotations

from ..train.recipe import Recipe
from .tiny import tiny


def llama_like() -> Recipe:
    """Twelve blocks of 768 features; a gated MLP of 2048 has as many weights as a plain one of 3072."""
    return Recipe(name="llama_like", architecture="llama", mlp_width=2048, tied=False)


def tiny_llama() -> Recipe:
    """A Llama for a CPU and seconds."""
    return tiny(llama_like(), "tiny_llama", mlp_width=192)
