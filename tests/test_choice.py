"""What `auto` runs: every candidate can win, and where a choice comes from. Times are made up."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import structlin as sl
from structlin import costs
from structlin.nn import linear
from structlin.nn.explain import layer_key
from structlin.ops import choice, measure, store
from structlin.ops.choice import Choice
from structlin.ops.joined import joined
from structlin.ops.lowering import lower
from structlin.ops.moves import Kernels
from structlin.ops.work import joined_work, work
from structlin.testing import assert_close, inputs, make, plain

EVEN = {"joined": 2.2, "triton": 2.0, "bmm": 2.0, "dense": 2.0}


class FakeClock:
    """Runs what it is given and says what ``ms`` has for its backend; ``asked`` has the launch and backend of each."""

    def __init__(self, monkeypatch):
        self.ms = {"eager": dict(EVEN), "graph": dict(EVEN)}
        self.asked: list[tuple[str, str]] = []
        self.out_of_memory: set[str] = set()
        last: list[str] = []
        forward = measure._Operands._forward

        def watched(operands, backend, kept):
            if backend in self.out_of_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            last[:] = [backend]
            return forward(operands, backend, kept)

        def seconds(run, device, ahead):
            run()
            launch = "graph" if ahead else "eager"
            self.asked.append((launch, last[0]))
            return self.ms[launch][last[0]] / 1e3

        monkeypatch.setattr(measure._Operands, "_forward", watched)
        monkeypatch.setattr(measure, "seconds", seconds)

    def fastest(self, eager, graph):
        self.ms = {"eager": EVEN | {eager: 1.0}, "graph": EVEN | {graph: 1.0}}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A CPU that is measured as a GPU would be, with a kernel of ours to choose, and a cache of its own."""
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path / "choices"))
    monkeypatch.setattr(choice, "MEASURED", ("cuda", "cpu"))
    ours = ("triton", "bmm")
    monkeypatch.setattr(measure, "structured", lambda what, *_: ours if joined(what) is None else ("joined", *ours))
    rule = choice.rule
    rule.cache_clear()  # of keys of a CPU as it is
    yield FakeClock(monkeypatch)
    rule.cache_clear()


@pytest.fixture
def no_clock(clock, monkeypatch):
    """The same, and timing anything is an error."""
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail(f"measures {subject}"))
    return clock


@contextlib.contextmanager
def seen(monkeypatch):
    """What layers run in this block: "joined", "triton", "bmm" or "dense"."""
    ran: list[str] = []
    multiply, weight, one = linear.multiply, linear.dense.weight, linear.joined.multiply

    def product(x, factors, what, keep, kernels, bias):
        ran.append("triton" if kernels else "bmm")
        return multiply(x, factors, what, keep, kernels, bias)

    with monkeypatch.context() as patched:
        patched.setattr(linear, "multiply", product)
        patched.setattr(linear.joined, "multiply", lambda *given: (ran.append("joined"), one(*given))[1])
        patched.setattr(linear.dense, "weight", lambda *given: (ran.append("dense"), weight(*given))[1])
        # what measures calls the same functions, by the names of its own module
        patched.setattr(measure, "multiply", multiply)
        patched.setattr(measure.dense, "weight", linear.dense.weight)
        yield ran


def layer_of(spec=None, shape=(24, 16), **options):
    return make(spec or sl.Monarch(2), shape, "cpu", torch.float32, **options)


def ran_by(layer, x, monkeypatch):
    with seen(monkeypatch) as ran:
        y = layer(x)
    assert_close(y, plain(layer, x), 1e-5)
    return ran[-1]


@pytest.mark.parametrize("winner", choice.CANDIDATES)
@pytest.mark.parametrize("training", [True, False])
def test_the_fastest_runs_and_is_measured_once(winner, training, clock, monkeypatch):
    clock.fastest(winner, "bmm")
    layer = layer_of(sl.Dyad(4)).train(training)
    with torch.set_grad_enabled(training):
        assert ran_by(layer, inputs(layer, 5), monkeypatch) == winner
        taken = len(clock.asked)
        assert taken == 2 * 4 * measure.SAMPLES
        # another layer of the kind, and another number of tokens with the same power of two
        other = layer_of(sl.Dyad(4)).train(training)
        assert ran_by(other, inputs(other, 2, 4), monkeypatch) == winner
        assert len(clock.asked) == taken
        ran_by(layer, inputs(layer, 9), monkeypatch)
        assert len(clock.asked) == 2 * taken


