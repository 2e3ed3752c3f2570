"""Writing a model folder piece by piece: little memory, nothing half-written, and a second start goes on.

The tensors come in jobs, each a layer to work out or a tensor to copy. Jobs are packed into parts; a part is written
when its jobs are done and is then finished for good. All of it happens in a folder beside the target, which is renamed
at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..report.records import write_bytes
from .files import INDEX, SINGLE

SETTINGS = "unfinished.json"


@dataclass(frozen=True)
class Job:
    """One step of a conversion.

    Attributes:
        name: of the layer or tensor.
        size: bytes of what it reads.
        make: gives the tensors to store by name, and the relative error if a layer was projected.
        shown: whether it is a layer, which progress tells of.
    """

    name: str
    size: int
    make: Callable[[], tuple[dict[str, Tensor], float | None]]
    shown: bool = False


def unfinished(target: Path) -> Path:
    """The folder that is renamed to ``target`` at the end."""
    return target.with_name(f".{target.name}.partial")


def refuse(target: Path) -> None:
    """Raise ValueError where ``target`` is there."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists, and nothing is overwritten; give another folder or delete it")


def write(
    jobs: Iterable[Job],
    target: Path,
    settings: Mapping[str, Any],
    part_bytes: int,
    finish: Callable[[Path], None],
    tell: Callable[[str], None],
) -> dict[str, float | None]:
    """Do all ``jobs`` and put what they make into the folder ``target``, which must not exist.

    Args:
        jobs: in the order of the files.
        target: a folder; its parent is made.
        settings: all that the result depends on, ready for JSON. An unfinished folder of the same is continued.
        part_bytes: how much the jobs of a part may read in all, but for a single larger one.
        finish: writes the other files into a folder, before it gets its name.
        tell: called with a line about every layer.

    Returns:
        Name of a layer -> its error.

    Raises:
        ValueError: where ``target`` exists, an unfinished folder has other settings, or a job fails.
    """
    refuse(target)
    folder = unfinished(target)
    _enter(folder, settings, target)
    parts = _pack(jobs, part_bytes)
    count = len(parts)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]
    layers, done = [job.name for part in parts for job in part if job.shown], 0
    errors: dict[str, float | None] = {}
    places: dict[str, str] = {}
    size = 0
    for name, part in zip(names, parts, strict=True):
        if not (folder / name).exists():
            tensors: dict[str, Tensor] = {}
            found: dict[str, float | None] = {}
            for job in part:
                made, error = _made(job, folder)
                tensors |= {key: value.contiguous() for key, value in made.items()}
                if job.shown:
                    found[job.name], done = error, done + 1
                    tell(f"[{done}/{len(layers)}] {job.name}" + ("" if error is None else f"  error {error:.4f}"))
            write_bytes(folder / name, save(tensors, {"format": "pt", "structlin": json.dumps(found)}))
        else:
            done += sum(job.shown for job in part)
            tell(f"[{done}/{len(layers)}] {name} was there")
        keys, found, here = _read(folder / name)
        errors |= found
        places |= dict.fromkeys(keys, name)
        size += here
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_bytes(folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    finish(folder)
    (folder / SETTINGS).unlink()
    refuse(target)
    folder.rename(target)
    return errors


def _made(job: Job, folder: Path) -> tuple[Mapping[str, Tensor], float | None]:
    """What ``job`` makes; where that cannot be done, and nothing else was, ``folder`` goes."""
    try:
        return job.make()
    except ValueError as problem:
        if [path.name for path in folder.iterdir()] == [SETTINGS]:
            shutil.rmtree(folder)
        raise ValueError(f"{job.name}: {problem}") from None


def _enter(folder: Path, settings: Mapping[str, Any], target: Path) -> None:
    """Make the folder, or check that it is of the same work."""
    wanted = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if folder.exists():
        path = folder / SETTINGS
        if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            raise ValueError(
                f"{folder} is unfinished work for {target} with other settings or another source; "
                "repeat the command that began it, or delete the folder"
            )
        return
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / SETTINGS).write_text(wanted, encoding="utf-8")
    fresh.rename(folder)


def _pack(jobs: Iterable[Job], part_bytes: int) -> list[list[Job]]:
    parts: list[list[Job]] = [[]]
    for job in jobs:
        if parts[-1] and sum(other.size for other in parts[-1]) + job.size > part_bytes:
            parts.append([])
        parts[-1].append(job)
    return parts


def _read(path: Path) -> tuple[list[str], dict[str, float | None], int]:
    """Names, errors and bytes of a part."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), json.loads(file.metadata()["structlin"]), path.stat().st_size
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and repeat the command") from None
