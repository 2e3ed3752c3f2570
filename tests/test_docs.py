"""What the documents say is true: their Python runs, their commands and links exist, and docstring examples hold."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import structlin
from structlin import cli
from structlin.report import records

ROOT = Path(__file__).parents[1]
PACKAGE = Path(structlin.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Every Python block of a page, with the file that its title names, or an empty string."""
    pattern = r"^```python(?: title=\"([^\"\n]*)\")?\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(code for _, code in blocks(ROOT / "README.md"))
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "autoencoder" / "structures.json").exists()


def test_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(code for _, code in blocks(ROOT / "docs" / "training.md"))
    exec(compile(code, "training.md", "exec"), {})
    assert (tmp_path / "normalised" / "structures.json").exists()


def test_convert_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "convert.md"
    code = "".join(code for _, code in blocks(page))
    exec(compile(code, "convert.md", "exec"), {})
    commands = re.findall(r"^structlin .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    made = {"structured", "dense-again", "dense", "monarch", "fresh", "dense-monarch"}
    assert {path.name for path in tmp_path.iterdir()} == made


@pytest.mark.slow
def test_contributing_adds_a_structure(tmp_path: Path) -> None:
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    titled = {title: code for title, code in blocks(ROOT / "CONTRIBUTING.md") if title}
    assert len(titled) == 3
    (name,) = (Path(title).stem for title in titled if not (ROOT / title).exists())
    (dense_forms,) = (title for title in titled if title.startswith("tests/"))
    for title, code in titled.items():
        with (tmp_path / title).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    with (tmp_path / dense_forms).open("a", encoding="utf-8") as file:
        file.write(f'\n\nDENSE_FORMS["{name}"] = {name}\n')
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", f"{name} or without_one", "tests/contract", "tests/papers"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name: str) -> None:
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": torch.nn, **{name: getattr(structlin, name) for name in structlin.__all__}}
    assert doctest.testmod(module, globs={**names, **vars(module)}).failed == 0


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


@every_page
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"{page.name} says `make {target}`"


def measured_rows() -> list[str]:
    """The table of docs/bench.md, from the record that it quotes."""
    times: dict[str, dict[str, dict[str, float]]] = {}
    for record in records.read(ROOT / "results" / "bench-h200.json"):
        times.setdefault(record["config"]["problem"], {})[record["config"]["backend"]] = record["metrics"]
    mode = "forward_backward"
    rows = []
    for problem, by in times.items():
        graph = [by[name].get(f"graph_{mode}_speedup") for name in ("auto", "compiled", "copy", "ceiling")]
        cells = [f"{by['linear'][f'graph_{mode}_ms']:.3f}", *("-" if g is None else f"{g:.2f}" for g in graph)]
        rows.append(f"| {problem} | {' | '.join(cells)} | {by['auto'][f'eager_{mode}_speedup']:.2f} |")
    return rows


def test_measured_tables_are_those_of_the_record() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    missing = [row for row in measured_rows() if row not in page]
    assert not missing, "\n".join(missing)
