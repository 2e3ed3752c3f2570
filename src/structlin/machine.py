"""Where a number was measured: the device, the versions and the commit that every record carries."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .version import __version__


def provenance(command: str, seed: int, device: torch.device) -> dict[str, Any]:
    """The fields of a record that say when, how and where: created, command, seed, device, versions, commit."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "device": describe_device(device),
        "versions": versions(),
        "commit": commit(),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type and name of a device, its memory in bytes, and the CPU threads and system that drive it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = cpu_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "type": device.type,
        "name": name,
        "memory_bytes": memory,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"structlin": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found


def commit() -> str | None:
    """The git commit of this source tree, with "+changes" when files differ from it; None outside of a checkout.

    Where the sources were copied without their history, STRUCTLIN_COMMIT says it.
    """
    if told := os.environ.get("STRUCTLIN_COMMIT"):
        return told
    here = Path(__file__)
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None  # an installed copy, though the folder around it may be another project's checkout
    head, changes = _git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain", "--untracked-files=no", ":/")
    return f"{head}+changes" if head and changes else head


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", file.parent, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
