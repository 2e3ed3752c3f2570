"""``structlin finetune``: a pretrained model with a fresh classifier on top, trained on one task, measured on its dev
part.

The loop is transformers' Trainer; ours are the rates of structured layers, through its hook for optimizers. The input
is the prompt of the task without an answer, the same text that k-shot prompts ask, after the prefix token; the
classifier reads the last token of it, as transformers' decoders with a sequence classification head do.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import provenance
from ..optim import param_groups
from ..report.records import Record
from . import files, tasks
from .loading import check_vocabulary, load_model, load_tokenizer
from .metrics import measure
from .run import structures
from .score import context_of
from .tokens import Encoder, encoder


@dataclass(frozen=True)
class Tuning:
    """Options of a run; ``lr`` is that of a dense layer, ``steps`` overrides ``epochs``."""

    lr: float = 5e-5
    weight_decay: float = 0.01
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 32
    warmup_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("steps", 1), ("batch", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is given; allowed: {least} and more")


def classifier(causal: nn.Module, labels: int, pad: int) -> nn.Module:
    """The body of ``causal``, a causal model of transformers, with a fresh head for ``labels`` classes, one for a
    number.

    Args:
        causal: its body is taken over, not copied.
        labels: outputs of the head.
        pad: id of the token that fills up batches; the head reads the last token that is another.
    """
    import transformers

    source: Any = causal
    config = copy.deepcopy(source.config)
    config.num_labels, config.pad_token_id = labels, pad
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    setattr(model, model.base_model_prefix, source.base_model)
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

    Returns:
        A record named ``finetune/TASK``: the task's metrics with ``_stderr``, ``examples`` of dev, ``cut``, the texts
        of either part that were too long and lost their beginning, and ``seconds`` of training.

    Raises:
        ValueError: for data, a model, a tokenizer or options that do not fit.
    """
    tuning = tuning or Tuning()
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r} is given; allowed: cpu, or cuda where there is a GPU")
    task = tasks.task_named(name)
    rows, paths = tasks.read_task(data, name)
    tokenizer = load_tokenizer(tokenizer_path or folder)
    encode = encoder(tokenizer, bos)
    torch.manual_seed(tuning.seed)
    causal = load_model(folder, device)
    check_vocabulary(causal, tokenizer)
    words = list(task.words)
    parts, cut = _examples(task, rows, encode, context_of(causal))
    model = classifier(causal, max(1, len(words)), encode.prefix).to(device)
    begin = time.perf_counter()
    outputs = _train(model, parts, tuning, encode.prefix, device)
    seconds = time.perf_counter() - begin
    predicted = outputs.argmax(1) if words else outputs[:, 0]
    metrics = measure(task.metrics, predicted, torch.tensor([row["label"] for row in parts["dev"]]))
    config = {"model": str(folder), "prefix": tokenizer.convert_ids_to_tokens(encode.prefix), **asdict(tuning)}
    config |= {"structures": structures(model), "main_metric": task.metrics[0], "data": files.source(paths)}
    counts = {"examples": len(parts["dev"]), "cut": cut, "seconds": seconds}
    return {
        "kind": "eval",
        "name": f"finetune/{name}",
        **provenance(command, tuning.seed, torch.device(device)),  # type: ignore[typeddict-item]
        "config": config,
        "metrics": {**metrics, **counts},
        "status": "ok",
        "error": None,
    }


def _examples(
    task: tasks.Task, rows: Mapping[str, Sequence[dict[str, Any]]], encode: Encoder, limit: int | None
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Ids and label of every row by part, and how many texts were cut to fit."""
    words = list(task.words)
    parts: dict[str, list[dict[str, Any]]] = {}
    cut = 0
    for part in tasks.PARTS:
        encoded = encode.encode([task.text(row) for row in rows[part]])
        room = max(map(len, encoded)) if limit is None else limit - 1
        cut += sum(len(ids) > room for ids in encoded)
        labels = [words.index(str(row["label"])) if words else float(row["label"]) for row in rows[part]]
        texts = ([encode.prefix, *ids[max(0, len(ids) - room) :]] for ids in encoded)
        parts[part] = [{"input_ids": ids, "label": label} for ids, label in zip(texts, labels, strict=True)]
    return parts, cut


def _train(model: nn.Module, parts: dict[str, list[dict[str, Any]]], tuning: Tuning, pad: int, device: str) -> Tensor:
    """Train on "train"; the outputs for "dev", float32 ``[examples, labels]``."""
    import transformers

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), length), pad)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            mask[row, : len(example["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([x["label"] for x in examples])}

    optimizer = torch.optim.AdamW(param_groups(model, tuning.lr, tuning.weight_decay))
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
        trainer.train()
        dev: Any = parts["dev"]  # a list serves as a map-style dataset
        return torch.as_tensor(trainer.predict(dev).predictions).float()
