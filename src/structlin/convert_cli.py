"""``structlin convert`` and ``structlin densify``: their options, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .spec import Spec, parse


def add(commands: Any) -> None:
    """Declare both commands."""
    parser = commands.add_parser(
        "convert",
        help="give a Hugging Face model folder structured layers",
        description="Write the model in SRC with structured layers into the new folder DST, one layer at a time. After "
        "an interrupt the same command goes on. `import structlin.hf` loads the result.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=convert)
    _add_folders(parser)
    add = parser.add_argument
    add("--rules", nargs="+", required=True, metavar="RULE",
        help="glob over layers and spec, as in '*.mlp.*=monarch:nblocks=4', or 'lm_head=none' to keep one dense, or a "
        "JSON file of an object from globs to specs or null; the first that matches wins")  # fmt: skip
    add("--weights", default="project", metavar="project|init",
        help="project: nearest to the dense weights; init: drawn anew; default: project")  # fmt: skip
    add("--calibrate", nargs="+", metavar="FILE", help="texts: fit the layers to the inputs that they see on these")
    add("--calibrate-tokens", type=int, default=2048, metavar="N", help="of these texts; default: 2048")
    add("--seed", type=int, default=0, metavar="N", help="of weights that are drawn; default: 0")
    add("--dry-run", action="store_true", help="print the table, with the errors, and write nothing")

    parser = commands.add_parser(
        "densify",
        help="turn the structured layers of a Hugging Face model folder into dense ones of the same function",
        description="Write the structured model in SRC with dense layers into the new folder DST, which transformers "
        "loads without structlin. After an interrupt the same command goes on.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=densify)
    _add_folders(parser)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder that save_pretrained wrote, with safetensors")
    parser.add_argument("target", metavar="DST", help="folder to make; one that exists is never overwritten")
    about = "MB of SRC that go into one file of DST; about twice that is held in memory; default: 1024"
    parser.add_argument("--part-mb", type=int, default=1024, metavar="N", help=about)


def convert(options: argparse.Namespace, command: str) -> int:
    """``structlin convert``: see `add`. Returns 0, 1 where the machine fails, 2 for bad input, 130 when interrupted."""

    def work() -> None:
        from .hf import convert as run
        from .hf.calibrate import text_inputs

        rules = read_rules(options.rules)
        inputs = None
        if options.calibrate:
            inputs = text_inputs(options.source, rules, options.calibrate, options.calibrate_tokens)
        done = run(
            options.source, options.target, rules, options.weights, inputs=inputs, seed=options.seed,
            dry_run=options.dry_run, part_bytes=_part_bytes(options), tell=_tell,
        )  # fmt: skip
        print(done)
        if not options.dry_run:
            print(f"{options.target}: load it with transformers after `import structlin.hf`")

    return _guarded("convert", command, work)


def densify(options: argparse.Namespace, command: str) -> int:
    """``structlin densify``: see `add`. Returns as `convert`."""

    def work() -> None:
        from .hf import densify as run

        names = run(options.source, options.target, part_bytes=_part_bytes(options), tell=_tell)
        print(f"{options.target}: {len(names)} layers made dense")

    return _guarded("densify", command, work)


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
            try:
                rules[key] = parse(value) if isinstance(value, str) else value and Spec.from_dict(value)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"--rules: {key!r}: {error}") from None
    return rules


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--rules: {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--rules: {path} holds no JSON object of globs and specs")
    return list(values.items())


def _part_bytes(options: argparse.Namespace) -> int:
    if options.part_mb < 1:
        raise ValueError(f"--part-mb: {options.part_mb} is given; allowed: 1 or more")
    return int(options.part_mb) << 20


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _guarded(name: str, command: str, work: Any) -> int:
    """Run ``work`` and turn what it raises into one message and an exit status."""
    if missing := [package for package in ("transformers", "accelerate") if find_spec(package) is None]:
        return _fail(name, f"needs {', '.join(missing)}; install with: pip install 'structlin[hf]'", 1)
    try:
        work()
    except ValueError as error:
        return _fail(name, str(error), 2)
    except OSError as error:
        what = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        return _fail(name, f"{what}; finished parts are kept, and the same command goes on from there", 1)
    except KeyboardInterrupt:
        return _fail(name, f"interrupted; finished parts are kept, to go on: {command}", 130)
    return 0


def _fail(name: str, message: str, status: int) -> int:
    print(f"structlin {name}: error: {message}", file=sys.stderr)
    return status