def test_gradients_are_those_of_the_layer_whatever_runs(clock):
    for winner in choice.CANDIDATES:
        choice.forget()
        clock.fastest(winner, winner)
        layer = layer_of(sl.Dyad(4), shape=(16, 24))
        x = inputs(layer, 2 ** (1 + choice.CANDIDATES.index(winner))).requires_grad_()
        tensors = (x, *layer.parameters())
        found = torch.autograd.grad(layer(x).square().sum(), tensors)
        for ours, theirs in zip(found, torch.autograd.grad(plain(layer, x).square().sum(), tensors), strict=True):
            assert_close(ours, theirs, 1e-5)


def test_what_a_choice_depends_on(clock):
    layer, wide = layer_of(), layer_of(shape=(48, 16))
    x = inputs(layer, 8)

    def new(run):
        before = len(clock.asked)
        run()
        return len(clock.asked) > before

    assert new(lambda: layer(x))
    assert not new(lambda: layer(x))
    assert new(lambda: inference(layer, x))
    assert new(lambda: wide.train()(x))
    assert new(lambda: layer.train()(inputs(layer, 16)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert new(lambda: layer(x))
        assert not new(lambda: layer(x))
    assert new(lambda: layer_of(sl.Monarch(2, pad=True), shape=(23, 16))(x))


@torch.no_grad()
def inference(layer, x):
    return layer.eval()(x)


def test_dense_has_to_be_clearly_faster(clock, monkeypatch):
    clock.ms["eager"] = {"triton": 1.01, "bmm": 3.0, "dense": 1.0}
    layer = layer_of()
    assert ran_by(layer, inputs(layer, 5), monkeypatch) == "triton"


def test_who_runs_out_of_memory_loses(clock, monkeypatch):
    clock.fastest("bmm", "bmm")
    clock.out_of_memory = {"bmm"}
    layer = layer_of()
    assert ran_by(layer, inputs(layer, 5), monkeypatch) != "bmm"
    clock.out_of_memory = {*choice.CANDIDATES}
    key = layer_key(layer, 64, True)
    layer(inputs(layer, 64))
    assert choice.look(key).why == "rule"
    assert not store.path_of(choice._portable(key)).exists()


def test_measuring_leaves_no_trace(clock):
    """No gradient, no random number drawn, nothing under the caller's hooks, modes, autocast or lack of gradients."""
    layer = layer_of()
    x = inputs(layer, 5).requires_grad_()
    state = torch.get_rng_state()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert clock.asked
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.grad is None for t in (x, *layer.parameters()))
    choice.forget()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    again: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (again.append(t), t)[1], lambda t: t):
        layer(x)
    assert len(again) == len(kept)
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("winner", choice.CANDIDATES)
def test_activation_checkpoints_run_the_same_twice(winner, reentrant, clock, monkeypatch):
    clock.fastest(winner, "bmm")
    layer = layer_of(sl.Dyad(4))
    x = inputs(layer, 5).requires_grad_()
    with seen(monkeypatch) as ran:
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert {*ran[-2:]} == {winner}
    assert_close(x.grad, torch.autograd.grad(plain(layer, x).square().sum(), x)[0], 1e-5)


# where a choice comes from when nothing can be timed


def test_a_cpu_runs_bmm_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail("measures"))
    for tokens in (1, 4096):
        layer = layer_of(sl.TensorTrain(cores=2, rank=8), shape=(64, 64))  # dense by the rule
        assert ran_by(layer, inputs(layer, tokens), monkeypatch) == "bmm"
        assert "the default where nothing was measured" in str(sl.explain(layer, tokens))


