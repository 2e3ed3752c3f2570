"""``structlin train``: a recipe by name, any of its fields as options, and the run that they make."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_origin

from ..options import fail, lacks, reason
from ..problems import ProblemRecipe
from ..report.records import Record
from ..train.config import OptionError
from ..train.recipe import Recipe
from ..train.settings import Settings, kinds, option, override
from . import RECIPES, find

DESCRIPTION = (
    "Train the model of a recipe, with a structure in the layers that you choose. Every field of the recipe is an "
    "option. The same command goes on after an interrupt."
)
FIELD = "field_"  # before the name of a field in the namespace, where other options have names too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: one for each field of any recipe, its values taken as text and checked together."""
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="one of --list")
    add("--list", action="store_true", help="print the recipes and end")
    add("--out", metavar="DIR", help="folder of the run; default: runs/train-NAME")
    add("--json", action="store_true", help="print the record as JSON")
    seen: set[str] = set()
    classes: list[type[Settings]] = [Settings, *(type(make()) for make in RECIPES.values())]
    for cls in dict.fromkeys(classes):
        fields = [field for field in dataclasses.fields(cls) if field.name not in seen]
        group = parser.add_argument_group(f"of {cls.TITLE}")
        for field in fields:
            group.add_argument(
                option(field.name),
                dest=FIELD + field.name,
                default=argparse.SUPPRESS,
                metavar=field.name.rpartition("_")[2].upper(),
                nargs="+" if get_origin(kinds(cls)[field.name]) is tuple else None,
                help=field.metadata["help"].replace("%", "%%"),
            )
        seen |= {field.name for field in fields}


def main(options: argparse.Namespace, command: str) -> int:
    """Run what the command line says; returns the exit status."""
    if options.list:
        print(table())
        return 0
    folder = Path(options.out or f"runs/train-{options.recipe}")
    try:
        if options.recipe is None:
            raise OptionError("RECIPE", f"is not given; allowed: {', '.join(RECIPES)}")
        given = {name.removeprefix(FIELD): text for name, text in vars(options).items() if name.startswith(FIELD)}
        recipe = override(find(options.recipe), given)
        if missing := lacks(recipe.packages, "problems" if isinstance(recipe, ProblemRecipe) else "train"):
            return fail(missing, 1, "train")
        folder = Path(options.out or f"runs/train-{recipe.name}")
        record = run(recipe, folder, command)
    except OptionError as error:
        return fail(str(error), 2, "train")
    except OSError as error:
        kept = "; the last checkpoint is kept, and the same command goes on from it" if has_checkpoint(folder) else ""
        return fail(f"{reason(error)}{kept}", 1, "train")
    except KeyboardInterrupt:
        return fail(f"interrupted; to go on from the last checkpoint: {command}", 130, "train")
    if not first_process(recipe):
        pass
    elif options.json:
        print(json.dumps(record, indent=1))
    else:
        print(summary(record, folder))
    return 0 if record["status"] == "ok" else 1


def has_checkpoint(folder: Path) -> bool:
    """Whether a run left something in ``folder`` to go on from."""
    return (folder / "checkpoint.safetensors").exists() or any(folder.glob("checkpoints/*"))


def run(recipe: Settings, folder: Path, command: str) -> Record:
    """Train it in ``folder``; what is said of progress goes to the standard error output."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if isinstance(recipe, ProblemRecipe):
        from ..problems import train

        return train(recipe, folder, command, say)
    from ..train import loop

    assert isinstance(recipe, Recipe)
    return loop.train(recipe, folder, command, say)


def first_process(recipe: Settings) -> bool:
    """Whether this process is the one that speaks."""
    if isinstance(recipe, ProblemRecipe):
        return True
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def table() -> str:
    """The recipes, a line each: name, updates, and what they are."""
    rows = [("recipe", "updates", "")]
    rows += [(name, str(make().steps), (make.__doc__ or "").splitlines()[0]) for name, make in RECIPES.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(record: Any, folder: Path) -> str:
    """What came out, in two lines."""
    if record["status"] == "failed":
        return f"{record['name']}: failed: {record['error']}\n{folder}: record.json"
    metrics, structure = record["metrics"], record["config"]["structure"]
    if "tokens_per_second" in metrics:
        bits = metrics["bits_per_byte"]
        unit = "per hidden token" if bits is None else f"{bits:.4f} bits per byte"
        said = (
            f"validation loss {metrics['valid_loss']:.4f} ({unit}) after {metrics['tokens']:,} tokens, "
            f"{metrics['tokens_per_second']:,.0f} tokens/s"
        )
        files = "run.json, record.json, tokenizer.json, model, checkpoints"
    else:
        measured = list(metrics)[list(metrics).index("peak_memory_bytes") + 1 :]
        values = ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in measured)
        said = f"{values} after {metrics['steps']:,} updates of {1e3 * metrics['step_seconds']:.1f} ms"
        files = "run.json, record.json, model, checkpoint.safetensors"
        files += ", picture.png" if (folder / "picture.png").exists() else ""
    return f"{record['name']}, {structure}: {said}, {metrics['model_params']:,} parameters\n{folder}: {files}"
