"""A comparison as one HTML page that needs nothing else: table, plots, machine, and the command that made it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from . import plots
from .records import Record, write_bytes
from .tables import HEADERS, NOTES, failures, rows

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }
.results th, .results td { text-align: right; white-space: nowrap; }
.results th:first-child, .results td:first-child, .facts th { text-align: left; }
.facts th { font-weight: normal; color: #666; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
tr.dense { font-weight: bold; } .failed { color: #b00020; } .notes { color: #666; font-size: .9em; }
pre { background: #f4f4f4; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Each row is the same small decoder, trained on the same batches from the same seed; only the matrices of the layers
that match <code>{{ where }}</code> differ.</p>
<div class="wide"><table class="results">
<tr>{% for header in headers %}<th>{{ header }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row[0] == "dense" %} class="dense"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for line in failures %}<p class="failed">{{ line }}</p>
{% endfor %}<p class="notes">{{ notes }}</p>
<h2>Loss against cost</h2>
<img alt="Validation loss against FLOPs per token and against seconds" src="data:image/png;base64,{{ pareto }}">
<h2>Loss during training</h2>
<img alt="Validation loss against steps and against seconds" src="data:image/png;base64,{{ curves }}">
<h2>Command</h2>
<pre>{{ command }}</pre>
{% for heading, facts in tables %}<h2>{{ heading }}</h2>
<table class="facts">
{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% endfor %}</body>
</html>
"""


def page(records: Sequence[Record], curves: bytes, pareto: bytes) -> str:
    """The page for ``records`` (at least one, of one run), with both plots (PNG) inside it."""
    first, last = records[0], max(records, key=lambda record: record["created"])
    run = {name: value for name, value in first["config"].items() if name != "structure"}
    machine = {**first["device"], **first["versions"], "commit": first["commit"], "finished": last["created"]}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE).render(
        title="Dense and structured layers, side by side",
        where=run.get("where", "*"),
        headers=HEADERS,
        rows=rows(records),
        failures=failures(records),
        notes=NOTES,
        pareto=base64.b64encode(pareto).decode(),
        curves=base64.b64encode(curves).decode(),
        command=last["command"],
        tables=[("Machine", machine), ("Run", flat(run))],
    )


def write_report(folder: Path, records: Sequence[Record]) -> None:
    """Write ``curves.png``, ``pareto.png`` and ``report.html`` of ``records`` into ``folder``.

    Raises:
        OSError: when the disk is full; the files before stay.
    """
    curves, pareto = plots.curves(records), plots.pareto(records)
    write_bytes(folder / "curves.png", curves)
    write_bytes(folder / "pareto.png", pareto)
    write_bytes(folder / "report.html", page(records, curves, pareto).encode())


def flat(values: dict[str, Any]) -> dict[str, str]:
    """Nested values as one list of facts: ``{"model": {"width": 64}}`` is ``{"model.width": "64"}``."""
    facts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            facts |= {f"{name}.{inner}": text for inner, text in flat(value).items()}
        else:
            facts[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return facts
