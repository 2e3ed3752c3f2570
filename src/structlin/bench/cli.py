"""``structlin bench``: options in, table, records and picture out."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..machine import describe_device
from ..options import fail, whole
from ..report import records as store
from ..report.records import Record
from . import plot, show
from .contenders import NAMES
from .problems import PRESETS
from .run import run
from .settings import DEFAULT_DTYPE, DEFAULT_TOKENS, DTYPES, Settings, configure

DESCRIPTION = (
    "Check and time structured layers by every backend, forward and forward+backward, against torch's "
    "dense layer, in one run; print a table and write records and a picture."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin bench``."""
    add: Callable[..., Any] = parser.add_argument
    add("--preset", metavar="|".join(PRESETS), help="problems to measure; default: smoke")
    add(
        "--problem",
        action="append",
        default=[],
        metavar="SPEC@OUTxIN",
        help="a structure at a shape, as in monarch:nblocks=4@3072x768, or a transformer block of a width and context, "
        "as in 'block monarch:nblocks=8@768x1024', in place of a preset; may be repeated",
    )
    add("--tokens", type=whole, metavar="N", help=f"rows of the input; default: {_defaults(DEFAULT_TOKENS)}")
    add("--dtype", metavar="|".join(DTYPES), help=f"of inputs and weights; default: {_defaults(DEFAULT_DTYPE)}")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")
    add(
        "--backends",
        metavar="LIST",
        help=f"comma separated, of {', '.join(NAMES)}; linear always runs; default: all that run there, without "
        "compiled on a CPU",
    )
    add("--repeats", type=whole, default=10, metavar="N", help="samples of each time; default: 10")
    add("--seed", type=whole, default=0, metavar="N", help="of weights and inputs; default: 0")
    add("--only-forward", action="store_true", help="leave out forward+backward")
    add("--out", metavar="FILE.json", help="default: results/bench-PRESET-DEVICE.json; the picture goes beside it")
    add("--json", action="store_true", help="print the records as JSON instead of a table")
    add("--plot", metavar="FILE.json", help="measure nothing: print the table and draw the picture of these records")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin bench``; returns 0, 1 when something was wrong or could not run, 2 for a bad option."""
    try:
        names = ("preset", "problem", "tokens", "dtype", "device", "backends", "repeats", "seed", "only_forward")
        if options.plot is not None:
            defaults = {"problem": [], "repeats": 10, "seed": 0, "only_forward": False}
            for name in (*names, "out"):
                if getattr(options, name) != defaults.get(name):
                    raise ValueError(f"--plot: measures nothing and leaves no room for --{name.replace('_', '-')}")
            return _again(Path(options.plot), options.json)
        settings = configure(**{name: getattr(options, name) for name in names})
        out = Path(options.out) if options.out else default_path(settings)
        check_path(out, settings)
    except ValueError as error:
        return fail(str(error), 2, "bench")
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}", 2, "bench")
    found: list[Record] = []
    try:
        _measure(settings, command, out, found)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}; {len(found)} records are lost or incomplete", 1, "bench")
    except KeyboardInterrupt:
        return fail(f"interrupted; {out} holds {len(found)} records", 130, "bench")
    _report(found, out, options.json)
    return 1 if any(record["status"] == "failed" for record in found) else 0


def default_path(settings: Settings) -> Path:
    """``results/bench-PRESET-DEVICE.json``."""
    name = "cpu"
    if settings.device != "cpu":
        name = re.sub(r"[^a-z0-9]+", "-", describe_device(torch.device(settings.device))["name"].lower()).strip("-")
    return Path("results") / f"bench-{settings.preset}-{name}.json"


def check_path(out: Path, settings: Settings) -> None:
    """See that ``out`` does not hold the records of a run with other settings, and make its folder.

    Raises:
        ValueError: when it does, or is no file of records, or does not end in .json.
        OSError: when the folder cannot be made.
    """
    if out.suffix != ".json":
        raise ValueError(f"--out: {out} is given; allowed: a path that ends in .json")
    if out.exists():
        try:
            before = store.read(out)
        except ValueError as error:
            raise ValueError(f"--out: {error}; choose another file") from None
        ours = [
            settings.config(problem, name)
            for problem in settings.problems
            for name in problem.contenders(settings.backends)
        ]
        for record in before:
            config = {key: value for key, value in record["config"].items() if key != "graph"}
            if config not in ours:
                raise ValueError(f"--out: {out} holds a run with other settings; choose another file or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _measure(settings: Settings, command: str, out: Path, found: list[Record]) -> None:
    begin = time.monotonic()
    for index, records in enumerate(run(settings, command), 1):
        found += records
        store.write(out, found)
        failed = sum(record["status"] == "failed" for record in records)
        note = f", {failed} failed" if failed else ""
        done = f"{index}/{len(settings.problems)} {records[0]['config']['problem']}"
        print(f"{done}: {time.monotonic() - begin:.1f} s{note}", file=sys.stderr, flush=True)


def _again(path: Path, as_json: bool) -> int:
    found = [record for record in store.read(path) if record["kind"] == "bench"]
    if not found:
        raise ValueError(f"--plot: {path} holds no records of structlin bench")
    _report(found, path, as_json)
    return 0


def _report(found: Sequence[Record], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema": store.SCHEMA, "version": store.VERSION, "records": found}, indent=1))
    else:
        failures = [(line, "red") for line in show.failures(found)]
        break_even = [(line, "") for line in show.break_even(found)]
        show.show([(show.head(found), ""), *show.table(found), ("", ""), *failures, *break_even])
    written = [str(out), *_draw(found, out.with_suffix(".png"))]
    print(f"wrote {', '.join(written)}", file=sys.stderr)


def _draw(found: Sequence[Record], path: Path) -> list[str]:
    if find_spec("matplotlib") is None:
        print(
            f"no picture: matplotlib is not installed; where it is, structlin bench --plot {path.with_suffix('.json')}",
            file=sys.stderr,
        )
        return []
    if not plot.speedups(found)[1]:
        return []
    store.write_bytes(path, plot.draw(found))
    return [str(path)]


def _defaults(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} on {'a GPU' if device == 'cuda' else 'a CPU'}" for device, value in values.items())
