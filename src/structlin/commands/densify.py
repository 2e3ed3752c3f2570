"""``structlin densify``: a structured Hugging Face model folder made dense again."""

from __future__ import annotations

import argparse

from .folders import add_folders, guarded, part_bytes, tell

DESCRIPTION = (
    "Write the structured model in SRC with dense layers into the new folder DST, which transformers "
    "loads without structlin. After an interrupt the same command goes on."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin densify``."""
    add_folders(parser)


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin densify``; returns as ``structlin convert``."""

    def work() -> None:
        from ..hf import densify as run

        names = run(options.source, options.target, part_bytes=part_bytes(options), tell=tell)
        print(f"{options.target}: {len(names)} layers made dense")

    return guarded("densify", command, work)
