"""What the documents say is true: their Python runs, their commands and links exist, and docstring examples hold."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

import structlin
from structlin import cli
from structlin.advise import ceilings, paper
from structlin.costs import HOPPER
from structlin.report import records
from structlin.scaling import curves, laws, report

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


def test_backends_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    code = "".join(code for _, code in blocks(ROOT / "docs" / "backends.md"))
    exec(compile(code, "backends.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(code for _, code in blocks(ROOT / "docs" / "training.md"))
    exec(compile(code, "training.md", "exec"), {})
    assert (tmp_path / "normalised" / "structures.json").exists()


def test_experts_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "".join(code for _, code in blocks(ROOT / "docs" / "experts.md"))
    exec(compile(code, "experts.md", "exec"), {})
    assert "0.router" in capsys.readouterr().out


def test_attention_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code = "".join(code for _, code in blocks(ROOT / "docs" / "attention.md"))
    exec(compile(code, "attention.md", "exec"), {})
    out = capsys.readouterr().out
    assert "pixelated:block_size=128:nfactors=4:nglobal=1:causal=true" in out
    assert "of the pairs" in out
    assert "torch.Size([1, 17])" in out


def test_problems_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(code for _, code in blocks(ROOT / "docs" / "problems.md"))
    exec(compile(code, "problems.md", "exec"), {})
    assert capsys.readouterr().out.split()[-1] == str(2 * 2 * 64 * 16)
    assert (tmp_path / "mirror" / "record.json").exists()


def test_sparsify_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "sparsify.md").read_text()
    for _, code in blocks(ROOT / "docs" / "sparsify.md"):
        exec(compile(code, "sparsify.md", "exec"), {})
    assert f"```\n{capsys.readouterr().out}```" in page


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_convert_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "convert.md"
    code = "".join(code for _, code in blocks(page))
    exec(compile(code, "convert.md", "exec"), {})
    tiny, _, _ = page.read_text(encoding="utf-8").partition("## Two pretrained models")
    commands = re.findall(r"^structlin .*$", tiny, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    made = {"structured", "dense-again", "dense", "monarch", "fresh", "dense-monarch"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_convert_page_names_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line) for line in re.findall(r"^structlin .*$", text, re.MULTILINE)]
    for name in {command[1] for command in commands}:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        known = capsys.readouterr().out
        for command in commands:
            for option in command[2:] if command[1] == name else ():
                assert not option.startswith("--") or option in known, f"structlin {name} has no {option}"


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


def measured_rows(name: str, *columns: str) -> list[str]:
    """A table of docs/performance.md: dense's time, speed-ups over it by backend, and that of "auto" in eager mode."""
    times: dict[str, dict[str, dict[str, float]]] = {}
    for record in records.read(ROOT / "results" / name):
        times.setdefault(record["config"]["problem"], {})[record["config"]["backend"]] = record["metrics"]
    mode = "forward_backward"
    rows = []
    for problem, by in times.items():
        graph = [by[name].get(f"graph_{mode}_speedup") for name in columns]
        cells = [f"{by['linear'][f'graph_{mode}_ms']:.3f}", *("-" if g is None else f"{g:.2f}" for g in graph)]
        rows.append(f"| {problem} | {' | '.join(cells)} | {by['auto'][f'eager_{mode}_speedup']:.2f} |")
    return rows