@pytest.mark.parametrize("dynamic", [False, True])
def test_tracing_takes_the_rule_and_never_times(dynamic, no_clock, monkeypatch):
    for spec, shape, wanted in ((sl.Monarch(2), (24, 16), "triton"), (sl.Monarch(2), (24, 16), "dense")):
        found = Choice("bmm", wanted, "rule")
        monkeypatch.setattr(choice, "rule", lambda key, found=found: found)
        layer = layer_of(spec, shape)
        calls: list[str] = []

        def look(graph, _, calls=calls):
            calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=look)
        x = inputs(layer, 6)
        assert_close(run(x), plain(layer, x), 1e-5)
        assert any("multiply" in call for call in calls) == (wanted == "triton")


def test_compiled_code_takes_what_was_measured_for_graphs(clock, monkeypatch):
    clock.fastest("bmm", "dense")
    layer = layer_of()
    x = inputs(layer, 8).requires_grad_()
    assert ran_by(layer, x, monkeypatch) == "bmm"
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail("measures"))
    torch._dynamo.reset()
    graphs = []
    run = torch.compile(layer, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    assert_close(run(x), plain(layer, x), 1e-5)
    assert "multiply" not in str(graphs[0].graph)
    x = inputs(layer, 3)
    assert_close(torch.func.vmap(layer)(x), plain(layer, x), 1e-5)  # transforms look inside, and choose nothing


def test_a_capture_takes_what_was_measured_for_graphs(clock, monkeypatch):
    clock.fastest("bmm", "triton")
    layer = layer_of()
    layer(inputs(layer, 8))
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail("measures"))
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    assert ran_by(layer, inputs(layer, 8), monkeypatch) == "triton"
    assert ran_by(layer, inputs(layer, 64), monkeypatch) == choice.look(layer_key(layer, 64, True)).graph


def test_a_weight_is_not_kept_by_a_capture(monkeypatch):
    layer = layer_of().eval()
    layer.backend = "dense"
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    with torch.no_grad():
        layer(inputs(layer, 5))
    assert layer._weight is None


def test_several_processes_neither_time_nor_read_the_disk(no_clock, monkeypatch):
    layer = layer_of()
    key = layer_key(layer, 8, True)
    store.save(choice._portable(key), {"eager": "bmm", "graph": "bmm", "why": "measured", "numbers": {}})
    monkeypatch.setattr(choice, "distributed", lambda: True)
    assert ran_by(layer, inputs(layer, 8), monkeypatch) == choice.rule(key).eager != "bmm"
    monkeypatch.undo()


def test_nothing_is_timed_inside_a_backward_pass(no_clock):
    layer = layer_of()

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            with torch.enable_grad():
                return layer(dx)[:, :16]

    x = inputs(layer, 8).requires_grad_()
    Inside.apply(x).sum().backward()
    assert_close(x.grad, plain(layer, torch.ones_like(x))[:, :16], 1e-5)


@pytest.mark.parametrize(
    ("spec", "better"),
    [
        (sl.Monarch(4), "structured"),
        (sl.Monarch(16, order="blocked"), "structured"),
        (sl.BTT(1), "structured"),
        (sl.BlockDiagonal(8), "structured"),
        (sl.TensorTrain(cores=2, rank=8), "dense"),
        (sl.Blast(nblocks=16, rank=1024), "structured"),
    ],
    ids=str,
)
def test_the_rule_knows_what_an_h200_measured(spec, better):
    """docs/performance.md has these layers, forward and backward."""
    plan = spec.plan(4096, 4096)
    ours = costs.seconds(work(lower(plan), None, 16384, Kernels(True, False), training=True), costs.HOPPER[2])
    dense = costs.seconds(costs.composed_work(plan, 16384, training=True), costs.HOPPER[2])
    assert ("structured" if ours < dense else "dense") == better


