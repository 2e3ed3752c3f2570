"""Training runs by name: Python functions that return a recipe, each named by the model that it trains.

Sizes of language models are the published ones; context, batch and budget are starting points that options change. The
tiny versions train on a CPU in seconds and have everything else that the large ones have.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from inspect import isfunction
from types import ModuleType
from typing import Any

from ..problems import ProblemRecipe
from ..train.config import OptionError
from ..train.recipe import Recipe
from ..train.settings import Settings
from . import bert, gpt2, llama, mri, operators, opt, pythia, vision


def _made_in(*modules: ModuleType) -> dict[str, Any]:
    """The recipes of modules by name: every public function that stands there makes one."""
    return {
        name: make
        for module in modules
        for name, make in vars(module).items()
        if isfunction(make) and make.__module__ == module.__name__ and not name.startswith("_")
    }


LANGUAGE: dict[str, Callable[[], Recipe]] = _made_in(opt, pythia, gpt2, llama, bert)
"""Those of language models by name."""

PROBLEMS: dict[str, Callable[[], ProblemRecipe]] = _made_in(vision, operators, mri)
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
