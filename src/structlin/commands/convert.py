"""``structlin convert``: a Hugging Face model folder made structured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..options import whole_from
from ..spec import Spec, parse
from .folders import add_folders, guarded, part_bytes, tell

DESCRIPTION = (
    "Write the model in SRC with structured layers into the new folder DST, one layer at a time. After "
    "an interrupt the same command goes on. `import structlin.hf` loads the result."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin convert``."""
    add_folders(parser)
    add = parser.add_argument
    add("--rules", nargs="+", required=True, metavar="RULE",
        help="glob over layers and spec, as in '*.mlp.*=monarch:nblocks=4', or 'lm_head=none' to keep one dense, or a "
        "JSON file of an object from globs to specs or null; the first that matches wins")  # fmt: skip
    add("--weights", default="project", metavar="project|init",
        help="project: nearest to the dense weights; init: drawn anew; default: project")  # fmt: skip
    add("--calibrate", nargs="+", metavar="FILE", help="texts: fit the layers to the inputs that they see on these")
    add("--calibrate-tokens", type=whole_from(1), default=2048, metavar="N", help="of these texts; default: 2048")
    add("--seed", type=whole_from(0), default=0, metavar="N", help="of weights that are drawn; default: 0")
    add("--dry-run", action="store_true", help="print the table, with the errors, and write nothing")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin convert``; returns 0, 1 where the machine fails, 2 for bad input, 130 when interrupted."""

    def work() -> None:
        from ..hf import convert as run
        from ..hf.calibrate import text_inputs

        rules = read_rules(options.rules)
        inputs = None
        if options.calibrate:
            inputs = text_inputs(options.source, rules, options.calibrate, options.calibrate_tokens)
        done = run(
            options.source, options.target, rules, options.weights, inputs=inputs, seed=options.seed,
            dry_run=options.dry_run, part_bytes=part_bytes(options), tell=tell,
        )  # fmt: skip
        print(done)
        if not options.dry_run:
            print(f"{options.target}: load it with transformers after `import structlin.hf`")

    return guarded("convert", command, work)


def read_rules(given: list[str]) -> dict[str, Spec | None]:
    """Glob -> spec, or None to keep a layer dense, from the command line.

    Args:
        given: each ``glob=spec``, where the spec ``none`` keeps layers dense, or the path of a JSON file: an object
            whose values are specs as text, as objects of `Spec.to_dict`, or null.

    Raises:
        ValueError: for what is neither, an unknown spec, or a glob that is given twice.
    """
    rules: dict[str, Spec | None] = {}
    for text in given:
        glob, equals, spec = text.partition("=")
        if text.endswith(".json") and not equals:
            pairs = _read_json(Path(text))
        elif glob and equals:
            pairs = [(glob, None if spec == "none" else spec)]
        else:
            raise ValueError(
                f"--rules: {text!r} is given; allowed: 'glob=spec', 'glob=none' or a path that ends in .json"
            )
        for key, value in pairs:
            if key in rules:
                raise ValueError(f"--rules: {key!r} is given twice")
            if not isinstance(value, (str, dict, type(None))):
                raise ValueError(
                    f"--rules: {key!r}: {value!r} is given; allowed: a spec as text or as an object, or null"
                )
            try:
                rules[key] = (
                    parse(value) if isinstance(value, str) else None if value is None else Spec.from_dict(value)
                )
            except ValueError as error:
                raise ValueError(f"--rules: {key!r}: {error}") from None
    return rules


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice))} is given twice")
    return dict(pairs)


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        # pairs, so that a glob that is there twice is seen; a dict only holds the last
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise ValueError(f"--rules: {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--rules: {path} holds no JSON object of globs and specs")
    return list(values.items())