def test_the_rule_counts_what_joining_costs():
    """By hand: each product reads both parts and writes once; the parts are written once and added up once."""
    tokens, out, width = 1024, 64, 32
    how = joined(lower(sl.Dyad(4).plan(out, width)))
    one = joined_work(how, None, tokens, Kernels(True, False), training=True)
    assert [product.numbers for product in one.products] == 3 * [tokens * (2 * width + out) + 2 * out * width // 4]
    assert (one.copied, one.reordered, one.copies) == (2 * 3 * tokens * width, 0, 2)
    assert joined_work(how, None, tokens, Kernels(False, False)).reordered == 3 * tokens * width
    kept = joined_work(how, (60, 32), tokens, Kernels(True, False))
    assert (kept.copied, kept.copies) == (tokens * (3 * width + 60 + 64), 2)


def test_a_joined_product_wins_a_close_race_in_a_graph_only(clock, monkeypatch):
    clock.ms = {launch: EVEN | {"joined": 1.0, "triton": 0.97} for launch in ("eager", "graph")}
    layer = layer_of(sl.Dyad(4))
    layer(inputs(layer, 5))
    found = choice.look(layer_key(layer, 5, True))
    assert (found.eager, found.graph) == ("triton", "joined")


# on disk


def test_another_process_finds_the_choice_on_disk(clock, monkeypatch):
    clock.fastest("dense", "bmm")
    layer = layer_of()
    layer(inputs(layer, 8))
    choice.forget()
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail("measures"))
    warmed = []
    monkeypatch.setattr(measure, "warm_up", lambda subject, backend: warmed.append(backend))
    assert ran_by(layer, inputs(layer, 8), monkeypatch) == "dense"
    assert warmed == ["bmm"]  # which a capture would run


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\x00",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace("float32", "float64"),
        lambda text: text.replace('"eager": "dense"', '"eager": "cublas"'),
        lambda text: json.dumps({**json.loads(text), "choice": {"eager": "dense"}}),
    ],
)
def test_what_is_damaged_on_disk_is_measured_again(damage, clock):
    clock.fastest("dense", "dense")
    layer = layer_of()
    layer(inputs(layer, 8))
    (path,) = store.folder().iterdir()
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage(whole), encoding="utf-8")
    choice.forget()
    clock.asked.clear()
    layer(inputs(layer, 8))
    assert clock.asked
    assert path.read_text(encoding="utf-8") == whole


def test_a_folder_that_cannot_be_written_is_one_warning(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path / "file" / "below"))
    clock.fastest("dense", "dense")
    layer = layer_of()
    with pytest.warns(UserWarning, match="cannot be kept in .*below.*set STRUCTLIN_CACHE_DIR"):
        assert ran_by(layer, inputs(layer, 8), monkeypatch) == "dense"
    layer(inputs(layer, 64))  # a second warning would be an error


WRITER = """
import os, runpy, sys
store = runpy.run_path(sys.argv[1])
for i in range(300):
    store["save"]("key", {"who": sys.argv[2], "filling": "x" * 5000})
    found = store["load"]("key")
    assert found is not None and len(found["filling"]) == 5000, found
"""


def test_processes_that_write_at_once_never_see_half_a_file(tmp_path):
    environment = {**os.environ, "STRUCTLIN_CACHE_DIR": str(tmp_path)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, store.__file__, who], env=environment) for who in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


# the kept weight


def test_auto_keeps_a_weight_in_inference_only(clock, monkeypatch):
    clock.fastest("dense", "dense")
    layer = layer_of()
    x = inputs(layer, 5)
    with torch.no_grad():
        assert ran_by(layer, x, monkeypatch) == "dense"
        assert layer._weight is None
        layer.eval()
        assert ran_by(layer, x, monkeypatch) == "dense"
        assert layer._weight is not None
        with seen(monkeypatch) as ran:
            layer(x)
        assert not ran
        layer.first.mul_(2)
        assert_close(layer(x), plain(layer, x), 1e-5)
    with pytest.raises(ValueError, match=r"torch\.float64.* torch\.float32"):
        layer(x.double())


# telling and keeping


