"""``structlin search``: candidates trained under one budget, in a study that can be stopped and gone on with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import fail, lacks, number, whole
from ..report.records import Record

DESCRIPTION = (
    "Train a small model with one structure after another, each sized to the same budget, and write results.json and "
    "report.html. The same command goes on after an interrupt; a larger --trials adds to what is there."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin search``."""
    add = parser.add_argument
    add(
        "--task", default="teacher", metavar="NAME", help="teacher, pixels, characters, bpe or images; default: teacher"
    )
    add("--preset", default="small", metavar="smoke|small|large", help="sizes of the task; default: small")
    add("--data", nargs="+", default=[], metavar="PATH", help="text, or one folder of images, as the task needs")
    add(
        "--space",
        metavar="LIST",
        help="families, comma separated, values of a parameter with slashes between, as in "
        "einsum,monarch:nblocks=4/8,head_btt:rank=1/2; einsum is the continuous space; default: of the preset",
    )
    add("--sampler", default="grid", metavar="grid|random|tpe|cmaes", help="how candidates are chosen; default: grid")
    add("--trials", type=whole, metavar="N", help="default: the whole grid, or 24 of a sampler that draws")
    add("--equal", default="flops", metavar="flops|seconds|params", help="budget of every trial; default: flops")
    add("--budget", type=number, metavar="X", help="FLOPs, seconds or parameters; default: what the dense model takes")
    add("--grow", default="width", metavar="width|steps", help="what savings go into; default: width")
    add(
        "--minimise",
        default="loss",
        metavar="LIST",
        help="loss, and with it params, flops, seconds or memory, for a sampler of several objectives; default: loss",
    )
    add("--halving", action="store_true", help="stop the worse half early, again and again (successive halving)")
    add("--steps", type=whole, metavar="N", help="of the dense model; default: of the preset")
    add("--lr", type=number, metavar="X", help="rate of a dense layer at the task's width; default: of the preset")
    add("--seed", type=whole, default=0, metavar="N", help="of weights, batches and samplers; default: 0")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")
    add("--ray", metavar="local|ADDRESS", help="train in parallel on a Ray cluster; default: here, one after the other")
    add("--share", type=number, default=1.0, metavar="X", help="CPU threads or GPUs of a trial; default: 1")
    add("--storage", metavar="URL", help="database of the study, as sqlite:///search.db; default: a journal in --out")
    add("--out", metavar="DIR", help="folder for results; default: runs/search-TASK-PRESET")
    add("--json", action="store_true", help="print the records as JSON instead of a table")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin search``; returns 0, 1 for a search that failed, 2 for a bad option, 130 for an interrupt."""
    for packages, extra in ((("optuna",), "search"), (("rich", "matplotlib", "jinja2"), "report")):
        if missing := lacks(packages, extra):
            return fail(missing, 1, "search")
    from ..search.study import SearchError
    from ..train.config import OptionError

    folder = Path(options.out or f"runs/search-{options.task}-{options.preset}")
    try:
        _search(options, command, folder)
    except OptionError as error:
        return fail(str(error), 2, "search")
    except SearchError as error:
        return fail(f"{error}; the same command tries again", 1, "search")
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        return fail(f"{what}; finished trials are kept, and the same command goes on", 1, "search")
    except KeyboardInterrupt:
        return fail(f"interrupted; finished trials are kept; to go on: {command}", 130, "search")
    return 0


def _search(options: argparse.Namespace, command: str, folder: Path) -> None:
    """Check, search, report."""
    from ..report import records
    from ..report.search import write_search
    from ..search.config import configure
    from ..search.runners import InProcess, OnRay
    from ..search.study import SearchError, Study, open_storage
    from ..train.compare import CONFIG
    from ..train.config import OptionError
    from ..train.folder import RUN, check_writable, locked

    names = ("task", "preset", "space", "sampler", "minimise", "equal", "grow", "budget", "trials", "halving", "seed",
             "steps", "lr", "device", "share")  # fmt: skip
    config = configure(data=tuple(options.data), **{name: getattr(options, name) for name in names})
    if options.ray and config.equal == "seconds" and config.device == "cpu":
        raise OptionError("--ray", "trials that share a CPU disturb each other's clock; allowed at equal seconds: GPUs")
    check_writable(folder)
    if any((folder / name).exists() for name in (RUN, CONFIG)):
        raise OptionError("--out", f"{folder} holds a run of structlin train or compare; choose another folder")
    config.load()
    with locked(folder):
        study = Study(config, open_storage(folder, options.storage), folder.name, command)
        runner = OnRay(options.ray, config.device, config.share) if options.ray else InProcess()

        def write() -> None:
            records.write(folder / "results.json", study.records())
            write_search(folder, study.records())

        results = study.run(runner, lambda line: print(line, file=sys.stderr, flush=True), write)
        write()
        if len(results) > 1 and all(record["status"] != "ok" for record in results[1:]):
            raise SearchError(f"every trial failed, as {results[1]['name']}: {results[1]['error']}")
    if options.json:
        print((folder / "results.json").read_text(encoding="utf-8"), end="")
    else:
        _show(results, folder)


def _show(results: list[Record], folder: Path) -> None:
    """The table, the frontier and where the rest is."""
    from rich.console import Console
    from rich.table import Table

    from ..report.search import HEADERS, cost, frontier, rows, summary

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    print(summary(results))
    metric = cost(results)
    best = [f"{record['name']} ({record['metrics']['valid_loss']:.4f})" for record in frontier(results, metric)]
    print(f"frontier of loss and {metric}: {', '.join(best)}")
    print(f"{folder}: results.json, report.html")
