"""The ``structlin`` command: a table of sub-commands, each a module that is imported only when its name is given, so
that one does not pay, or fail, for another."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import NoReturn

from .options import fail, reason
from .version import __version__

COMMANDS = {
    "compare": (
        "commands.compare",
        "train a small decoder per structure on the same text and compare loss, size, FLOPs, time and memory",
    ),
    "bench": (
        "bench.cli",
        "measure layers: shapes x structures x backends, checked against float64, timed against dense",
    ),
    "describe": ("commands.describe", "what a structure at a shape is, costs and runs, from its description alone"),
    "search": ("commands.search", "train structures under one budget and find those that lose least"),
    "tune": ("commands.tune", "choose backends ahead of time: measure layers here and remember what is fastest"),
    "predict": ("commands.predict", "time and memory of layers and whole models on a device, from what it reaches"),
    "advise": ("commands.advise", "choose structures and sizes for the layers of a model under a budget"),
    "train": ("recipes.command", "pretrain a language model from a recipe, dense or structured, on your text"),
    "eval": ("evaluate.cli", "loss on a text, minimal pairs and few-shot prompts for a language model"),
    "convert": ("commands.convert", "give a Hugging Face model folder structured layers"),
    "densify": (
        "commands.densify",
        "turn the structured layers of a Hugging Face model folder into dense ones of the same function",
    ),
    "scaling": ("commands.scaling", "fit scaling laws to training runs: loss against FLOPs, dense beside structured"),
    "finetune": ("evaluate.finetune_cli", "train a language model on a classification task and measure it"),
}
"""Name -> module (with ``DESCRIPTION``, ``add_arguments(parser)`` and ``main(options, command) -> status``), help."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def refuse(self, what: str, given: str, known: Iterable[str], allowed: str) -> NoReturn:
        """`error` of something unknown, with the nearest of what is ``known``."""
        names = {name.lstrip("-"): name for name in known}
        near = difflib.get_close_matches(given.partition("=")[0].lstrip("-"), names, n=1)
        hint = f"did you mean {names[near[0]]}? " if near else ""
        self.error(f"{what} {given} is unknown; {hint}allowed: {allowed}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default that of the process); returns the exit status.

    0 is success, 1 a run that failed, 2 a bad option, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = Parser(prog="structlin", description="Structured linear layers for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"structlin {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="command", required=True)
    if called is not None and called not in COMMANDS:
        parser.refuse("the command", called, COMMANDS, ", ".join(COMMANDS))
    parsers: dict[str | None, Parser] = {None: parser}
    for name, (module, help_text) in COMMANDS.items():
        command = parsers[name] = commands.add_parser(name, help=help_text, allow_abbrev=False)
        if name == called:
            chosen = import_module(f".{module}", __package__)
            command.description = chosen.DESCRIPTION
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.main)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        used = parsers[called]
        used.refuse("the argument", unknown[0], used._option_string_actions, f"those of {used.prog} --help")
    try:
        status: int = options.run(options, shlex.join(["structlin", *arguments]))
        sys.stdout.flush()
    except OSError as error:  # of the output: commands say themselves what is wrong with files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else fail(reason(error), 1, str(called))
    return status