def test_explain_says_what_auto_runs_and_why(clock):
    layer = layer_of()
    before = sl.explain(layer, 8)
    assert str(before).startswith(
        "auto runs dense (rule; from Python triton 0.050, dense 0.045 ms on an H200, predicted"
    )
    assert not clock.asked
    clock.fastest("dense", "bmm")
    layer(inputs(layer, 8))
    found = sl.explain(layer, 8)
    assert found.choice == (
        "dense from Python, bmm in graphs (measured; from Python triton 2.000, bmm 2.000, dense 1.000 ms; "
        "in graphs triton 2.000, bmm 1.000, dense 2.000 ms)"
    )
    (row,) = found
    assert row.backend == "linear"
    assert "0.00154 MB, is kept in inference" in row.why
    assert "(rule" in sl.explain(layer, 8, training=False).choice
    layer.backend = "bmm"
    assert sl.explain(layer, 8).choice is None


def test_choices_can_be_kept_and_restored(clock, monkeypatch):
    clock.fastest("dense", "bmm")
    layer = layer_of()
    x = inputs(layer, 8)
    layer(x)
    kept = json.loads(json.dumps(sl.choices()))
    assert len(kept) == 1
    choice.forget()
    for path in store.folder().iterdir():
        path.unlink()
    clock.fastest("triton", "triton")
    assert ran_by(layer, x, monkeypatch) == "triton"
    sl.restore_choices(kept)
    assert ran_by(layer, x, monkeypatch) == "dense"
    assert sl.choices() == kept
    for wrong in (
        [],
        {"key": {"eager": "dense"}},
        {"key": {**next(iter(kept.values())), "graph": "cublas"}},
        {"a": 1},
        {"key": {**next(iter(kept.values())), "numbers": {"eager": 3}}},
    ):
        with pytest.raises(ValueError, match=r"no choice|allowed: what"):
            sl.restore_choices(wrong)
    assert sl.choices() == kept


def test_what_a_rule_chose_is_kept_too(no_clock, monkeypatch):
    layer = layer_of()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="eager")(inputs(layer, 8))
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    wanted = ran_by(layer, inputs(layer, 64), monkeypatch)
    kept = sl.choices()
    assert [found["why"] for found in kept.values()] == ["rule"] * 2
    for key in kept:  # meanwhile somebody measured
        store.save(key, {"eager": "bmm", "graph": "bmm", "why": "measured", "numbers": {}})
    choice.forget()
    assert ran_by(layer, inputs(layer, 64), monkeypatch) == "bmm" != wanted
    sl.restore_choices(kept)
    assert ran_by(layer, inputs(layer, 64), monkeypatch) == wanted


def test_a_training_checkpoint_brings_its_choices_back(clock, monkeypatch, tmp_path):
    from structlin.train import state

    clock.fastest("dense", "dense")
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters())
    layer(inputs(layer, 8))
    path = tmp_path / "run.safetensors"
    state.save(path, state.State(), layer, optimizer, {})
    choice.forget()
    clock.fastest("bmm", "bmm")
    for cached in store.folder().iterdir():
        cached.unlink()
    state.load(path, layer, optimizer, {})
    monkeypatch.setattr(measure, "times", lambda subject: pytest.fail("measures"))
    assert ran_by(layer, inputs(layer, 8), monkeypatch) == "dense"


# ahead of time


def test_tune_measures_where_nobody_else_does(monkeypatch, tmp_path):
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    clock = FakeClock(monkeypatch)
    clock.fastest("dense", "dense")
    model = nn.Sequential(layer_of(), nn.GELU(), layer_of(sl.Dyad(4), shape=(16, 24)), layer_of(), layer_of(sl.Dense()))
    found = sl.tune(model, (5, 64))
    assert [(row.layer, row.tokens, row.choice.eager) for row in found] == [
        ("0", 8, "dense"), ("0", 64, "dense"), ("2", 8, "dense"), ("2", 64, "dense")
    ]  # fmt: skip
    assert "joined         triton  bmm            dense" in str(found)
    assert "2.000 / 2.000  1.000 / 1.000" in str(found)
    assert ran_by(model[0], inputs(model[0], 8), monkeypatch) == "dense"
    assert not any(parameter.grad is not None for parameter in model.parameters())
    clock.asked.clear()
    choice.forget()
    sl.tune([model[0], model[2]], 8)
    assert not clock.asked
    (row,) = sl.tune(model[0], 8, training=False, dtype=torch.bfloat16)
    assert clock.asked
    assert (row.dtype, row.training) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("model", "tokens", "problem"),
    [
        (nn.Linear(3, 3), 8, "no structured layer"),
        ([], 8, "no structured layer"),
        (sl.StructuredLinear(16, 16, sl.Dyad(4)), 0, "tokens=0"),
        (sl.StructuredLinear(16, 16, sl.Dyad(4)), [], r"tokens=\[\]"),
        (sl.StructuredLinear(16, 16, sl.Dyad(4), device="meta"), 8, "meta device"),
    ],
)
def test_what_cannot_be_tuned_is_refused(model, tokens, problem):
    with pytest.raises(ValueError, match=problem):
        sl.tune(model, tokens)


