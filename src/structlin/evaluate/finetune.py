"""``structlin finetune``: a pretrained model with a fresh classifier on top, trained on one task, measured on its dev
part.

The loop is transformers' Trainer; ours are the rates of structured layers, through its hook for optimizers. What a
causal model reads is the prompt of the task without an answer, the same text that k-shot prompts ask, after the prefix
token; the classifier reads the last token of it, as transformers' decoders with a sequence classification head do. What
an encoder (BERT) reads are the fields of the task as one text or a pair, with the special tokens of its tokenizer.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..machine import provenance
from ..optim import param_groups
from ..report.records import Record
from . import files, tasks
from .loading import check_vocabulary, is_encoder, load_model, load_tokenizer
from .metrics import check_finite, measure
from .run import structures
from .score import context_of
from .tokens import Encoder, encoder


@dataclass(frozen=True)
class Tuning:
    """Options of a run; ``lr`` is that of a dense layer, ``steps`` overrides ``epochs``.

    The rate rises over ``warmup_steps``, below 1 a share of all steps.
    """

    lr: float = 5e-5
    weight_decay: float = 0.01
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 32
    warmup_steps: float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("warmup_steps", 0), ("weight_decay", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name}={value} is given; allowed: {least} and more")
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is given; allowed: above 0")

    def updates(self, examples: int) -> int:
        """How many steps a run over so many examples has.

        Raises:
            ValueError: where the rate would still rise at their end.
        """
        steps = self.steps or math.ceil(self.epochs * math.ceil(examples / self.batch))
        if self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps:g} is given; allowed: below the {steps} steps of the run"
            )
        return steps


def classifier(pretrained: nn.Module, labels: int, pad: int) -> nn.Module:
    """The body of ``pretrained``, a model of transformers, with a fresh head for ``labels`` classes, one for a number.

    Args:
        pretrained: a causal model or an encoder; its body is taken over, not copied.
        labels: outputs of the head.
        pad: id of the token that fills up batches; the head of a causal model reads the last token that is another.
    """
    import transformers

    source: Any = pretrained
    config = copy.deepcopy(source.config)
    config.num_labels, config.pad_token_id = labels, pad
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    body = source.base_model
    if getattr(body, "pooler", True) is None:  # no pretraining of masked tokens has one; it belongs to the fresh head
        body.pooler = model.base_model.pooler
    setattr(model, model.base_model_prefix, body)
    found: nn.Module = model
    return found


def finetune(
    folder: Path,
    name: str,
    data: Path,
    command: str,
    tuning: Tuning | None = None,
    tokenizer_path: Path | None = None,
    bos: str | None = None,
    device: str = "cpu",
    save: Path | None = None,
) -> Record:
    """Train the model in ``folder`` on the task ``name`` and measure it; the record is of kind "eval".

    Args:
        folder: see `structlin.evaluate.loading.load_model`; it is not written to.
        name: of `structlin.evaluate.tasks.TASKS`.
        data: see `structlin.evaluate.tasks.read_task`.
        command: for the record.
        tuning: options.
        tokenizer_path: of the tokenizer, by default ``folder``.
        bos: see `structlin.evaluate.tokens.encoder`.
        device: "cpu" or "cuda", the GPU that Trainer takes.
        save: new folder for the trained model and its tokenizer, which ``AutoModelForSequenceClassification`` loads,
            after ``import structlin.hf`` where it is structured; by default nothing is kept.

    Returns:
        A record named ``finetune/TASK``: the task's metrics with ``_stderr``, ``examples`` of dev, ``cut``, the texts
        of either part that were too long and lost their beginning (encoders: their end), and ``seconds`` of training.

    Raises:
        ValueError: for data, a model, a tokenizer or options that do not fit.
        ArithmeticError: where the trained model gives numbers that are not finite; nothing is saved then.
    """
    tuning = tuning or Tuning()
    _refuse(device, save)
    task = tasks.task_named(name)
    rows, paths = tasks.read_task(data, name)
    tokenizer, both_ways = load_tokenizer(tokenizer_path or folder), is_encoder(folder)
    if both_ways and bos is not None:
        raise ValueError(f"bos={bos!r} is given; {folder} holds an encoder, whose tokenizer knows what it starts with")
    encode = None if both_ways else encoder(tokenizer, bos)
    torch.manual_seed(tuning.seed)
    pretrained = load_model(folder, device, body=both_ways)
    check_vocabulary(pretrained, tokenizer)
    inputs, cut = _inputs(task, rows, tokenizer, encode, context_of(pretrained))
    parts = {part: _labelled(task, rows[part], inputs[part]) for part in tasks.PARTS}
    pad = tokenizer.pad_token_id if encode is None else encode.prefix
    model = classifier(pretrained, max(1, len(task.words)), pad).to(device)
    outputs, seconds = _train(model, parts, tuning, pad, device)
    if save is not None:
        _save(model, tokenizer, save)
    predicted = outputs.argmax(1) if task.words else outputs[:, 0]
    metrics = measure(task.metrics, predicted, torch.tensor([row["label"] for row in parts["dev"]]))
    prefix = None if encode is None else tokenizer.convert_ids_to_tokens(encode.prefix)
    config = {"model": str(folder), "prefix": prefix, **asdict(tuning)}
    config |= {"structures": structures(model), "main_metric": task.metrics[0], "data": files.source(paths)}
    metrics |= {"examples": len(parts["dev"]), "cut": cut, "seconds": seconds}
    found: dict[str, Any] = provenance(command, tuning.seed, torch.device(device))
    found |= {"kind": "eval", "name": f"finetune/{name}", "config": config, "metrics": metrics, "status": "ok"}
    return cast(Record, {**found, "error": None})


def _refuse(device: str, save: Path | None) -> None:
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r} is given; allowed: cpu, or cuda where there is a GPU")
    if save is not None and save.exists():
        raise ValueError(f"{save} exists, and nothing is overwritten; give another folder")
    if save is not None and not next(above for above in save.absolute().parents if above.exists()).is_dir():
        raise ValueError(f"{save} is given, below a file; allowed: a new folder")


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the folder as a whole: under another name until it is complete."""
    from .. import hf  # noqa: F401, which writes structures

    fresh = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(folder)


