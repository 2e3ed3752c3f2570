"""The main job: the model, the loop, and the runner under every fault that a long run meets.

Runs are real: each structure trains in its own process on a small text, and the faults are kill signals, poisoned
checkpoints and a device that is full.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from structlin import StructuredLinear, param_groups
from structlin.models.gpt import GPT, GPTConfig, flops_per_token
from structlin.report import records
from structlin.report.records import Record
from structlin.train import compare, config, data, worker

TEXT = data.split({f"{i}.txt": f"{i}: the quick brown fox jumps over the lazy dog\n".encode() * 9 for i in range(60)})
STEPS = 16  # a checkpoint after every second


def text() -> data.Text:
    return data.Text(*TEXT, sources=("test",), files=60)


def configure(structures: str = "dense,monarch:nblocks=4", **options: Any) -> config.Config:
    return config.configure(text(), structures=structures, **{"preset": "smoke", "steps": STEPS, **options})


def run(folder: Path, watch: Callable[[compare.Event], None] = lambda event: None, **options: Any) -> list[Record]:
    return compare.compare(configure(**options), text(), folder, "structlin compare", watch)


def job(folder: Path, structure: str = "monarch:nblocks=4", **options: Any) -> worker.Job:
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(text().train)
    (folder / "valid.bin").write_bytes(text().valid)
    return worker.Job(configure(structure, **options), structure, folder, "structlin compare")


def numbers(record: Record) -> dict[str, Any]:
    """What must be equal, to the last bit, however often a run was interrupted."""
    series = record.get("series", {})
    exact = {name: record["metrics"][name] for name in ("steps", "train_loss", "valid_loss", "bits_per_byte")}
    return {**exact, **{name: series[name] for name in ("step", "train_loss", "valid_loss")}}


def kill_at(structure: str, step: int) -> Callable[[compare.Event], None]:
    """Kill the worker of ``structure`` with SIGKILL when it says that it did ``step``."""

    def watch(event: compare.Event) -> None:
        if event.structure == structure and event.values.get("step") == step:
            os.kill(event.pid, signal.SIGKILL)

    return watch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, run(folder)


# the model


def test_the_model_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=16, width=16, depth=2, heads=2))
    tokens = torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] ^= 1
    same = (model(tokens) == model(changed)).all(dim=-1)[0]
    assert same[:9].all()
    assert not same[9:].any()


def test_the_model_knows_positions() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=16, width=16, depth=2, heads=2))
    shuffled = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert not torch.allclose(shuffled[0][0, -1], shuffled[1][0, -1], atol=1e-4)


@pytest.mark.parametrize("structure", ["dense", "monarch:nblocks=4", "kronecker"])
def test_flops_are_those_that_torch_counts(structure: str) -> None:
    model, conversion = worker.build(configure(structure, where="all"), structure)
    sizes, tokens = model.config, torch.zeros(3, model.config.context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    pairs = sizes.context * (sizes.context + 1) // 2  # of positions that attention multiplies, twice
    attention = 2 * sizes.depth * 2 * sizes.width * pairs
    assert flops_per_token(model) * sizes.context == products // 3 + attention
    assert len(conversion) == 4 * sizes.depth


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width=36 is not a multiple of 2 \\* heads = 8"):
        GPTConfig(width=36, heads=4)


# one structure


def test_layers_that_stay_start_equal() -> None:
    dense, _ = worker.build(configure("dense"), "dense")
    monarch, conversion = worker.build(configure("monarch"), "monarch")
    common = dense.state_dict().keys() & monarch.state_dict().keys()
    assert {swap.name for swap in conversion} == {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("up", "down")}
    assert "embedding.weight" in common
    assert all(
        torch.equal(dense.state_dict()[name], monarch.state_dict()[name]) for name in common if "mlp" not in name
    )
    other, _ = worker.build(configure("dense", seed=1), "dense")
    assert not torch.equal(dense.head.weight, other.head.weight)


def test_every_factor_gets_its_own_learning_rate(tmp_path: Path) -> None:
    trainer = worker.Trainer(job(tmp_path))
    expected = [group["lr"] for group in param_groups(trainer.model, lr=trainer.job.config.lr)]
    trainer.step()
    peak = max(worker.schedule(step, STEPS) for step in range(STEPS))
    first = [group["lr"] / worker.schedule(0, STEPS) for group in trainer.optimizer.param_groups]
    assert len(set(expected)) > 1
    assert first == pytest.approx(expected)
    assert peak == pytest.approx(1.0, abs=0.05)


def test_the_schedule_rises_then_falls_to_zero() -> None:
    rates = [worker.schedule(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 1e-3


def test_training_learns(tmp_path: Path) -> None:
    emitted: list[dict[str, Any]] = []
    record = worker.train(job(tmp_path), emitted.append)
    assert [event["step"] for event in emitted if "step" in event] == list(range(1, STEPS + 1))
    curve = record["series"]["valid_loss"]
    assert curve[0] > 2.5
    assert curve[-1] < 2
    assert min(curve) == curve[-1]
    assert record["status"] == "ok"
    records.validate(record)


def test_bfloat16_narrows_the_products_and_keeps_weights_wide(tmp_path: Path) -> None:
    trainer = worker.Trainer(job(tmp_path, dtype="bfloat16"))
    windows = trainer.batch(0)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.loss(windows) != trainer.model.loss(windows)
    assert trainer.loss(windows).item() == pytest.approx(trainer.model.loss(windows).item(), rel=0.01)
    first = trainer.step()
    assert trainer.step() < first


def test_metrics_follow_from_their_definitions(tmp_path: Path) -> None:
    record = worker.train(job(tmp_path), lambda event: None)
    metrics, series = record["metrics"], record["series"]
    model, conversion = worker.build(configure("monarch:nblocks=4"), "monarch:nblocks=4")
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    assert metrics["swapped_params"] == sum(p.numel() for layer in layers for p in layer.parameters())
    assert metrics["model_params"] == sum(p.numel() for p in model.parameters())
    assert metrics["swapped_flops_per_token"] == sum(swap.flops for swap in conversion)
    assert metrics["flops_per_token"] == flops_per_token(model)
    assert metrics["tokens"] == STEPS * 16 * 64
    assert metrics["tokens_per_second"] == metrics["tokens"] / metrics["train_seconds"]
    assert metrics["valid_loss"] == series["valid_loss"][-1]
    assert metrics["bits_per_byte"] == metrics["valid_loss"] / math.log(2)
    assert metrics["train_seconds"] == series["seconds"][-1]
    assert series["step"] == list(range(2, STEPS + 1, 2))
    assert series["seconds"] == sorted(series["seconds"])
    assert metrics["peak_memory_bytes"] > 50e6


def test_a_loss_that_is_not_a_number_ends_the_run_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = GPT.loss, []

    def loss(self: GPT, windows: torch.Tensor) -> torch.Tensor:
        calls.append(windows)
        # the first call is the warm-up, and validation runs without gradients
        return real(self, windows) * (math.nan if torch.is_grad_enabled() and len(calls) > 1 + 7 else 1)

    monkeypatch.setattr(GPT, "loss", loss)
    record = worker.train(job(tmp_path), lambda event: None)
    assert record["status"] == "failed"
    assert record["error"] is not None
    assert record["error"].startswith("loss is nan at step ")
    assert record["metrics"]["valid_loss"] is None
    assert record["metrics"]["steps"] == int(record["error"].split()[5])
    records.validate(record)


def test_a_checkpoint_of_another_environment_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = worker.train(job(tmp_path, steps=4), lambda event: None)
    monkeypatch.setattr(worker, "versions", lambda: {"torch": "1.0"})
    emitted: list[dict[str, Any]] = []
    second = worker.train(job(tmp_path, steps=4), emitted.append)
    assert "starts anew" in emitted[0]["note"]
    assert "written with other versions" in emitted[0]["note"]
    assert emitted[1]["step"] == 1
    assert numbers(first) == numbers(second)


def test_a_damaged_checkpoint_is_not_continued(tmp_path: Path) -> None:
    work = job(tmp_path, steps=4)
    worker.train(work, lambda event: None)
    work.checkpoint.write_bytes(work.checkpoint.read_bytes()[:1000])
    emitted: list[dict[str, Any]] = []
    worker.train(work, emitted.append)
    assert "is damaged" in emitted[0]["note"]
    assert emitted[1]["step"] == 1


def test_a_checkpoint_of_another_model_is_not_continued(tmp_path: Path) -> None:
    monarch, dense = job(tmp_path, steps=4), job(tmp_path, "dense", steps=4)
    worker.train(monarch, lambda event: None)
    assert monarch.checkpoint == dense.checkpoint
    emitted: list[dict[str, Any]] = []
    worker.train(dense, emitted.append)
    assert "is of another model" in emitted[0]["note"]
    assert emitted[1]["step"] == 1


# all of them


def test_a_run_leaves_its_records_and_no_checkpoints(undisturbed: tuple[Path, list[Record]]) -> None:
    folder, results = undisturbed
    assert records.read(folder / "results.json") == results
    assert [record["name"] for record in results] == ["dense", "monarch:nblocks=4"]
    assert {record["status"] for record in results} == {"ok"}
    assert {path.name for path in folder.iterdir()} == {".lock", "config.json", "results.json"}
    dense, monarch = results
    assert dense["metrics"]["seconds_to_dense_loss"] == dense["metrics"]["train_seconds"]
    assert monarch["metrics"]["seconds_to_dense_loss"] is None or (
        monarch["metrics"]["valid_loss"] <= dense["metrics"]["valid_loss"]
    )
    assert numbers(dense) != numbers(monarch)


def test_processes_and_their_numbers_are_their_own(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """What a worker computes does not depend on what ran before it, or in which process."""
    _, results = undisturbed
    pids: dict[str, int] = {}
    again = run(tmp_path / "run", lambda event: pids.update({event.structure: event.pid}), structures="monarch,dense")
    assert len({*pids.values(), os.getpid()}) == 3
    assert [numbers(record) for record in again] == [numbers(record) for record in reversed(results)]


def test_finished_structures_are_not_trained_again(undisturbed: tuple[Path, list[Record]]) -> None:
    folder, results = undisturbed
    events: list[compare.Event] = []
    assert run(folder, events.append) == results
    assert events == []


def test_a_killed_worker_resumes_and_ends_bit_equal(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    _, results = undisturbed
    folder = tmp_path / "run"
    dense, monarch = run(folder, kill_at("dense", 9))
    assert dense["status"] == "failed"
    assert dense["error"] == "its process was killed by SIGKILL; out of memory?"
    assert numbers(monarch) == numbers(results[1])  # the others go on
    events: list[compare.Event] = []
    dense, monarch = run(folder, events.append)
    assert {event.structure for event in events} == {"dense"}
    assert next(event.values["step"] for event in events if "step" in event.values) > 1
    assert numbers(dense) == numbers(results[0])
    assert numbers(monarch) == numbers(results[1])
    assert not (folder / "work").exists()


def test_a_parent_that_stops_leaves_no_worker_and_resumes_bit_equal(
    undisturbed: tuple[Path, list[Record]], tmp_path: Path
) -> None:
    _, results = undisturbed
    folder, pids = tmp_path / "run", set()

    def interrupt(event: compare.Event) -> None:
        pids.add(event.pid)
        if event.structure != "dense" and event.values.get("step") == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, interrupt)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)
    assert [numbers(record) for record in records.read(folder / "results.json")] == [numbers(results[0])]
    assert [numbers(record) for record in run(folder)] == [numbers(record) for record in results]


def test_a_nan_names_its_step_and_the_others_go_on(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """A poisoned checkpoint stands for a divergence: the next step of that structure, and of no other, is NaN."""
    _, results = undisturbed
    folder = tmp_path / "run"
    run(folder, kill_at("dense", 9), structures="dense,monarch")
    (folder / "results.json").unlink()
    checkpoint = folder / "work" / "0.safetensors"
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
    tensors = safetensors.torch.load_file(checkpoint)
    tensors["model.head.weight"][0, 0] = math.nan
    safetensors.torch.save_file(tensors, checkpoint, metadata=header)
    done = json.loads(header["state"])["step"]
    dense, monarch = run(folder, structures="dense,monarch")
    assert dense["status"] == "failed"
    assert dense["error"] == f"loss is nan at step {done + 1} of {STEPS}"
    assert dense["metrics"]["valid_loss"] is None
    assert monarch["status"] == "ok"
    assert numbers(monarch) == numbers(results[1])
    assert records.read(folder / "results.json") == [dense, monarch]


def test_a_rate_that_makes_weights_overflow_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    (record,) = run(tmp_path / "run", structures="monarch", lr=1e38)
    assert record["status"] == "failed"
    assert record["error"] is not None
    assert " at step " in record["error"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_keeps_what_was_finished(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    _, results = undisturbed
    folder = tmp_path / "run"
    checkpoint = folder / "work" / "1.safetensors"

    def fill(event: compare.Event) -> None:
        if event.structure == "dense" and "record" in event.values:
            checkpoint.with_name(checkpoint.name + ".tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device") as caught:
        run(folder, fill)
    assert caught.value.filename == str(checkpoint)
    assert [numbers(record) for record in records.read(folder / "results.json")] == [numbers(results[0])]
    assert [numbers(record) for record in run(folder)] == [numbers(record) for record in results]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(config.OptionError, match=r"--out: .* is in use by another run"):
            run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_unforeseen_error_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(job: worker.Job, emit: worker.Emit) -> Record:
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(worker, "train", train)
    error = worker.outcome(job(tmp_path), lambda event: None)["error"]
    assert isinstance(error, RuntimeError)
    assert str(error) == "OutOfMemoryError: out of memory"