RANK = """
import sys
from pathlib import Path
import torch
import structlin as sl
from structlin.ops import choice, measure
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
if rank:
    measure.times = lambda subject: 1 / 0
else:
    measure.times = lambda subject: {"eager": {"bmm": 2.0, "dense": 1.0}, "graph": {"bmm": 1.0, "dense": 2.0}}
(found,) = sl.tune(sl.StructuredLinear(16, 24, sl.Monarch(2)), 8)
assert (found.choice.eager, found.choice.graph) == ("dense", "bmm"), found
assert "dense from Python, bmm in graphs" in sl.explain(sl.StructuredLinear(16, 24, sl.Monarch(2)), 8).choice
torch.distributed.barrier()
"""


def test_all_processes_run_what_the_first_one_chose(tmp_path):
    def start(rank):
        environment = {**os.environ, "STRUCTLIN_CACHE_DIR": str(tmp_path / str(rank)), "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment)

    assert [process.wait(timeout=120) for process in [start(0), start(1)]] == [0, 0]
    assert not (tmp_path / "1").exists()


# the backends by name


def test_kernels_by_name_need_a_gpu():
    layer = layer_of()
    layer.backend = "triton"
    with pytest.raises(ValueError, match=r"backend='triton' runs on GPUs.* on cpu; allowed there: auto, dense"):
        layer(inputs(layer, 5))
    meta = sl.StructuredLinear(16, 24, sl.Monarch(2), device="meta", backend="triton")
    assert meta(torch.ones(5, 16, device="meta")).shape == (5, 24)


def test_bmm_uses_no_kernel_of_ours():
    pytest.importorskip("triton")
    from structlin.ops.moves import Kernels, Relayout
    from structlin.ops.schedule import saved_widths, schedule

    def ours(text, kernels):
        for steps in schedule(text, 64, kernels):
            moves = [steps.before, steps.undo, *(m for s in steps.steps for m in (s.after, s.undo))]
            yield from (m for m in moves if isinstance(m, Relayout) and (m.kernel or m.tokens_last))
            yield from (s.forward for s in steps.steps if type(s.forward).__name__ == "Blocks")

    for spec in (sl.Monarch(4), sl.Pixelfly(block_size=64)):
        text = lower(spec.plan(1024, 1024)).text
        assert list(ours(text, Kernels(True, True)))
        assert not list(ours(text, Kernels(False, False)))
    assert saved_widths(text, Kernels(True, True)) != saved_widths(text, Kernels(False, False))


def test_the_flag_reaches_the_kernels_forward_and_backward(monkeypatch):
    from structlin.ops import chain, replay

    asked = []

    def answer(device, dtype, wanted=True):
        asked.append(wanted)
        return measure.Kernels(False, False)

    for module in (chain, replay):
        monkeypatch.setattr(module, "kernels_on", answer)
    layer = layer_of()
    x = inputs(layer, 5).requires_grad_()
    for wanted in (True, False):
        for keep in (True, False):
            for run in (
                chain.multiply,
                lambda *given: torch.ops.structlin.multiply(*given[:2], given[2].text, *given[3:]),
            ):
                asked.clear()
                run(x, [layer.first, layer.second], layer._program, keep, wanted).sum().backward()
                assert {*asked} == {wanted}
                assert len(asked) >= 2
