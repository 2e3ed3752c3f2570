"""Training runs by name: Python functions that return a recipe, each named by the model that it trains.

Sizes of language models are the published ones; context, batch and budget are starting points that options change. The
tiny versions train on a CPU in seconds and have everything else that the large ones have.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..problems import ProblemRecipe
from ..train.config import OptionError
from ..train.recipe import Recipe
from ..train.settings import Settings
from .gpt2 import gpt2_medium, gpt2_small, tiny_gpt2
from .llama import llama_like, tiny_llama
from .mri import mri_monarch_sense, mri_unet, tiny_mri
from .opt import opt125m, opt350m, tiny_opt
from .pythia import pythia160m, tiny_pythia

LANGUAGE: dict[str, Callable[[], Recipe]] = {
    make.__name__: make
    for make in (
        opt125m, opt350m, pythia160m, gpt2_small, gpt2_medium, llama_like, tiny_opt, tiny_pythia, tiny_gpt2, tiny_llama
    )
}  # fmt: skip
"""Those of language models by name."""

PROBLEMS: dict[str, Callable[[], ProblemRecipe]] = {
    make.__name__: make for make in (mri_monarch_sense, mri_unet, tiny_mri)
}
"""Those of other problems by name."""

RECIPES: dict[str, Callable[[], Settings]] = {**LANGUAGE, **PROBLEMS}
"""Every recipe by name."""


def find(name: str) -> Settings:
    """The recipe of that name.

    Raises:
        OptionError: for another name, with the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError("RECIPE", f"{name!r} is unknown; {hint}allowed: {', '.join(RECIPES)}")
    return RECIPES[name]()