def block_rows() -> list[str]:
    """The table of blocks of docs/performance.md, from the record that it quotes."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records.read(ROOT / "results" / "blocks-h200.json"):
        shape = record["config"]["problem"].split("@")[1].replace("x", ", ")
        found.setdefault(shape, {})[record["config"]["backend"]] = record["metrics"]
    rows = []
    for shape, by in found.items():
        ours = [f"{by[name]['graph_forward_backward_speedup']:.2f}" for name in ("auto", "recompute")]
        memory = [f"{metrics['forward_backward_peak_bytes'] / 1e6:.0f}" for metrics in by.values()]
        times = [f"{by['linear']['graph_forward_backward_ms']:.3f}", *ours]
        rows.append(f"| {shape} | {' | '.join([*times, *memory])} |")
    return rows


def test_measured_tables_are_those_of_the_record() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = measured_rows("bench-h200.json", "auto", "compiled", "copy", "ceiling")
    rows += measured_rows("rows-h200.json", "auto", "copy", "ceiling") + block_rows()
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)


def test_host_times_are_those_of_the_record() -> None:
    runs = records.read(ROOT / "results" / "host-time-h200.json")
    found = {run["name"].removeprefix("host time ").split(":")[0]: run["metrics"] for run in runs}
    names = ("linear", "block_diagonal", "low_rank", "pixelfly", "btt", "dyad", "blast", "monarch")
    both, same = (
        [f"{found[name][metric]:.0f}" for name in names] for metric in ("forward_backward_us", "same_thread_us")
    )
    said = "{} us for `nn.Linear`, {} for block-diagonal, {} for low rank, {} for Pixelfly, {} for BTT, {} for DYAD, "
    said += "{} for BLAST and {} for Monarch"
    page = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert said.format(*both) in page
    assert "they are {}, {}, {}, {}, {}, {}, {} and {}, as".format(*same) in page


def test_losses_of_mixtures_are_those_of_the_record() -> None:
    runs = records.read(ROOT / "results" / "language-mixtures.json")
    losses: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        losses.setdefault((run["name"].partition("-lr")[0], run["config"]["lr"]), []).append(
            run["metrics"]["valid_loss"]
        )
    page = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    for width, budget in itertools.product((512, 1024), ("flops", "time")):
        cells = []
        for name in ("dense", "moe8", "btt_moe8", "btt_moe16"):
            title = f"moe-w{width}-{name}-{'flops' if name == 'dense' else budget}"
            low, high = sorted(min((pair for (run, _), pair in losses.items() if run == title), key=sum))
            cells.append(f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}")
        row = f"| {width} | dense's {'FLOPs' if budget == 'flops' else 'time'} | {' | '.join(cells)} |"
        assert row in page, row


def pretrained_rows(path: Path) -> list[str]:
    """The tables of docs/convert.md on pretrained models, from a record of benchmarks/real_models.py."""
    rows, tasks, dense = [], {}, {}
    for record in records.read(path):
        metrics, config = record["metrics"], record["config"]
        if config["stage"] == "tasks":
            name = record["name"].removeprefix(f"tasks {config['task']} ")
            tasks.setdefault(name, {})[config["task"]] = metrics
            continue
        if record["status"] == "failed":
            rows.append(f"| {record['name']} | cannot be done: {record['error']} |")
            continue
        cells = ["-", "-"] + ["-"] * (config["stage"] != "speed")
        if "params" in metrics:
            cells = [f"{100 * metrics[key]:.1f}" for key in ("params", "flops")]
            cells += [f"{metrics['error']:.3f}"] if config["stage"] != "speed" else []
        cells.append(f"{metrics['weight_bytes'] / 1e6:.1f}")
        if config["stage"] == "speed":
            dense = dense or metrics
            cells.append(f"{metrics['step_peak_bytes'] / 1e6:.0f}")
            for name in ("step_ms", "compiled_step_ms", "forward_ms", "compiled_forward_ms"):
                cells.append(f"{metrics[name]:.2f} ({dense[name] / metrics[name]:.2f})")
        scores = [f"{metrics['pearson']:.3f}"] if "pearson" in metrics else []
        if "loss" in metrics:
            scores = [f"{metrics['loss']:.2f}", f"{100 * metrics['blimp']:.1f}"]
        rows.append(f"| {' | '.join([record['name'], *cells, *scores])} |")
    for name, by in tasks.items():
        scores = [f"{100 * metrics['score']:.1f}" for metrics in by.values()]
        mean = sum(metrics["score"] for metrics in by.values()) / len(by)
        rows.append(f"| {name} | {100 * mean:.1f} | {' | '.join(scores)} |")
    return rows


PRETRAINED = sorted(path for glob in ("minilm*", "smollm2*") for path in (ROOT / "results").glob(f"{glob}.json"))


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_tables_of_pretrained_models_are_those_of_the_records(path: Path) -> None:
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    assert path.name in page, f"docs/convert.md does not link {path.name}"
    missing = [row for row in pretrained_rows(path) if row not in page]
    assert not missing, "\n".join(missing)


def learning_rate_rows() -> list[str]:
    """The table of docs/learning-rates.md, from the record that it quotes."""
    curves: dict[tuple[str, str, int], dict[float, float]] = {}
    for record in records.read(ROOT / "results" / "mup-h200.json"):
        config, series = record["config"], record["series"]
        curve = dict(zip(series["lr"], series["valid_loss"], strict=True))
        curves[config["structure"], config["rule"], config["width"]] = curve
    rows = []
    for structure in dict.fromkeys(structure for structure, _, _ in curves):
        cells = []
        for rule in ("param_groups", "one rate"):
            narrow, wide = curves[structure, rule, 128], curves[structure, rule, 512]
            first, last = (min(curve, key=curve.__getitem__) for curve in (narrow, wide))
            moved = f"2^{math.log2(first):.0f}, 2^{math.log2(last):.0f} | {math.log2(last / first):+.0f}"
            cells.append(f"{moved} | {wide[last]:.3f} | {wide[first]:.3f}")
        rows.append(f"| {structure} | {' | '.join(cells)} |")
    return rows


def test_the_table_of_learning_rates_is_that_of_the_record() -> None:
    page = (ROOT / "docs" / "learning-rates.md").read_text(encoding="utf-8")
    missing = [row for row in learning_rate_rows() if row not in page]
    assert not missing, "\n".join(missing)


def blocks_predicted() -> list[str]:
    """The table of predicted blocks of docs/advise.md, from the records that it quotes."""
    found: dict[str, list[str]] = {}
    for record in records.read(ROOT / "results" / "blocks-h200.json"):
        config = record["config"]
        if config["backend"] == "recompute":
            continue
        width, context = config["out_features"], int(config["problem"].rpartition("x")[2])
        spec = None if config["backend"] == "linear" else structlin.spec.parse(config["structure"].split(" ")[1])
        block = paper.Decoder(1, width, 4 * width, width // 64, width // 64, 0, gated=False)
        seconds = sum(paper.block_seconds(block, spec, config["tokens"], context, HOPPER[2]))
        row = found.setdefault(f"{width}, {context}", [])
        row += [f"{record['metrics']['graph_forward_backward_ms']:.3f}", f"{1e3 * seconds:.3f}"]
    return [f"| {size} | {' | '.join(cells)} |" for size, cells in found.items()]


def advice_rows() -> list[str]:
    """The table of docs/advise.md on STS-B, from the record that it quotes."""
    rows = []
    for record in records.read(ROOT / "results" / "advise-stsb-cpu.json"):
        metrics = record["metrics"]
        correlation = f"{metrics['spearman']:.1f} ({metrics['low']:.1f} to {metrics['high']:.1f})"
        if record["name"] == "dense":
            rows.append(f"Dense has {correlation}.")
            continue
        name, _, budget = record["name"].partition(", params ")
        gain = "-"
        if "gain" in metrics:
            gain = f"{metrics['gain']:+.1f} ({metrics['gain_low']:+.1f} to {metrics['gain_high']:+.1f})"
        rows.append(f"| {budget} | {name} | {metrics['params_share']:.3f} | {correlation} | {gain} |")
    return rows


def advice_on_text_rows() -> list[str]:
    """The table of docs/advise.md on perplexity, from the record that it quotes."""
    rows = []
    for record in records.read(ROOT / "results" / "advise-perplexity-cpu.json"):
        metrics, name = record["metrics"], record["name"].partition(", params=")[0]
        cells = [
            record["config"].get("budget", "-").removeprefix("params="),
            name,
            f"{metrics.get('params_share', 1):.3f}",
        ]
        for text in ("text", "wikitext2"):
            loss, gain = metrics[f"loss_{text}"], "-"
            if f"gain_{text}" in metrics:
                gain = f"{metrics[f'gain_{text}']:.2f} ± {metrics[f'gain_{text}_stderr']:.2f}"
            cells += [f"{math.exp(loss):.1f}", f"{loss:.2f} ± {metrics[f'loss_{text}_stderr']:.2f}", gain]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def advice_in_time_rows() -> list[str]:
    """The table of docs/advise.md on budgets of time and FLOPs, from the record that it quotes."""
    rows = []
    for record in records.read(ROOT / "results" / "advise-time-cpu.json")[1:]:
        metrics, (name, _, budget) = record["metrics"], record["name"].partition(", ")
        cells = [budget, name, f"{metrics['params_share']:.3f}", f"{metrics['time_share']:.2f}"]
        cells += [
            f"{metrics['times_as_fast']:.2f}",
            f"{metrics['spearman']:.1f} ({metrics['low']:.1f} to {metrics['high']:.1f})",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def held_out_rows() -> list[str]:
    """The table of docs/advise.md on predictions, from the records that it quotes."""
    layers = ceilings.measured(records.read(ROOT / "results" / "bench-h200.json"))
    checks = {by: ceilings.held_out(layers, by) for by in ("structure", "shape")}
    others = ceilings.unseen(records.read(ROOT / "results" / "rows-h200.json"), ceilings.fit(layers))
    for backend, name in (("linear", "dense"), ("auto", "`auto`")):
        checks[f"other records, {name}"] = [check for check in others if check.layer.backend == backend]
    rows = []
    for name, found in checks.items():
        errors = sorted(check.error for check in found)
        rows.append(f"| {name} | {len(errors)} | {median(errors):.1%} | {errors[int(0.9 * len(errors))]:.1%} |")
    return rows


def test_tables_of_advice_are_those_of_the_records() -> None:
    pytest.importorskip("scipy")
    page = (ROOT / "docs" / "advise.md").read_text(encoding="utf-8")
    rows = blocks_predicted() + advice_rows() + advice_on_text_rows() + advice_in_time_rows() + held_out_rows()
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)


def theta(*exponents: str) -> str:
    return f"einsum:theta={'x'.join(exponents)}"


BTT, WIDE = theta("0.5", "0", "0.5", "0", "0.5", "0.5", "0"), theta("0.33", "0", "0.67", "0", "0.67", "0.33", "0")
KRONECKER, TRAIN = theta("0.5", "0.5", "0", "0.5", "0.5", "0", "0"), theta("0.5", "0.5", "0", "0.5", "0.5", "0", "0.25")
HALF, MORE = theta("1", "0", "0", "0", "1", "0", "0.5"), theta("1", "0", "0", "0", "1", "0", "0.75")
NARROW = theta("0.67", "0", "0.33", "0", "0.67", "0.33", "0")
CLAIMS = (
    ("omega = 1/2 over omega = 0 (psi = 1)", [KRONECKER, TRAIN], [BTT, WIDE]),
    ("Kronecker over BTT (nu = 1/2)", [KRONECKER], [BTT]),
    ("tensor train over wide BTT (nu = 3/4, 2/3)", [TRAIN], [WIDE]),
    ("low rank over psi = 1 (omega = 0)", [HALF, MORE], [BTT, WIDE]),
    ("(0.67, 0, 0.33, 0, 0.67, 0.33, 0), psi = 2/3, over psi = 1", [NARROW], [BTT, WIDE]),
    ("omega = 0 and psi = 1 over dense", [BTT, WIDE], ["dense"]),
    ("Kronecker over dense", [KRONECKER], ["dense"]),
)


def scaling_rows() -> list[str]:
    """The tables of docs/scaling.md, from the record that they quote."""
    runs = curves.by_structure(curves.curves(records.read(ROOT / "results" / "taxonomy-cpu.json")))
    laws_of_all = report.markdown(report.rows(runs)).splitlines()
    return [*laws_of_all, *(f"| {claim} | {laws.paired(runs, ours, others)} |" for claim, ours, others in CLAIMS)]


def test_tables_of_scaling_are_those_of_the_record() -> None:
    pytest.importorskip("scipy")
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    missing = [row for row in scaling_rows() if row not in page]
    assert not missing, "\n".join(missing)


def test_advise_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    code = "".join(code for _, code in blocks(ROOT / "docs" / "advise.md"))
    exec(compile(code, "advise.md", "exec"), {})
    assert capsys.readouterr().out.count("total") == 2


def building_rows() -> list[str]:
    """The table of docs/bench.md on building layers, and the line on projection, from the record that they quote."""
    metrics = {
        record["name"].removeprefix("building "): record["metrics"]
        for record in records.read(ROOT / "results" / "building-cpu.json")
    }
    rows = []
    for name, model in metrics.items():
        if name.startswith("7B model, "):
            layer = metrics[name.removeprefix("7B model, ")]
            numbers = (layer["per_parameter_over_linear"], 1e3 * layer["build_s"], 1e3 * layer["meta_first_s"])
            times = (model["build_and_describe_s"], model["build_and_describe_cpu_s"])
            cells = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.2f}", "{:.2f}")
            shown = " | ".join(cell.format(number) for cell, number in zip(cells, numbers + times, strict=True))
            rows.append(f"| {name.removeprefix('7B model, ')} | {shown} |")
        elif name.startswith("projection"):
            rows.append(f"{model['project_s']:.1f} s by the clock and {model['project_cpu_s']:.1f} s of the processor")
    return rows


def test_building_table_is_that_of_the_record() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    missing = [row for row in building_rows() if row not in page]
    assert not missing, "\n".join(missing)