Example = dict[str, Any]
"""Token ids, what else the tokenizer gives for each of them, and the label."""


def _inputs(
    task: tasks.Task,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    tokenizer: Any,
    encode: Encoder | None,
    limit: int | None,
) -> tuple[dict[str, list[Example]], int]:
    """What the model reads for every row, by part, and how many texts were cut to fit."""
    found: dict[str, list[Example]] = {}
    cut = 0
    for part in tasks.PARTS:
        if encode is None:
            first, second = zip(*(_fields(task, row) for row in rows[part]), strict=True)
            pairs = {"text": list(first), "text_pair": list(second) if any(second) else None}
            lengths = [len(ids) for ids in tokenizer(**pairs, verbose=False)["input_ids"]]
            cut += 0 if limit is None else sum(length > limit for length in lengths)
            given = tokenizer(**pairs, truncation=limit is not None, max_length=limit)
            columns = zip(*given.values(), strict=True)
            found[part] = [dict(zip(given.keys(), values, strict=True)) for values in columns]
            continue
        encoded = encode.encode([task.text(row) for row in rows[part]])
        room = max(map(len, encoded)) if limit is None else limit - 1
        cut += sum(len(ids) > room for ids in encoded)
        texts = [[encode.prefix, *ids[max(0, len(ids) - room) :]] for ids in encoded]
        found[part] = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
    return found, cut


def _fields(task: tasks.Task, row: dict[str, Any]) -> tuple[str, str]:
    """The first field of a row, and the others as one text."""
    first, *others = (str(row[field]) for field in task.fields)
    return first, " ".join(others)


def _labelled(task: tasks.Task, rows: Sequence[dict[str, Any]], inputs: Sequence[Example]) -> list[Example]:
    words = list(task.words)
    labels = [words.index(str(row["label"])) if words else float(row["label"]) for row in rows]
    return [{**example, "label": label} for example, label in zip(inputs, labels, strict=True)]


def _train(
    model: nn.Module, parts: dict[str, list[Example]], tuning: Tuning, pad: int, device: str
) -> tuple[Tensor, float]:
    """Train on "train"; the outputs for "dev", float32 ``[examples, labels]``, all finite, and the seconds of
    training."""
    import transformers

    tuning.updates(len(parts["train"]))

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        batch = {}
        for name in examples[0].keys() - {"label"}:
            fill = pad if name == "input_ids" else 0
            rows = [[*example[name], *[fill] * (length - len(example[name]))] for example in examples]
            batch[name] = torch.tensor(rows)
        return {**batch, "labels": torch.tensor([example["label"] for example in examples])}

    optimizer = torch.optim.AdamW(param_groups(model, tuning.lr, tuning.weight_decay), fused=device == "cuda")
    # Trainer prints its logs; standard output is for results
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=tuning.epochs,
            max_steps=tuning.steps or -1,
            per_device_train_batch_size=tuning.batch,
            per_device_eval_batch_size=tuning.batch,
            warmup_steps=tuning.warmup_steps,
            seed=tuning.seed,
            use_cpu=device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
        )
        trainer = transformers.Trainer(
            model, arguments, collate, parts["train"], parts["dev"], optimizers=(optimizer, None)
        )
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        dev: Any = parts["dev"]  # a list serves as a map-style dataset
        outputs = torch.as_tensor(trainer.predict(dev).predictions).float()
    check_finite(outputs)
    return outputs, seconds
