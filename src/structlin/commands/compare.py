"""``structlin compare``: dense and structured models trained side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import fail, lacks, number, whole

DESCRIPTION = (
    "Train one small byte-level decoder per structure, on the same batches from the same seed, and "
    "write results.json, curves.png, pareto.png and report.html. The same command goes on after an interrupt."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin compare``."""
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
    add("--steps", type=whole, metavar="N", help="training steps of each structure; default: of the preset")
    add("--seed", type=whole, default=0, metavar="N", help="of weights and batches; default: 0")
    add(
        "--lr",
        type=number,
        metavar="X",
        help="learning rate of a dense layer, from which those of structured layers follow; default: of the preset",
    )
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", default="float32", metavar="float32|bfloat16", help="of the matrix products; default: float32")
    add("--out", metavar="DIR", help="folder for results; default: runs/compare-PRESET")
    add("--json", action="store_true", help="print the records as JSON instead of a table")  # fmt: skip


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin compare``; returns 0, 1 for a run that failed, 2 for a bad option, 130 for an interrupt."""
    if missing := lacks(("rich", "matplotlib", "jinja2"), "report"):
        return fail(missing, 1, "compare")
    from ..train.config import OptionError

    folder = Path(options.out or f"runs/compare-{options.preset}")
    done: list[str] = []
    try:
        ok = _compare(options, command, folder, done)
    except OptionError as error:
        return fail(str(error), 2, "compare")
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        return fail(
            f"{what}; finished structures ({len(done)}) are kept, and the same command goes on from there", 1, "compare"
        )
    except KeyboardInterrupt:
        return fail(f"interrupted with {len(done)} structures finished; to go on: {command}", 130, "compare")
    return 0 if ok else 1


def _compare(options: argparse.Namespace, command: str, folder: Path, done: list[str]) -> bool:
    """Check, train, report; keeps the names of finished structures in ``done``. Whether all of them finished."""
    from rich.console import Console

    from ..report.html import write_report
    from ..report.live import Live, print_table
    from ..train.compare import Event, check_folder, finished
    from ..train.compare import compare as run
    from ..train.config import OptionError, configure
    from ..train.data import read_text

    try:
        text = read_text(options.data)
    except ValueError as error:
        raise OptionError("--data", str(error)) from None
    if options.data and text.skipped:
        print(f"--data: {text.skipped} files are left out, since they hold no text", file=sys.stderr)
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
