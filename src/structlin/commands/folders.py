"""What ``structlin convert`` and ``structlin densify`` share: the folders that they take, and what they print."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..options import fail, lacks, reason, whole_from


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Declare SRC, DST and the size of a part."""
    parser.add_argument("source", metavar="SRC", help="folder that save_pretrained wrote, with safetensors")
    parser.add_argument("target", metavar="DST", help="folder to make; one that exists is never overwritten")
    about = "MB of SRC that go into one file of DST; about twice that is held in memory; default: 1024"
    parser.add_argument("--part-mb", type=whole_from(1), default=1024, metavar="N", help=about)


def part_bytes(options: argparse.Namespace) -> int:
    """Bytes of a part."""
    return int(options.part_mb) << 20


def tell(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def guarded(name: str, command: str, work: Any) -> int:
    """Run ``work`` and turn what it raises into one message and an exit status."""
    if missing := lacks(("transformers", "accelerate"), "hf"):
        return fail(missing, 1, name)
    try:
        work()
    except ValueError as error:
        return fail(str(error), 2, name)
    except OSError as error:
        return fail(f"{reason(error)}; finished parts are kept, and the same command goes on from there", 1, name)
    except KeyboardInterrupt:
        return fail(f"interrupted; finished parts are kept, to go on: {command}", 130, name)
    return 0
