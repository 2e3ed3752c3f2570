"""results/README.md: what every file of records holds, where it is quoted, and the commands that made it.

PYTHONPATH=src python benchmarks/index.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from structlin.report import records

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "results" / "README.md"
HEAD = """# Results

Every figure in the documentation comes from a file here, in the schema of [docs/records.md](../docs/records.md). A
record has its device, versions, seed and commit; this page, made by `benchmarks/index.py`, has the commands. DATA and
models are folders that the script named in the command describes; a command that was given again went on with what was
missing. `benchmarks/reproduce.py` runs those of a GPU side by side, as many as its GPUs and the time allow.
"""


def quoted(name: str) -> Iterator[str]:
    """Links to the pages that name a file."""
    for page in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"]):
        if name in page.read_text(encoding="utf-8"):
            yield f"[{page.name}](../{page.relative_to(ROOT)})"


def section(path: Path) -> str:
    """What the page says of one file."""
    found = records.read(path)
    devices = sorted({str(record["device"].get("name")) for record in found})
    days = sorted({record["created"][:10] for record in found})
    commits = sorted({(record["commit"] or "no commit")[:7] for record in found})
    failed = sum(record["status"] == "failed" for record in found)
    about = [
        f"{len(found)} record{'s' * (len(found) != 1)}" + (f", {failed} of them failed" if failed else ""),
        ", ".join(devices),
        " to ".join(dict.fromkeys([days[0], days[-1]])),
        f"commit{'s' * (len(commits) != 1)} {', '.join(commits)}",
        f"quoted in {', '.join(quoted(path.name)) or 'tables that are made from it'}",
    ]
    commands = "\n".join(dict.fromkeys(record["command"] for record in found))
    return f"## {path.name}\n\n{'; '.join(about)}.\n\n```sh\n{commands}\n```\n"


def page() -> str:
    """The whole of it."""
    return "\n".join([HEAD, *map(section, sorted((ROOT / "results").glob("*.json")))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
