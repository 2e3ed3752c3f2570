"""Pythia (Biderman et al. 2023): GPT-NeoX, attention beside the MLP, rotary positions, untied embeddings."""

from __future__ import annotations

from ..train.recipe import Recipe
from .tiny import tiny


def pythia160m() -> Recipe:
    """Pythia-160m, with a context of 1024; DYAD (Chandy et al. 2023) replaces its MLPs."""
    return Recipe(name="pythia160m", architecture="gpt_neox", tied=False)


def tiny_pythia() -> Recipe:
    """Pythia for a CPU and seconds."""
    return tiny(pythia160m(), "tiny_pythia")
