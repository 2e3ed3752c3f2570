"""The ruler: it measures what it says, refuses what is wrong, and its options, records and words can be trusted.

No test here looks at how long something takes.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from structlin import StructuredLinear, analysis, testing
from structlin.bench import cli, contenders, gate, plot, problems, roofline, run, settings, show, timing
from structlin.cli import Parser
from structlin.ops import BACKENDS, backends_on
from structlin.report import records
from structlin.report.records import Record

PROBLEM = "monarch:nblocks=2@24x16"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline._GEMM, "cpu", 32)
    monkeypatch.setitem(roofline._COPY, "cpu", 2**22)


def options(*arguments: str) -> Namespace:
    parser = Parser(prog="structlin bench")
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def bench(*arguments: str) -> int:
    small = ["--device", "cpu", "--tokens", "8", "--repeats", "3"]
    return cli.main(options(*small, *arguments), "structlin bench")


def layer_and_inputs(text: str = PROBLEM, tokens: int = 8) -> tuple[StructuredLinear, contenders.Inputs]:
    problem = problems.read(text)
    torch.manual_seed(0)
    layer = StructuredLinear(problem.in_features, problem.out_features, problem.spec, bias=False)
    inputs = [
        (torch.randn(tokens, layer.in_features).requires_grad_(), torch.randn(tokens, layer.out_features))
        for _ in range(2)
    ]
    return layer, inputs


@pytest.mark.parametrize("name", problems.PRESETS)
def test_every_problem_of_a_preset_fits(name: str) -> None:
    chosen = problems.preset(name)
    assert [str(problem) for problem in chosen] == list(problems.PRESETS[name])
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("name", [contenders.LINEAR, contenders.CEILING, *backends_on(CPU)])
@pytest.mark.parametrize("text", [PROBLEM, "dyad:nblocks=2@24x16", "kronecker@16x24"])
def test_contenders_are_right(name: str, text: str) -> None:
    layer, inputs = layer_and_inputs(text)
    contender = contenders.build(name, layer, inputs)
    if isinstance(contender, contenders.ModuleContender) and name != contenders.LINEAR:
        assert 0 < gate.check(contender, gate.truth(layer, inputs)) < 1e-5
    for mode in contenders.MODES:
        assert contender.step(mode)(1).isfinite().all()


def test_the_compiled_contender_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    really_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: really_compile(f, backend="eager", **given))
    layer, inputs = layer_and_inputs("dyad:nblocks=2@24x16")
    contender = contenders.build(contenders.COMPILED, layer, inputs)
    assert isinstance(contender, contenders.ModuleContender)
    assert contender.call is not contender.module
    gate.check(contender, gate.truth(layer, inputs))


@pytest.mark.parametrize("text", [PROBLEM, "dyad:nblocks=2@24x16", "kronecker@16x24", "low_rank:rank=4@24x16"])
def test_the_ceiling_does_the_work_of_the_plan(text: str) -> None:
    plan, tokens = problems.read(text).plan, 8
    ceiling = contenders.CeilingContender(plan, tokens, 2, CPU, torch.float32)
    for mode in contenders.MODES:
        with FlopCounterMode(display=False) as counted:
            ceiling.step(mode)(0)
        assert counted.get_total_flops() == roofline.PASSES[mode] * tokens * analysis.flops(plan)


def test_forward_and_backward_leave_the_gradients_of_one_call() -> None:
    layer, inputs = layer_and_inputs()
    contender = contenders.ModuleContender(layer, inputs)
    step = contender.step(contenders.FORWARD_BACKWARD)
    step(0)
    step(0)
    x, dy = inputs[0]
    wanted = torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
    for found, grad in zip((x.grad, *(p.grad for p in layer.parameters())), wanted, strict=True):
        assert found is not None
        testing.assert_close(found, grad, 1e-6)
    contender.clear()
    assert x.grad is None
    assert all(p.grad is None for p in layer.parameters())


class Wrong(nn.Module):
    """A layer with one planted mistake."""

    def __init__(self, layer: StructuredLinear, mistake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mistake = mistake
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.mistake(testing.plain(self.layer[0], x))


class HalfGradient(torch.autograd.Function):
    """Right forward, half the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx / 2


