"""``structlin finetune``: a model and a task in, its metrics and a record out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..options import check_file, fail, lacks, number, reason, whole
from ..report import records as store

DESCRIPTION = (
    "Put a classifier on a causal language model or an encoder in a folder, dense or structured, train it on a "
    "task and measure it on the task's dev part, with standard errors."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin finetune``."""
    add: Callable[..., Any] = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder with config.json and safetensors, with or without structures.json")
    add("--task", required=True, metavar="NAME", help="a task, such as sst2")
    add("--data", required=True, metavar="DIR", help="folder of TASK.jsonl, or of TASK/train.jsonl and TASK/dev.jsonl")
    add("--tokenizer", metavar="PATH", help="tokenizer.json or a folder with one; default: that of MODEL_DIR")
    add("--bos", metavar="TOKEN", help="token before every text; default: the tokenizer's bos, else its eos token")
    add("--lr", type=number, default=5e-5, metavar="X", help="learning rate of a dense layer; default: 5e-5")
    add("--weight-decay", type=number, default=0.01, metavar="X", help="default: 0.01")
    add("--epochs", type=number, default=3.0, metavar="X", help="default: 3")
    add("--steps", type=whole, metavar="N", help="so many steps instead of epochs")
    add("--batch", type=whole, default=32, metavar="N", help="examples of a step; default: 32")
    add(
        "--warmup-steps",
        type=number,
        default=0.0,
        metavar="X",
        help="over which the rate rises, or a share; default: 0",
    )
    add("--seed", type=whole, default=0, metavar="N", help="of the head and the order of examples; default: 0")
    add("--device", metavar="cpu|cuda", help="default: cuda if there is a GPU, else cpu")
    add("--save", metavar="DIR", help="write the trained model here, a new folder of transformers")
    add("--out", metavar="FILE.json", help="write the record here")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin finetune``; returns 0, 1 when it could not run, 2 for bad input, 130 for an interrupt."""
    if missing := lacks(("transformers", "accelerate", "torchmetrics"), "eval"):
        return fail(missing, 1, "finetune")
    from . import show
    from .finetune import Tuning, finetune

    try:
        check_file("--out", options.out)
        names = ("lr", "weight_decay", "epochs", "steps", "batch", "warmup_steps", "seed")
        tuning = Tuning(**{name: getattr(options, name) for name in names})
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Path(options.tokenizer) if options.tokenizer else None
        folder, data = Path(options.model), Path(options.data)
        save = Path(options.save) if options.save else None
        record = finetune(folder, options.task, data, command, tuning, tokenizer, options.bos, device, save)
        if options.out:
            store.write(options.out, [record])
    except ValueError as error:
        return fail(str(error), 2, "finetune")
    except OSError as error:
        return fail(reason(error), 1, "finetune")
    except ArithmeticError as error:
        return fail(f"{error}; nothing is written", 1, "finetune")
    except KeyboardInterrupt:
        return fail("interrupted; nothing is written", 130, "finetune")
    print("\n".join(show.lines([record])))
    return 0
