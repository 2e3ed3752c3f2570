"""Pretraining from a recipe to a record, in one function that reads from top to bottom.

The folder of a run holds ``run.json`` (recipe, text and sizes; another run may not share it), ``tokenizer.json``,
``checkpoints/``, and at the end ``model/`` and ``record.json``. The same call goes on after whatever stopped the one
before, to the same bits on a CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .. import checkpoint
from ..machine import provenance
from ..once import alone
from ..report import records
from ..report.records import Record
from . import checkpoints, masked, model
from .blame import blame
from .checkpoints import Progress
from .engine import Engine, accelerator_for
from .folder import MODEL, RECORD, RUN, check_writable, claim, finished, locked
from .masked import MaskedWindows
from .monitor import Monitor, Say, check_trackers
from .recipe import Recipe
from .tokens import Tokens, hf_tokenizer, prepare
from .windows import Windows, ahead, spread
from .worker import DivergedError

TOKENIZER = "tokenizer.json"


def train(recipe: Recipe, folder: Path, command: str, say: Say = print) -> Record:
    """Train what ``recipe`` says in ``folder``, from its last checkpoint if there is one, and say what came out.

    Args:
        recipe: the run.
        folder: made if needed.
        command: for the record.
        say: called with lines of progress.

    Returns:
        The record, which is in ``folder`` too; its status is "failed" where a number was not finite.

    Raises:
        OptionError: for a recipe that does not fit this machine, its text or ``folder``; nothing was trained then.
        OSError: when something cannot be written; the checkpoints before it stay.
    """
    check_writable(folder)
    check_trackers(recipe)
    model.check(recipe)
    accelerator = accelerator_for(recipe, folder)
    main = accelerator.is_main_process
    with accelerator.main_process_first():
        tokens = prepare(recipe)
    with locked(folder) if main else nullcontext():
        if main:
            _claim(folder, recipe, tokens, command)
        accelerator.wait_for_everyone()
        if (done := finished(folder / RECORD)) is not None:
            return done
        engine = Engine(recipe, tokens.vocabulary, accelerator)
        accelerator.init_trackers("structlin", {name: str(value) for name, value in recipe.to_dict().items()})
        progress = checkpoints.resume(folder, engine, say)
        windows, valid = batches(recipe, tokens)

        def fetch(step: int) -> Any:
            return engine.rows(windows.batch(step, recipe.batch))

        engine.warm_up(fetch(progress.step))
        error = None
        with nullcontext() if accelerator.num_processes > 1 else alone():
            monitor = Monitor(engine, progress, say)
            try:
                _updates(engine, monitor, fetch, valid, folder if main else None)
            except DivergedError as failure:
                error = f"{failure}: {_blame(engine, fetch, monitor.last + int(engine.healthy.item()))}"
        record = _record(recipe, tokens, engine, monitor, command, error)
        if main:
            _write(folder, record, engine, tokens)
        accelerator.end_training()
    return record


def batches(recipe: Recipe, tokens: Tokens) -> tuple[Windows | MaskedWindows, Tensor]:
    """What training reads, and the batch that validation reads."""
    windows = Windows(tokens.train, recipe.context, recipe.seed)
    valid = spread(tokens.valid, recipe.valid_windows, recipe.context)
    if recipe.architecture != "bert":
        return windows, valid
    masking = masked.masking(recipe, masked.hf_tokenizer(recipe, tokens.tokenizer))
    return MaskedWindows(windows, masking), masking(valid, *masked.VALIDATION)


def _updates(engine: Engine, monitor: Monitor, fetch: Any, valid: Tensor, folder: Path | None) -> None:
    """All updates that are left, with validations, and checkpoints below ``folder``."""
    recipe, progress = engine.recipe, monitor.progress
    for step, batch in enumerate(ahead(fetch, progress.step, recipe.steps, engine.device), progress.step):
        if engine.switches(step):
            if monitor.last < step:
                monitor.read(step)
            engine.densify()
            engine.warm_up(batch)
            monitor.start()
        engine.update(batch, step)
        now = {name for name in ("log", "valid", "checkpoint") if recipe.due(name, step + 1)}
        if now:
            monitor.read(step + 1)
        if "valid" in now:
            monitor.validated(engine.evaluate(valid))
        if "checkpoint" in now and folder:
            checkpoints.save(folder, progress, engine)
        if now - {"log"}:
            monitor.start()


def load(folder: str | Path) -> tuple[nn.Module, str, Recipe]:
    """The trained model of a finished run, on the CPU, the JSON of its tokenizer, and its recipe.

    Raises:
        ValueError: for a folder without a finished run.
    """
    from .. import hf  # noqa: F401, structures fit the layers of GPT-2 from here on

    folder = Path(folder)
    try:
        run = json.loads((folder / RUN).read_bytes())
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no run of structlin train") from None
    if not (folder / MODEL).exists():
        raise ValueError(f"the run in {folder} is not finished; the command that started it goes on: {run['command']}")
    recipe = Recipe.from_dict(run["recipe"])
    empty = model.portable(model.dense(recipe, run["vocabulary"], "sdpa"))
    return checkpoint.load(empty, folder / MODEL).eval(), tokenizer, recipe


def _write(folder: Path, record: Record, engine: Engine, tokens: Tokens) -> None:
    """The record, after the model of a run that did not fail, so that a finished run has both.

    Configuration and tokenizer lie beside the weights, so that ``structlin eval`` reads the folder.
    """
    if record["status"] == "ok":
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # left by a run that was killed here
        checkpoint.save(model.portable(engine.model), folder / MODEL)
        if (recipe := engine.recipe).architecture == "bert":
            tokenizer = masked.hf_tokenizer(recipe, tokens.tokenizer)
        else:
            tokenizer = hf_tokenizer(tokens.tokenizer, recipe.context)
            engine.model.config.eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
        _write_config(engine.model, folder / MODEL / "config.json")
        tokenizer.save_pretrained(folder / MODEL)
        (folder / MODEL / TOKENIZER).write_text(tokens.tokenizer, encoding="utf-8")
    records.write(folder / RECORD, [record])


def _write_config(trained: Any, path: Path) -> None:
    """The configuration, with the structures in it, so that transformers loads the folder after importing
    `structlin.hf`."""
    from ..hf.attention import keep_attention
    from ..hf.quantizer import describe
    from ..hf.saving import guard

    trained.config.architectures = [type(trained).__name__]
    if not model.routers(trained) and (structures := describe(trained)) is not None:  # it cannot load routers
        trained.config.quantization_config = structures
    path.write_text(trained.config.to_json_string(), encoding="utf-8")
    guard(path)
    keep_attention(trained.config, path)


def _claim(folder: Path, recipe: Recipe, tokens: Tokens, command: str) -> None:
    run = {"command": command, "recipe": recipe.to_dict(), "vocabulary": tokens.vocabulary}
    claim(folder, {**run, "data": tokens.about})
    records.write_bytes(folder / TOKENIZER, tokens.tokenizer.encode())


def _blame(engine: Engine, fetch: Any, step: int) -> str:
    """The layer that fails at ``step``, done again without compilation."""
    with engine.autocast():
        pieces = fetch(step).to(engine.device).split(engine.recipe.micro_batch)
        return blame(engine.model, lambda windows: model.loss(engine.model, windows), pieces)


def _record(
    recipe: Recipe, tokens: Tokens, engine: Engine, monitor: Monitor, command: str, error: str | None
) -> Record:
    progress: Progress = monitor.progress
    seen = progress.step * monitor.tokens
    last = {name: values[-1] if values and error is None else None for name, values in progress.series.items()}
    speed = seen / progress.seconds if progress.seconds else None
    valid = tokens.about["valid"]
    loss = last["valid_loss"]
    whole = None if recipe.architecture == "bert" else loss  # that of chosen tokens says nothing about a whole text
    metrics: dict[str, float | int | None] = {
        "swapped_params": sum(swap.params for swap in engine.conversion),
        "model_params": sum(parameter.numel() for parameter in engine.model.parameters()),
        "flops_per_token": model.flops_per_token(recipe, engine.model),
        "steps": progress.step,
        "tokens": seen,
        "train_seconds": progress.seconds,
        "tokens_per_second": speed,
        "utilisation": monitor.utilisation(speed) if speed else None,
        "peak_flops": monitor.peak,
        "train_loss": last["train_loss"],
        "valid_loss": loss,
        "bits_per_byte": None if whole is None else whole / math.log(2) * valid["tokens"] / valid["bytes"],
        "peak_memory_bytes": progress.peak_memory,
    }
    where = provenance(command, recipe.seed, engine.device)
    where["versions"] |= {name: metadata.version(name) for name in recipe.packages}
    config = {**recipe.to_dict(), "vocabulary": tokens.vocabulary, "text": tokens.about}
    config |= {"processes": engine.accelerator.num_processes, "backends": engine.backends}
    fields = {
        "kind": "train", "name": recipe.name, **where, "config": config, "metrics": metrics, "series": progress.series,
        "status": "ok" if error is None else "failed", "error": error,
    }  # fmt: skip
    return cast(Record, fields)