MISTAKES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "scaled": ("output", lambda y: y * 1.001),
    "one element": ("output", lambda y: y + torch.eye(*y.shape)),
    "not written": ("output", lambda y: torch.full_like(y, float("nan"))),
    "gradient": ("gradient", lambda y: HalfGradient.apply(y)),
    "training only": ("output", lambda y: y * 2 if torch.is_grad_enabled() else y),
    "inference only": ("output", lambda y: y if torch.is_grad_enabled() else y * 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_sees(mistake: str) -> None:
    layer, inputs = layer_and_inputs()
    what, function = MISTAKES[mistake]
    if mistake == "training only":
        what = "gradient"  # autograd sees the factor too
    with pytest.raises(AssertionError, match=f"^{what}.* against float64"):
        gate.check(contenders.ModuleContender(Wrong(layer, function), inputs), gate.truth(layer, inputs))


def test_a_red_gate_refuses_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contenders.build

    def build(name: str, layer: StructuredLinear, inputs: contenders.Inputs) -> contenders.Contender:
        if name == "bmm":
            return contenders.ModuleContender(Wrong(layer, lambda y: y * 1.001), inputs)
        if name == "copy":
            raise RuntimeError("no such device\nin this machine")
        return right(name, layer, inputs)

    monkeypatch.setattr(contenders, "build", build)
    out = tmp_path / "bench.json"
    assert bench("--problem", PROBLEM, "--out", str(out)) == 1
    found = {record["config"]["backend"]: record for record in records.read(out)}
    for name, reason in (
        ("bmm", "not timed, because it is wrong: output"),
        ("copy", "cannot run: RuntimeError: no such"),
    ):
        assert found[name]["status"] == "failed"
        assert str(found[name]["error"]).startswith(reason)
        assert not found[name]["metrics"]
    assert found["reference"]["status"] == "ok"
    assert found["reference"]["metrics"]["eager_forward_ms"]
    assert f"{PROBLEM} bmm: not timed" in capsys.readouterr().out


def test_a_run_writes_valid_records_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    assert bench("--problem", PROBLEM, "--problem", "dyad:nblocks=2@24x16", "--out", str(out)) == 0
    found = records.read(out)
    assert len(found) == 2 * (2 + len(backends_on(CPU)))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for record in found:
        metrics = record["metrics"]
        backend = record["config"]["backend"]
        assert (metrics["error"] is not None) == (backend in BACKENDS)
        for mode in contenders.MODES:
            low, median, high = (metrics[f"eager_{mode}_{name}"] for name in ("p10_ms", "ms", "p90_ms"))
            assert low is not None
            assert median is not None
            assert high is not None
            assert 0 < low <= median <= high
            assert metrics[f"eager_{mode}_samples"] == 3
            assert metrics[f"graph_{mode}_speedup"] is None
            assert (metrics[f"eager_{mode}_speedup"] == 1) == (backend == contenders.LINEAR)
    text = capsys.readouterr().out
    assert "8 tokens, float32" in text
    assert all(name in text for name in (PROBLEM, "forward+backward", "dense wins", *backends_on(CPU)))
    assert "graph" not in text.splitlines()[2]
    assert cli.main(options("--plot", str(out)), "structlin bench") == 0
    assert capsys.readouterr().out == text


def test_rates_are_those_of_the_time(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench("--problem", PROBLEM, "--out", str(out), "--backends", "bmm")
    linear, bmm = records.read(out)
    plan = problems.read(PROBLEM).plan
    for record, flops, nbytes in (
        (linear, 2 * 24 * 16, 4 * (8 * (24 + 16) + 24 * 16)),
        (bmm, analysis.flops(plan), analysis.traffic(plan, 8, 4)),
    ):
        metrics = record["metrics"]
        seconds = (metrics["eager_forward_backward_ms"] or 0) / 1e3
        assert metrics["forward_backward_tflops"] == pytest.approx(3 * (8 * flops) / seconds / 1e12)
        assert metrics["forward_backward_gbps"] == pytest.approx(3 * nbytes / seconds / 1e9)
    assert bmm["metrics"]["eager_forward_speedup"] == pytest.approx(
        (linear["metrics"]["eager_forward_ms"] or 0) / (bmm["metrics"]["eager_forward_ms"] or 0)
    )


def test_the_floor_is_the_slower_ceiling_of_every_step() -> None:
    plan = problems.read("low_rank:rank=4@24x16").plan
    slow_memory, slow_flops = roofline.Ceilings(1e12, 1.0), roofline.Ceilings(1.0, 1e12)
    assert roofline.floor(plan, "forward", 8, 2, slow_memory) == pytest.approx(analysis.traffic(plan, 8, 2))
    assert roofline.floor(plan, "forward_backward", 8, 2, slow_flops) == pytest.approx(3 * 8 * analysis.flops(plan))


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = timing.take_turns(timing.Clock(CPU), runs, sets=2, repeats=4)
    assert "".join(turns[3:]) == "abc" * 4
    assert {time.samples for time in times.values()} == {4}


def test_a_budget_ends_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.BUDGET, "cpu", 0.0)
    times = timing.take_turns(timing.Clock(CPU), {"a": lambda: None}, sets=1, repeats=100)
    assert times["a"].samples == timing.MIN_SAMPLES


def test_a_pass_goes_through_all_inputs() -> None:
    seen: list[int] = []

    def step(index: int) -> Tensor:
        seen.append(index)
        return torch.tensor(index)

    assert timing.one_pass(step, 3)() == 2
    assert seen == [0, 1, 2]


def test_only_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench("--problem", PROBLEM, "--only-forward", "--json", "--backends", "bmm", "--out", str(out)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert not any("backward" in name for record in records.read(out) for name in record["metrics"])


def test_a_block_is_measured_beside_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    out = tmp_path / "block.json"
    assert bench("--problem", "block monarch:nblocks=4@64x4", "--out", str(out)) == 0
    found = {record["config"]["backend"]: record for record in records.read(out)}
    assert list(found) == list(problems.BLOCK_CONTENDERS)
    for record in found.values():
        assert record["config"]["structure"] == "block monarch:nblocks=4"
        assert record["metrics"]["error"] < 1e-5
        assert record["metrics"]["eager_forward_backward_ms"] > 0
    assert found["linear"]["metrics"]["eager_forward_backward_speedup"] == 1


def test_a_block_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(module: nn.Module, **_: object) -> Callable[[Tensor], Tensor]:
        structured = any(isinstance(part, StructuredLinear) for part in module.modules())
        return lambda x: module(x) * (1.01 if structured else 1.0)

    monkeypatch.setattr(torch, "compile", compiled)
    out = tmp_path / "block.json"
    assert bench("--problem", "block monarch:nblocks=4@64x4", "--out", str(out)) == 1
    assert [record["status"] for record in records.read(out)] == ["ok", "failed", "failed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problem", "block monarch@65x4"], "--problem: 'block monarch@65x4': the width must be a multiple of 64"),
        (
            ["--problem", "block monarch@64"],
            "--problem: 'block monarch@64' is not of the form block SPEC@",
        ),
        (["--problem", "block monarch:nblocks=5@64x4"], "--problem: 'block monarch:nblocks=5@64x4': nblocks=5"),
        (["--preset", "smok"], "--preset: 'smok' is unknown; did you mean 'smoke'?"),
        (["--problem", "monarch"], "--problem: 'monarch' is not of the form SPEC@OUTxIN"),
        (["--problem", "monach@4x4"], "--problem: unknown structure 'monach'"),
        (["--problem", "monarch:nblocks=3@16x16"], "--problem: 'monarch:nblocks=3@16x16': nblocks=3"),
        (["--problem", "kronecker@0x16"], "--problem: 'kronecker@0x16' has no features"),
        (["--problem", PROBLEM, "--problem", PROBLEM], f"--problem: {PROBLEM!r} is given twice"),
        (["--problem", PROBLEM, "--preset", "smoke"], "--problem: cannot be combined with --preset"),
        (["--tokens", "0"], "--tokens: 0 is given; allowed: 1 or more"),
        (["--repeats", "2"], "--repeats: 2 is given; allowed: 3 or more"),
        (["--seed", "-1"], "--seed: -1 is given; allowed: 0 or more"),
        (["--dtype", "float31"], "--dtype: 'float31' is unknown; did you mean 'float32'?"),
        (["--device", "gpu"], "--device: 'gpu' is unknown"),
        (["--backends", "bmm,coppy"], "--backends: 'coppy' is unknown; did you mean 'copy'?"),
        (["--backends", "bmm,bmm"], "--backends: 'bmm' is given twice"),
        (["--out", "results"], "--out: results is given; allowed: a path that ends in .json"),
        (["--plot", "nothing.json"], "nothing.json: No such file or directory"),
        (["--plot", "some.json", "--seed", "1"], "--plot: measures nothing and leaves no room for --seed"),
        (
            ["--problem", "block monarch:nblocks=4@64x4", "--only-forward"],
            "--only-forward: block monarch:nblocks=4@64x4",
        ),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(options(*arguments), "structlin bench") == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith(f"structlin bench: error: {said}")
    assert not list(tmp_path.iterdir())


def test_words_are_not_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options("--tokens", "many")
    assert capsys.readouterr().err == "structlin bench: error: --tokens: 'many' is given; allowed: whole numbers\n"


def test_a_file_of_another_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    same = ("--problem", PROBLEM, "--backends", "bmm", "--out", str(out))
    assert bench(*same) == 0
    assert bench(*same) == 0  # the same settings replace it
    before = out.read_bytes()
    capsys.readouterr()
    assert bench(*same, "--seed", "1") == 2
    assert "holds a run with other settings; choose another file" in capsys.readouterr().err
    assert out.read_bytes() == before
    out.write_text("{}")
    assert bench(*same) == 2
    assert out.read_text() == "{}"


def test_files_are_named_after_preset_and_device() -> None:
    chosen = settings.configure(preset="smoke", device="cpu")
    assert cli.default_path(chosen) == Path("results/bench-smoke-cpu.json")


def example(problem: str, backend: str, **metrics: float) -> Record:
    chosen = settings.configure(problem=[problem], device="cpu")
    where = {"created": "2026-01-31T12:00:00+00:00", "command": "structlin bench", "seed": 0, "commit": None}
    where |= {"device": {"type": "cpu", "name": "a CPU", "threads": 2}, "versions": {"torch": "2.13.0"}}
    return run._record(where, chosen, chosen.problems[0], backend, dict(metrics), run.NO_GRAPH, None)


def test_break_even_says_where_dense_wins() -> None:
    found = [
        example(PROBLEM, "bmm", eager_forward_speedup=0.5, graph_forward_speedup=1.5),
        example(PROBLEM, "copy", eager_forward_speedup=0.75),
        example(PROBLEM, "dense", eager_forward_speedup=1.25),
        example(PROBLEM, "ceiling", eager_forward_speedup=2.0),
        example("dyad:nblocks=2@24x16", "bmm", eager_forward_speedup=1.5),
    ]
    assert show.break_even(found) == [
        f"forward launched from Python: dense wins at 1 of 2 problems: {PROBLEM} (copy 0.75x).",
        "forward as a CUDA graph: dense wins nowhere.",
    ]


def test_the_picture_prefers_graphs_and_orders_by_width() -> None:
    found = [
        example("dyad:nblocks=2@32x32", "bmm", eager_forward_speedup=0.5, graph_forward_speedup=1.5),
        example("dyad:nblocks=2@16x16", "bmm", eager_forward_speedup=0.5, graph_forward_speedup=1.25),
        example("monarch:nblocks=2:order=blocked@16x16", "copy", graph_forward_speedup=2.0),
        example("monarch:nblocks=2@16x16", "linear", graph_forward_speedup=1.0),
    ]
    key, panels = plot.speedups(found)
    assert key == "graph_forward_speedup"
    assert panels == {
        "dyad": {"bmm": {"16\n->16\n2": 1.25, "32\n->32\n2": 1.5}},
        "monarch, blocked": {"copy": {"16\n->16\n2": 2.0}},
    }
    assert plot.draw(found).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no record holds a speed-up"):
        plot.draw(found[3:])


def test_without_rich_and_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    out = tmp_path / "bench.json"
    assert bench("--problem", PROBLEM, "--backends", "bmm", "--out", str(out)) == 0
    text, notes = capsys.readouterr()
    assert text.endswith("(rich is not installed: no colours)\n")
    assert f"no picture: matplotlib is not installed; where it is, structlin bench --plot {out}" in notes
    assert not out.with_suffix(".png").exists()
