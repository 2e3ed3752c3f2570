"""From settings to records: load a model once, evaluate it on everything that is asked for, one record each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..machine import provenance
from ..nn import StructuredLinear
from ..report.records import Record
from . import blimp, files, kshot, loss, sts, tasks
from .loading import check_vocabulary, is_encoder, load_model, load_tokenizer
from .score import context_of
from .tokens import Encoder, encoder

Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Settings:
    """What `evaluate` does; `structlin eval --help` says what each means. ``data`` has a path for each task that
    runs."""

    model: Path
    data: Mapping[str, Path]
    tokenizer: Path | None = None
    bos: str | None = None
    context: int | None = None
    stride: int | None = None
    leading_space: bool = False
    kshot_tasks: tuple[str, ...] = ()
    shots: int = 4
    limit: int | None = None
    seed: int = 0
    batch_tokens: int | None = None
    device: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Job:
    """One evaluation: its name, the options and data that fix its numbers, and what computes them."""

    name: str
    config: dict[str, Any]
    compute: Callable[[], Metrics] = field(repr=False)


def evaluate(settings: Settings, command: str) -> list[Record]:
    """Records of kind "eval", named ``loss``, ``blimp``, ``kshot/TASK`` or ``sts``; see docs/evaluate.md.

    All data is read and checked before the model runs.

    Raises:
        ValueError: for settings, data, a model or a tokenizer that do not fit; nothing is evaluated then.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if device not in allowed:
        raise ValueError(f"--device: {device} is given; allowed: {', '.join(allowed)}")
    alone = "sts" in settings.data
    if alone and len(settings.data) > 1:
        raise ValueError("--tasks: sts is about embeddings and runs alone; give the other tasks in another command")
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    if not alone and is_encoder(settings.model):
        raise ValueError(f"{settings.model} holds an encoder; allowed: --tasks sts, or structlin finetune")
    encode = None if alone else encoder(tokenizer, settings.bos)
    model = load_model(settings.model, device, settings.dtype, body=alone)
    check_vocabulary(model, tokenizer)
    common = {
        "model": str(settings.model),
        "tokenizer": str(settings.tokenizer or settings.model),
        "prefix": None if encode is None else tokenizer.convert_ids_to_tokens(encode.prefix),
        "vocabulary": len(tokenizer),
        "dtype": settings.dtype,
        "batch_tokens": settings.batch_tokens,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "structures": structures(model),
    }
    found: list[Record] = []
    for job in _similarity(settings, model, tokenizer) if encode is None else _jobs(settings, model, encode):
        begin = time.perf_counter()
        metrics = dict(job.compute())
        record: Record = {
            "kind": "eval",
            "name": job.name,
            **provenance(command, settings.seed, torch.device(device)),  # type: ignore[typeddict-item]
            "config": {**common, **job.config},
            "metrics": {**metrics, "seconds": time.perf_counter() - begin},
            "status": "ok",
            "error": None,
        }
        found.append(record)
    return found


def structures(model: nn.Module) -> dict[str, int]:
    """How many layers have each structure."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            found[str(module.spec)] = found.get(str(module.spec), 0) + 1
    return found


def _jobs(settings: Settings, model: nn.Module, encode: Encoder) -> list[Job]:
    """Every evaluation, with its data read."""
    limit, size = context_of(model), settings.batch_tokens
    context = limit if settings.context is None else settings.context
    if context is None or context < 1 or (limit is not None and context > limit):
        allowed = "1 and more" if limit is None else f"1 to {limit}"
        raise ValueError(f"--context: {settings.context} is given; allowed: {allowed}")
    jobs = []
    for task, path in settings.data.items():
        if task == "loss":
            documents = loss.read_documents(path)
            stride = context if settings.stride is None else settings.stride
            config = {"context": context, "stride": stride, "data": files.source([path])}
            jobs.append(Job(task, config, partial(loss.text_loss, model, encode, documents, context, stride, size)))
        elif task == "blimp":
            pairs, space = blimp.read_pairs(path), settings.leading_space
            config = {"leading_space": space, "data": files.source(blimp.files(path))}
            jobs.append(Job(task, config, partial(blimp.blimp, model, encode, pairs, size, space)))
        else:
            jobs += _kshot(settings, path, model, encode, context)
    return jobs


def _similarity(settings: Settings, model: nn.Module, tokenizer: Any) -> list[Job]:
    pairs, labels, paths = sts.read_sentences(settings.data["sts"])
    config = {"data": files.source(paths), "pooling": "mean"}
    return [Job("sts", config, partial(sts.similarity, model, tokenizer, pairs, labels, settings.batch_tokens))]


def _kshot(settings: Settings, folder: Path, model: nn.Module, encode: Encoder, context: int) -> list[Job]:
    jobs = []
    names = settings.kshot_tasks or tasks.present(folder)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--kshot-tasks: {', '.join(twice)} is given twice; allowed: each once")
    for name in names:
        task = tasks.task_named(name)
        if not task.words:
            raise ValueError(
                f"--kshot-tasks: {name} is given, whose label is a number; allowed: tasks with labels in words"
            )
        rows, paths = tasks.read_task(folder, name)
        config: dict[str, Any] = {"shots": settings.shots, "limit": settings.limit, "context": context}
        config |= {
            "prompt": task.prompt,
            "words": task.words,
            "main_metric": task.metrics[0],
            "data": files.source(paths),
        }
        arguments = (rows, settings.shots, settings.seed, settings.limit, context, settings.batch_tokens)
        jobs.append(Job(f"kshot/{name}", config, partial(kshot.kshot, model, encode, task, *arguments)))
    return jobs
