"""A search as one HTML page that needs nothing else: every trial as a point and a row, what it was, and its curve.

The page is drawn by a small script of its own, so that it opens offline and weighs little more than its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from .html import flat
from .plots import COLOURS, front
from .records import Record, write_bytes
from .tables import by_loss, short

COLUMNS = (
    ("valid_loss", "valid loss"),
    ("train_flops", "training FLOPs"),
    ("train_seconds", "seconds"),
    ("model_params", "params"),
    ("width", "width"),
    ("steps", "steps"),
    ("budget_share", "share of budget"),
    ("omega", "omega"),
    ("psi", "psi"),
    ("nu", "nu"),
    ("peak_memory_bytes", "peak memory"),
)
"""Metric and heading of what the page sorts, plots and colours by."""

FACTS = (
    ("trial", "trial"),
    ("attempt", "attempt"),
    ("factors", "factors"),
    ("train_loss", "training loss"),
    ("flops_per_example", "FLOPs per example"),
    ("examples", "examples"),
    ("device", "device"),
    ("created", "finished"),
)
"""What else the page says about the trial that is chosen."""

HEADERS = ("structure", "width", "steps", "valid loss", "training FLOPs", "seconds", "params", "omega", "psi", "nu")

BUDGETS = {"flops": "FLOPs in training", "seconds": "seconds in training steps", "params": "parameters"}
GROWN = {"width": "the width of the model", "steps": "the number of steps"}

NOTES = (
    "Training FLOPs: three times those of the forward passes, a multiply-add counted as two. Seconds: in training "
    "steps only. omega: parameter sharing, 0 without; psi: 1 is full rank; nu: 1 is the compute of a dense matrix; of "
    "a point of the einsum space by its exponents, of other structures by their sizes at a square layer. Factors: "
    "their sizes there; points that round to the same sizes are the same structure. The grey line joins finished "
    "trials that no other beats in both directions."
)
"""What the columns mean."""


def page(records: Sequence[Record]) -> str:
    """The page for the ``records`` of one search, the dense model's first."""
    first, last = records[0], max(records, key=lambda record: record["created"])
    own = ("trial", "attempt", "width", "stopped", "factors")
    config = {name: value for name, value in first["config"].items() if name not in own}
    machine = {**first["device"], **first["versions"], "commit": first["commit"], "finished": last["created"]}
    present = [column for column in COLUMNS if any(_values(record)[column[0]] is not None for record in records)]
    families = {record["name"].partition(":")[0] for record in records if record["name"] != "dense"}
    start = {"x": cost(records), "y": "valid_loss", "colour": "family" if len(families) > 1 else "omega"}
    start["curve"] = "seconds"
    data = {"trials": [_trial(record) for record in records], "columns": present, "facts": FACTS, "start": start}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files(__package__).joinpath("search.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title="Search for a structure",
        summary=summary(records),
        notes=NOTES,
        command=last["command"],
        tables=[("Machine", machine), ("Search", flat(config))],
        data=_embedded(data),
        colours=_embedded(COLOURS),
    )


def write_search(folder: Path, records: Sequence[Record]) -> None:
    """Write ``report.html`` of ``records`` (at least one) into ``folder``.

    Raises:
        OSError: when the disk is full; the file before stays.
    """
    write_bytes(folder / "report.html", page(records).encode())


def summary(records: Sequence[Record]) -> str:
    """What was the same for all, how they were sized, and the best, in three sentences."""
    config = records[0]["config"]
    what = BUDGETS[config["equal"]]
    found = [record for record in by_loss(records) if record["metrics"].get("valid_loss") is not None]
    spend = [record["config"]["spend"] for record in records if record["config"]["spend"]]
    best = f" Lowest loss: {found[0]['name']}, {found[0]['metrics']['valid_loss']:.4f}." if found else ""
    if found and records[0]["name"] == "dense" and records[0]["metrics"]["valid_loss"] is not None:
        best += f" Dense: {records[0]['metrics']['valid_loss']:.4f}."
    amount = f"{short(spend[0]) if spend[0] >= 1000 else f'{spend[0]:.4g}'} " if spend else ""
    return (
        f"Task {config['task']}, {len(records)} runs with the same {amount}{what}: what a structure saves goes into "
        f"{GROWN[config['grow']]}.{best}"
    )


def frontier(records: Sequence[Record], metric: str) -> list[Record]:
    """The finished records that no other is at or below in both ``metric`` and validation loss."""
    points: dict[tuple[float, float], Record] = {}
    for record in records:
        x, y = record["metrics"].get(metric), record["metrics"].get("valid_loss")
        if x is not None and y is not None:
            points.setdefault((x, y), record)
    return [points[point] for point in zip(*front(list(points)), strict=True)]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """A row under `HEADERS` for each record, the lowest loss first, and then what was stopped or failed."""
    return [_row(record) for record in by_loss(records)]


def _row(record: Record) -> list[str]:
    values = _values(record)
    loss = f"{values['valid_loss']:.4f}" if values["valid_loss"] is not None else _state(record)
    exponents = ["-" if values[name] is None else f"{values[name]:.2f}" for name in ("omega", "psi", "nu")]
    seconds = f"{values['train_seconds'] or 0:.1f}"
    amounts = [short(values["train_flops"] or 0), seconds, short(values["model_params"] or 0)]
    return [record["name"], str(values["width"]), str(values["steps"]), loss, *amounts, *exponents]


def _trial(record: Record) -> dict[str, Any]:
    config, metrics = record["config"], record["metrics"]
    return {
        "id": config["trial"],
        "name": record["name"],
        "family": record["name"].partition(":")[0],
        "state": _state(record),
        "values": _values(record),
        "facts": {
            "trial": config["trial"] if config["trial"] >= 0 else "dense model", "attempt": config["attempt"],
            "factors": config["factors"], "train_loss": metrics.get("train_loss"),
            "flops_per_example": metrics.get("flops_per_example"), "examples": metrics.get("examples"),
            "device": record["device"].get("name"), "created": record["created"],
        },
        "series": record.get("series", {}),
        "error": record["error"],
    }  # fmt: skip


def _values(record: Record) -> dict[str, Any]:
    values = {**record["metrics"], "width": record["config"]["width"]}
    return {name: values.get(name) for name, _ in COLUMNS}


def _state(record: Record) -> str:
    return "failed" if record["status"] == "failed" else "stopped" if record["config"]["stopped"] else "ok"


def cost(records: Sequence[Record]) -> str:
    """The metric that losses are shown against at first: one that is not the same for all."""
    return "model_params" if records[0]["config"]["equal"] != "params" else "train_flops"


def _embedded(value: Any) -> markupsafe.Markup:
    """JSON inside a script, where no text can end it."""
    return markupsafe.Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))
