"""The ``structlin`` command. Each sub-command is a function that imports what it needs, so that one does not pay, or
fail, for another."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from .version import __version__


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default that of the process); returns the exit status.

    0 is success, 1 a run that failed, 2 a bad option, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="structlin", description="Structured linear layers for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"structlin {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="command", required=True)
    add_compare(commands)
    add_bench(commands)
    add_describe(commands)
    add_train(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options, shlex.join(["structlin", *arguments]))
    return status


def add_compare(commands: Any) -> None:
    """Declare ``structlin compare``."""
    parser = commands.add_parser(
        "compare",
        help="train a small decoder per structure on the same text and compare loss, size, FLOPs, time and memory",
        description="Train one small byte-level decoder per structure, on the same batches from the same seed, and "
        "write results.json, curves.png, pareto.png and report.html. The same command goes on after an interrupt.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=compare)
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files, folders of text, .jsonl files with a text field, each also as .xz; "
        "default: the source of Python's standard library",
    )
    add(
        "--structures",
        metavar="LIST",
        help="comma separated, parameters joined by colons, as in dense,monarch:nblocks=4,dyad:nblocks=8:variant=ot; "
        "default: dense and six others",
    )
    add(
        "--where",
        default="mlp",
        metavar="mlp|all|GLOB",
        help="layers to replace: mlp, all of the blocks, or a glob over names such as blocks.0.attn.qkv; default: mlp",
    )
    add("--preset", default="small", metavar="smoke|small", help="model and budget; default: small")
    add("--steps", type=_whole, metavar="N", help="training steps of each structure; default: of the preset")
    add("--seed", type=_whole, default=0, metavar="N", help="of weights and batches; default: 0")
    add(
        "--lr",
        type=_number,
        metavar="X",
        help="learning rate of a dense layer, from which those of structured layers follow; default: of the preset",
    )
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", default="float32", metavar="float32|bfloat16", help="of the matrix products; default: float32")
    add("--out", metavar="DIR", help="folder for results; default: runs/compare-PRESET")
    add("--json", action="store_true", help="print the records as JSON instead of a table")  # fmt: skip


def add_bench(commands: Any) -> None:
    """Declare ``structlin bench``."""
    from .bench import cli

    parser = commands.add_parser(
        "bench",
        help="measure layers: shapes x structures x backends, checked against float64, timed against dense",
        description="Check and time structured layers by every backend, forward and forward+backward, against torch's "
        "dense layer, in one run; print a table and write records and a picture.",
        allow_abbrev=False,
    )
    cli.add_arguments(parser)
    parser.set_defaults(run=cli.main)


def add_describe(commands: Any) -> None:
    """Declare ``structlin describe``."""
    parser = commands.add_parser(
        "describe",
        help="what a structure at a shape is, costs and runs, from its description alone",
        description="Print the equation of a structure at a shape, its factors, parameters, FLOPs, bytes, rank, "
        "density, place in the taxonomy, initial scales, learning rates and what runs; nothing is built or measured.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=describe)
    add = parser.add_argument
    add("spec", metavar="SPEC", help="a structure, as in monarch:nblocks=4 or block_diagonal:nblocks=8+low_rank")
    add("shape", metavar="OUTxIN", help="rows and columns of the matrix, as in 3072x768")
    add("--tokens", type=_whole, default=1024, metavar="N", help="rows of the input, for the bytes; default: 1024")
    add("--dtype", default="bfloat16", metavar="NAME", help="of inputs and weights, for the bytes; default: bfloat16")
    add("--png", metavar="FILE.png", help="draw the magnitudes of a random member, so that its pattern shows")


def add_train(commands: Any) -> None:
    """Declare ``structlin train``."""
    from .recipes import command

    parser = commands.add_parser(
        "train",
        help="pretrain a language model from a recipe, dense or structured, on your text",
        description="Train the decoder of a recipe, with a structure in the layers that you choose. Every field of the "
        "recipe is an option. The same command goes on after an interrupt.",
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.main)


def describe(options: argparse.Namespace, command: str) -> int:
    """``structlin describe``: see `add_describe`."""
    if options.png is not None and find_spec("matplotlib") is None:
        return _fail("needs matplotlib; install with: pip install 'structlin[report]'", 1, "describe")
    from . import describe as this
    from .report.records import write_bytes
    from .spec import parse

    try:
        shape = re.fullmatch(r"(\d+)x(\d+)", options.shape)
        if shape is None:
            raise ValueError(f"OUTxIN: {options.shape!r} is given; allowed: a shape as in 3072x768")
        if options.png is not None and Path(options.png).suffix != ".png":
            raise ValueError(f"--png: {options.png} is given; allowed: a path that ends in .png")
        spec, rows, columns = parse(options.spec), int(shape[1]), int(shape[2])
        text = this.describe(spec, rows, columns, options.tokens, options.dtype)
        if options.png is not None:
            write_bytes(Path(options.png), this.picture(spec, rows, columns))
    except ValueError as error:
        return _fail(str(error), 2, "describe")
    except OSError as error:
        return _fail(f"--png: {options.png}: {error.strerror or error}", 2, "describe")
    print(text)
    return 0


def compare(options: argparse.Namespace, command: str) -> int:
    """``structlin compare``: see `add_compare`."""
    missing = [name for name in ("rich", "matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        return _fail(f"needs {', '.join(missing)}; install with: pip install 'structlin[report]'", 1)
    from .train.config import OptionError

    folder = Path(options.out or f"runs/compare-{options.preset}")
    done: list[str] = []
    try:
        ok = _compare(options, command, folder, done)
    except OptionError as error:
        return _fail(str(error), 2)
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        return _fail(f"{what}; finished structures ({len(done)}) are kept, and the same command goes on from there", 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted with {len(done)} structures finished; to go on: {command}", 130)
    return 0 if ok else 1


def _compare(options: argparse.Namespace, command: str, folder: Path, done: list[str]) -> bool:
    """Check, train, report; keeps the names of finished structures in ``done``. Whether all of them finished."""
    from rich.console import Console

    from .report.html import write_report
    from .report.live import Live, print_table
    from .train.compare import Event, check_folder, finished
    from .train.compare import compare as run
    from .train.config import OptionError, configure
    from .train.data import read_text

    try:
        text = read_text(options.data)
    except ValueError as error:
        raise OptionError("--data", str(error)) from None
    names = ("structures", "where", "preset", "steps", "seed", "lr", "device", "dtype")
    config = configure(text, **{name: getattr(options, name) for name in names})
    check_folder(folder, config)
    done += finished(folder)
    with Live(Console(stderr=True), config.structures, done, config.steps) as live:

        def watch(event: Event) -> None:
            live.update(event.structure, event.values)
            if event.values.get("record", {}).get("status") == "ok":
                done.append(event.structure)

        results = run(config, text, folder, command, watch)
    write_report(folder, results)
    if options.json:
        print((folder / "results.json").read_text(encoding="utf-8"), end="")
    else:
        print_table(Console(width=None if sys.stdout.isatty() else 100), results)
        print(f"{folder}: results.json, curves.png, pareto.png, report.html")
    return all(record["status"] == "ok" for record in results)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: whole numbers") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: numbers") from None


def _fail(message: str, status: int, name: str = "compare") -> int:
    print(f"structlin {name}: error: {message}", file=sys.stderr)
    return status
