"""``structlin describe``: what a structure is, costs and runs, from its description alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..options import check_file, fail, lacks, whole_from

DESCRIPTION = (
    "Print the equation of a structure at a shape, its factors, parameters, FLOPs, bytes, rank, "
    "density, place in the taxonomy, initial scales, learning rates and what runs; nothing is built or measured."
)


MOST = 2**22  # rows or columns; what can be other than zero is counted feature by feature


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin describe``."""
    add = parser.add_argument
    add("spec", metavar="SPEC", help="a structure, as in monarch:nblocks=4 or block_diagonal:nblocks=8+low_rank")
    add("shape", metavar="OUTxIN", help="rows and columns of the matrix, as in 3072x768")
    add(
        "--tokens",
        type=whole_from(1),
        default=1024,
        metavar="N",
        help="rows of the input, for the bytes; default: 1024",
    )
    add("--dtype", default="bfloat16", metavar="NAME", help="of inputs and weights, for the bytes; default: bfloat16")
    add("--png", metavar="FILE.png", help="draw the magnitudes of a random member, so that its pattern shows")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin describe``; returns 0, 1 where a package is missing, 2 for a bad option."""
    if options.png is not None and (missing := lacks(("matplotlib",), "report")):
        return fail(missing, 1, "describe")
    from .. import describe as this
    from ..report.records import write_bytes
    from ..spec import parse

    try:
        shape = re.fullmatch(r"(\d+)x(\d+)", options.shape)
        if shape is None:
            raise ValueError(f"OUTxIN: {options.shape!r} is given; allowed: a shape as in 3072x768")
        check_file("--png", options.png, ".png")
        spec, rows, columns = parse(options.spec), int(shape[1]), int(shape[2])
        if max(rows, columns) > MOST:
            raise ValueError(f"OUTxIN: {options.shape} is given; allowed: up to {MOST} rows and columns")
        text = this.describe(spec, rows, columns, options.tokens, options.dtype)
        if options.png is not None:
            write_bytes(Path(options.png), this.picture(spec, rows, columns))
    except ValueError as error:
        return fail(str(error), 2, "describe")
    except OSError as error:
        return fail(f"--png: {options.png}: {error.strerror or error}", 2, "describe")
    print(text)
    return 0
