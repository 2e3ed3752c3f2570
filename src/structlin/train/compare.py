"""The runner: one process per structure, one after the other, and a folder that survives whatever happens to them.

DIR holds ``config.json`` (what is compared; another comparison may not share the folder), ``results.json`` (records of
the finished structures, replaced after each) and, until all are done, ``work/`` with the text and the checkpoint of the
structure in training. Workers are forked from a server that has imported torch once and never computes, so each gets
fresh state and its own peak memory without seconds of imports.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..machine import provenance
from ..report import records
from ..report.records import Record
from . import worker
from .config import Config, OptionError
from .data import Text
from .folder import check_writable, locked

OUTPUTS = ("results.json", "curves.png", "pareto.png", "report.html")
# optimizers import torch._dynamo when they are made, which takes seconds: once here instead of once per worker
PRELOAD = [worker.__name__, "torch._dynamo"]
CONFIG, RESULTS, WORK = "config.json", "results.json", "work"


@dataclass(frozen=True)
class Event:
    """Something happened to a structure: ``values`` is what its worker emitted, or ``{"start": steps}`` and
    ``{"end": record}`` from here; ``pid`` is the worker's process."""

    structure: str
    pid: int
    values: dict[str, Any]


Watch = Callable[[Event], None]


def compare(config: Config, text: Text, folder: Path, command: str, watch: Watch) -> list[Record]:
    """Train what ``folder`` does not hold yet and return the records of all structures, in the config's order.

    Interrupt it at any moment and call it again: finished structures are kept, the unfinished one goes on from its
    checkpoint. A structure that fails gets a record that says so, and is tried again by the next call.

    Args:
        config: what to compare.
        text: what ``config.data`` describes.
        folder: made if needed.
        command: for the records.
        watch: called with every `Event`, in this process.

    Raises:
        OptionError: when ``folder`` is in use, cannot be written, or holds another comparison.
        OSError: when something cannot be written later (a full disk); what was finished is kept.
    """
    check_folder(folder, config)
    with locked(folder):
        check_folder(folder, config)
        records.write_bytes(folder / CONFIG, (json.dumps(config.to_dict(), indent=1) + "\n").encode())
        done = finished(folder)
        for structure in config.structures:
            if structure in done:
                continue
            _write_text(folder / WORK, text)
            job = worker.Job(config, structure, folder / WORK, command)
            done[structure] = _train(job, watch)
            results = beside_dense([done[name] for name in config.structures if name in done])
            records.write(folder / RESULTS, results)
            if done[structure]["status"] == "ok":
                job.checkpoint.unlink(missing_ok=True)
        results = beside_dense([done[name] for name in config.structures])
        if all(record["status"] == "ok" for record in results):
            shutil.rmtree(folder / WORK, ignore_errors=True)
    return results


def check_folder(folder: Path, config: Config) -> None:
    """See that ``folder`` can hold the results of ``config``, without writing anything.

    Raises:
        OptionError: when it is not a folder, cannot be written, or holds something else.
    """
    check_writable(folder)
    if not (folder / CONFIG).exists():
        foreign = [name for name in OUTPUTS if (folder / name).exists()]
        if foreign:
            raise OptionError("--out", f"{folder} holds another run's {foreign[0]}; choose another folder")
        return
    try:
        before = json.loads((folder / CONFIG).read_bytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise OptionError("--out", f"{folder / CONFIG} is not of a comparison; choose another folder")
    now = config.to_dict()
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        shown = [f"{name} ({_short(before.get(name))} there, {_short(now.get(name))} here)" for name in changed]
        raise OptionError("--out", f"{folder} holds a run with another {', '.join(shown)}; choose another folder")


def finished(folder: Path) -> dict[str, Record]:
    """The records in ``folder`` of structures that need no more training, by structure.

    Raises:
        OptionError: when its results are not readable.
    """
    try:
        found = records.read(folder / RESULTS)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OptionError("--out", f"{error}; remove that file or choose another folder") from None
    return {record["name"]: record for record in found if record["status"] == "ok"}


def beside_dense(results: list[Record]) -> list[Record]:
    """The records with ``seconds_to_dense_loss``: seconds up to the first validation no worse than dense's last."""
    goal = next((record["metrics"].get("valid_loss") for record in results if record["name"] == "dense"), None)
    for record in results:
        series = record.get("series", {})
        reached = [
            seconds
            for seconds, loss in zip(series.get("seconds", []), series.get("valid_loss", []), strict=True)
            if goal is not None and loss <= goal
        ]
        record["metrics"]["seconds_to_dense_loss"] = reached[0] if reached else None
    return results


def _train(job: worker.Job, watch: Watch) -> Record:
    """Run one worker to its end, whatever that is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker.main, args=(job, sender), daemon=True)
    process.start()
    sender.close()  # the worker holds the only other end, so its death is the end of the file
    assert process.pid is not None
    message: dict[str, Any] = {"start": job.config.steps}
    try:
        watch(Event(job.structure, process.pid, message))
        while not {"record", "error"} & message.keys():
            try:
                message = receiver.recv()
            except (EOFError, OSError):
                process.join()
                message = {"error": RuntimeError(_cause_of_death(process.exitcode))}
            if isinstance(message.get("error"), OSError):
                raise message["error"]  # a full disk is not a fault of this structure, and the next would meet it too
            watch(Event(job.structure, process.pid, message))
    finally:
        process.kill()
        process.join()
        receiver.close()
    if "record" in message:
        record: Record = message["record"]
        return record
    return _failure(job, str(message["error"]))


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{hint}"
    return f"its process ended with exit code {code}"


def _failure(job: worker.Job, error: str) -> Record:
    fields = {
        "kind": "compare",
        "name": job.structure,
        **provenance(job.command, job.config.seed, torch.device(job.config.device)),
        "config": {**job.config.to_dict(), "structure": job.structure},
        "metrics": {},
        "status": "failed",
        "error": error,
    }
    return cast(Record, fields)


def _write_text(work: Path, text: Text) -> None:
    work.mkdir(exist_ok=True)
    for name, part in (("train.bin", text.train), ("valid.bin", text.valid)):
        path = work / name
        if not path.exists() or path.stat().st_size != len(part):
            records.write_bytes(path, part)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
