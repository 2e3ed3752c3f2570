"""``structlin scaling``: scaling laws of training runs, dense beside structured."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import fail, lacks

DESCRIPTION = (
    "Pool the training curves in RUNS (files of records, or folders of structlin compare and structlin train) over "
    "sizes and seeds, and fit for each structure how the best loss falls with FLOPs. Writes a table, JSON and pictures."
)

NAMES = ("results.json", "record.json")
"""The files of records that folders of runs hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin scaling``."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="files of records, or folders that hold them")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder for the report")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin scaling``; returns 0, 1 where a package is missing or the disk fails, 2 for bad input."""
    if missing := lacks(("scipy", "matplotlib"), "scaling"):
        return fail(missing, 1, "scaling")
    from ..report import records
    from ..scaling import report
    from ..scaling.curves import curves

    try:
        found = [record for run in options.runs for record in records.read(file_of(Path(run)))]
        pooled = curves(found)
        if not pooled:
            raise ValueError(f"{', '.join(options.runs)}: no run ended well; there is nothing to fit")
        rows = report.write(Path(options.out), pooled)
    except ValueError as error:
        return fail(str(error), 2, "scaling")
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}", 1, "scaling")
    print(report.markdown(rows), end="")
    names = [name for name in report.FILES if (Path(options.out) / name).exists()]
    print(f"{options.out}: {', '.join(names)}")
    return 0


def file_of(run: Path) -> Path:
    """The file of records that ``run`` is, or holds.

    Raises:
        ValueError: for a folder without one, or a path where nothing is.
    """
    if run.is_file():
        return run
    for name in NAMES:
        if (run / name).is_file():
            return run / name
    raise ValueError(f"{run} is no file of records and no folder with {' or '.join(NAMES)}")
