"""``structlin train``: a recipe by name, any of its fields as options, and the run that they make."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_origin

from ..options import fail, lacks
from ..train.config import OptionError
from ..train.recipe import Recipe, kinds, option, override
from . import RECIPES, find

PACKAGES = ("transformers", "accelerate", "tokenizers")
DESCRIPTION = (
    "Train the decoder of a recipe, with a structure in the layers that you choose. Every field of the recipe is an "
    "option. The same command goes on after an interrupt."
)
FIELD = "field_"  # before the name of a field in the namespace, where other options have names too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: one for each field of a `Recipe`, its values taken as text and checked together."""
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="one of --list")
    add("--list", action="store_true", help="print the recipes and end")
    add("--out", metavar="DIR", help="folder of the run; default: runs/train-NAME")
    add("--json", action="store_true", help="print the record as JSON")
    fields = parser.add_argument_group("fields of the recipe")
    for field in dataclasses.fields(Recipe):
        many = get_origin(kinds()[field.name]) is tuple
        fields.add_argument(
            option(field.name),
            dest=FIELD + field.name,
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            nargs="+" if many else None,
            help=field.metadata["help"].replace("%", "%%"),
        )


def main(options: argparse.Namespace, command: str) -> int:
    """Run what the command line says; returns the exit status."""
    if options.list:
        print(table())
        return 0
    if missing := lacks(PACKAGES, "train"):
        return fail(missing, 1, "train")
    from ..train.loop import train

    try:
        if options.recipe is None:
            raise OptionError("RECIPE", f"is not given; allowed: {', '.join(RECIPES)}")
        given = {name.removeprefix(FIELD): text for name, text in vars(options).items() if name.startswith(FIELD)}
        recipe = override(find(options.recipe), given)
        folder = Path(options.out or f"runs/train-{recipe.name}")
        record = train(recipe, folder, command, lambda line: print(line, file=sys.stderr, flush=True))
    except OptionError as error:
        return fail(str(error), 2, "train")
    except OSError as error:
        what = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        return fail(f"{what}; the last checkpoint is kept, and the same command goes on from it", 1, "train")
    except KeyboardInterrupt:
        return fail(f"interrupted; to go on from the last checkpoint: {command}", 130, "train")
    from accelerate import PartialState

    if not PartialState().is_main_process:
        pass
    elif options.json:
        print(json.dumps(record, indent=1))
    else:
        print(summary(record, folder))
    return 0 if record["status"] == "ok" else 1


def table() -> str:
    """The recipes, a line each: name, sizes, and what they are."""
    rows: list[tuple[str, ...]] = [("recipe", "model", "width", "blocks", "context", "updates", "")]
    for name, make in RECIPES.items():
        recipe = make()
        sizes = (recipe.width, recipe.depth, recipe.context, recipe.steps)
        rows.append((name, recipe.architecture, *map(str, sizes), (make.__doc__ or "").splitlines()[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(record: Any, folder: Path) -> str:
    """What came out, in two lines."""
    if record["status"] == "failed":
        return f"{record['name']}: failed: {record['error']}\n{folder}: record.json"
    metrics = record["metrics"]
    bits = metrics["bits_per_byte"]
    unit = "per hidden token" if bits is None else f"{bits:.4f} bits per byte"
    return (
        f"{record['name']}, {record['config']['structure']}: validation loss {metrics['valid_loss']:.4f} "
        f"({unit}) after {metrics['tokens']:,} tokens, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['model_params']:,} parameters\n"
        f"{folder}: run.json, record.json, tokenizer.json, model, checkpoints"
    )
