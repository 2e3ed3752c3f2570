"""``structlin eval``: a model and data in, a table and records out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..options import check_file, fail, lacks, reason, whole_from
from ..report import records as store
from ..report.records import Record

DESCRIPTION = (
    "Evaluate a language model in a folder, dense or structured: loss, perplexity and bits per byte on a text, "
    "accuracy on minimal pairs (BLiMP), k-shot prompts over classification tasks, and, for encoders, the similarity of "
    "sentences (STS-B). Print a table with standard errors and write records."
)

TASKS = ("loss", "blimp", "kshot", "sts")
OF_ONE = {"stride": "loss", "leading_space": "blimp", "kshot_tasks": "kshot", "shots": "kshot", "limit": "kshot",
          "seed": "kshot"}  # fmt: skip
"""Options that one task reads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin eval``."""
    add: Callable[..., Any] = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder with config.json and safetensors, with or without structures.json")
    add("--tasks", default="loss", metavar="LIST", help=f"comma separated, of {', '.join(TASKS)}; default: loss")
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="TASK=PATH",
        help="of every task: loss=text or .jsonl, blimp=.jsonl or a folder, kshot=a folder of TASK.jsonl or .tsv, "
        "sts=a folder with stsb.jsonl or .tsv",
    )
    add("--tokenizer", metavar="PATH", help="tokenizer.json or a folder with one; default: that of MODEL_DIR")
    add(
        "--bos", metavar="TOKEN", help="token before every text; default: the tokenizer's bos token, else its eos token"
    )
    add(
        "--context",
        type=whole_from(1),
        metavar="N",
        help="most tokens read at once; default: what the model's config says",
    )
    add(
        "--stride", type=whole_from(1), metavar="N", help="loss: tokens that each window predicts; default: the context"
    )
    add("--leading-space", action="store_true", help="blimp: a space before every sentence, as lm-eval has it")
    add("--kshot-tasks", metavar="LIST", help="kshot: comma separated; default: every task whose file is there")
    add("--shots", type=whole_from(0), metavar="N", help="kshot: examples before each question; default: 4")
    add("--limit", type=whole_from(1), metavar="N", help="kshot: only so many questions of a task, drawn at random")
    add("--seed", type=whole_from(0), metavar="N", help="kshot: of the choice of examples; default: 0")
    add(
        "--batch-tokens",
        type=whole_from(1),
        metavar="N",
        help="most tokens of a batch; default: 512 on a CPU, 8192 on a GPU",
    )
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", default="float32", metavar="float32|bfloat16", help="of the weights; default: float32")
    add("--out", metavar="FILE.json", help="write the records here")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin eval``; returns 0, 1 when it could not run, 2 for bad input, 130 for an interrupt."""
    if missing := lacks(("transformers", "torchmetrics"), "eval"):
        return fail(missing, 1, "eval")
    from . import run, show

    try:
        check_file("--out", options.out)
        found: Sequence[Record] = run.evaluate(_settings(options), command)
        if options.out:
            store.write(options.out, found)
    except ValueError as error:
        return fail(str(error), 2, "eval")
    except OSError as error:
        return fail(reason(error), 1, "eval")
    except ArithmeticError as error:
        return fail(f"{error}; nothing is written", 1, "eval")
    except KeyboardInterrupt:
        return fail("interrupted; nothing is written", 130, "eval")
    print("\n".join(show.lines(found)))
    return 0


def _settings(options: argparse.Namespace) -> Any:
    from .run import Settings

    tasks = tuple(options.tasks.split(","))
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--tasks: {', '.join(unknown)} is given; allowed: {', '.join(TASKS)}")
    for name, task in OF_ONE.items():
        given = getattr(options, name)  # 0 is given, though it equals False
        if given is not None and given is not False and task not in tasks:
            raise ValueError(f"--{name.replace('_', '-')}: is for the task {task}; given: --tasks {options.tasks}")
    data: dict[str, Path] = {}
    for given in options.data:
        task, equals, path = given.partition("=")
        if not equals or task not in tasks:
            raise ValueError(f"--data: {given} is given; allowed: TASK=PATH, with TASK of {', '.join(tasks)}")
        if task in data:
            raise ValueError(f"--data: {task} is given twice, {data[task]} and {path}; allowed: one path for each task")
        data[task] = Path(path)
    if without := [task for task in tasks if task not in data]:
        raise ValueError(f"--data: nothing is given for {', '.join(without)}; allowed: TASK=PATH for every task")
    return Settings(
        model=Path(options.model),
        data={task: data[task] for task in tasks},
        tokenizer=Path(options.tokenizer) if options.tokenizer else None,
        bos=options.bos,
        context=options.context,
        stride=options.stride,
        leading_space=options.leading_space,
        kshot_tasks=tuple(options.kshot_tasks.split(",")) if options.kshot_tasks else (),
        shots=4 if options.shots is None else options.shots,
        limit=options.limit,
        seed=options.seed or 0,
        batch_tokens=options.batch_tokens,
        device=options.device,
        dtype=options.dtype,
    )
