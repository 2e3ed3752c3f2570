"""Pretraining runs: what they write, that they go on to the same bits after every fault, and what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from structlin import StructuredLinear
from structlin.ops import choice
from structlin.recipes import find
from structlin.report import records
from structlin.report.records import Record
from structlin.train import checkpoints, loop, model
from structlin.train.config import OptionError
from structlin.train.engine import Engine, accelerator_for
from structlin.train.recipe import Recipe

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "it",
    "for",
    "on",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
]
STEPS = 12
PRELOAD = ["structlin.train.loop", "transformers.models.gpt2.modeling_gpt2", "torch._dynamo"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0).choices
    lines = [json.dumps({"text": " ".join(choose(WORDS, k=60))}) for _ in range(120)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(text: Path) -> Recipe:
    """Twelve steps with dropout, accumulation and a checkpoint after every fourth."""
    return dataclasses.replace(
        find("tiny_gpt2"), width=32, heads=2, mlp_width=64, context=32, vocabulary=300, batch=4, micro_batch=2,
        dropout=0.1, steps=STEPS, log_every=1, valid_every=4, checkpoint_every=4, structure="dyad:nblocks=4",
        peak_flops=1e9, data=(str(text / "a.jsonl"),), cache=str(text / "cache"), device="cpu",
    )  # fmt: skip


def run(recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda line: None) -> Record:
    return loop.train(recipe, folder, "structlin train", say)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def numbers(record: Record) -> dict[str, Any]:
    return {name: record["series"][name] for name in ("step", "train_loss", "valid_step", "valid_loss")}


def killed(recipe: Recipe, folder: Path, step: int) -> None:
    """Body of a process that dies by SIGKILL when it says that it did ``step``."""

    def say(line: str) -> None:
        if line.startswith(f"step {step} of"):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    loop.train(recipe, folder, "structlin train", say)


def test_a_run_learns_and_leaves_what_it_says(tiny: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    record = run(tiny, tmp_path / "run", said.append)
    records.validate(record)
    assert record["status"] == "ok"
    assert records.read(tmp_path / "run" / "record.json") == [record]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "run.json", "tokenizer.json", "checkpoints", "model", "record.json",
    }  # fmt: skip
    series, metrics = record["series"], record["metrics"]
    assert series["step"] == list(range(1, STEPS + 1))
    assert series["valid_step"] == [4, 8, 12]
    assert series["train_loss"][-1] < series["train_loss"][0] - 0.3
    assert metrics["tokens"] == STEPS * 4 * 32
    assert metrics["valid_loss"] == series["valid_loss"][-1]
    assert 0 < metrics["bits_per_byte"] < metrics["valid_loss"] / 0.693
    assert [path.name for path in checkpoints.found(tmp_path / "run")] == [
        "000000012.safetensors",
        "000000008.safetensors",
    ]
    assert "left: loss" in said[0]
    assert "tokens/s" in said[0]
    # done is done, and what was trained can be had
    assert run(tiny, tmp_path / "run", said.clear) == record
    model, tokenizer, recipe = loop.load(tmp_path / "run")
    assert recipe == tiny
    assert json.loads(tokenizer)["model"]["type"] == "BPE"
    assert sum(isinstance(layer, StructuredLinear) for layer in model.modules()) == 4
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("structure", "layers"),
    [("btt_moe:experts=4:top_k=2", "all"), ("monarch_moe:nblocks=2:experts=3:balance=bias", "mlp"),
     ("moe_ffn:experts=4:top_k=2", "mlp")],
)  # fmt: skip
def test_mixtures_train_with_their_losses(tiny: Recipe, tmp_path: Path, structure: str, layers: str) -> None:
    said: list[str] = []
    recipe = dataclasses.replace(tiny, structure=structure, layers=layers)
    record = run(recipe, tmp_path / "run", said.append)
    assert record["status"] == "ok"
    assert "largest load" in said[0]
    assert record["series"]["train_loss"][-1] < record["series"]["train_loss"][0] - 0.3
    engine = Engine(dataclasses.replace(recipe, dropout=0.0), 300, accelerator_for(recipe))
    windows = torch.randint(300, (2, 33))
    loss = model.loss(engine.model, windows)
    loss.backward()
    assert all(router.weight.grad is not None for router in model.routers(engine.model))
    assert len(model.routers(engine.model)) == {"all": 8, "mlp": 2 if "ffn" in structure else 4}[layers]
    engine.model.eval()
    assert model.loss(engine.model, windows) != loss  # nothing is added to what is measured
    loaded, _, _ = loop.load(tmp_path / "run")
    assert {*loaded.state_dict()} == {*engine.model.state_dict()}


@pytest.mark.parametrize("structure", ["moe_ffn:expert=4", "moe_ffn:experts=2:top_k=4", "moe_ffn:experts=x"])
def test_a_standard_mixture_that_does_not_fit(tiny: Recipe, structure: str) -> None:
    with pytest.raises(OptionError, match=r"experts|top_k"):
        model.check(dataclasses.replace(tiny, structure=structure))
    with pytest.raises(OptionError, match="gpt_neox and layers=mlp"):
        model.check(dataclasses.replace(tiny, structure="moe_ffn", layers="all"))


def test_accumulation_and_batches_in_one_pass_agree(tiny: Recipe, tmp_path: Path) -> None:
    calm = dataclasses.replace(tiny, dropout=0.0)
    halves = run(calm, tmp_path / "halves")
    whole = run(dataclasses.replace(calm, micro_batch=4), tmp_path / "whole")
    assert halves["series"]["train_loss"] == pytest.approx(whole["series"]["train_loss"], rel=1e-4)


def test_a_killed_run_ends_with_the_same_bits(tiny: Recipe, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = run(tiny, tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for step in sorted(random.Random(1).sample(range(6, STEPS), 2)):
        process = context.Process(target=killed, args=(tiny, tmp_path / "cut", step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    said: list[str] = []
    record = run(tiny, tmp_path / "cut", said.append)
    assert not said[0].startswith("step 1 of")
    assert numbers(record) == numbers(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_any_moment_of_a_command(tiny: Recipe, tmp_path: Path) -> None:
    """Five kills, at moments that know nothing of steps and checkpoints."""
    options = [f"--{name.replace('_', '-')}" for name in ("data", "cache", "out")]
    command = [sys.executable, "-m", "structlin", "train", "tiny_gpt2", "--steps", "150", "--checkpoint-every", "3",
               "--structure", "dyad:nblocks=4", "--dropout", "0.1", "--device", "cpu", "--log-every", "20"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    choose = random.Random(2)
    for name, kills in (("whole", 0), ("cut", 5)):
        values = (tiny.data[0], tiny.cache, tmp_path / name)
        this = [*command, *(str(word) for pair in zip(options, values, strict=True) for word in pair)]
        while True:
            process = subprocess.Popen(this, env=environment, stderr=subprocess.PIPE, text=True)
            if kills:
                before = len(checkpoints.found(tmp_path / name)), _last(tmp_path / name)
                while (len(checkpoints.found(tmp_path / name)), _last(tmp_path / name)) == before:
                    time.sleep(0.01)
                    assert process.poll() is None, process.stderr
                time.sleep(choose.random())
                process.kill()
                kills -= 1
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                break
        assert process.returncode == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def _last(folder: Path) -> str:
    return next((path.name for path in checkpoints.found(folder)), "")


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop_at(step: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if line.startswith(f"step {step} of"):
            raise StopError

    return say


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tiny: Recipe, tmp_path: Path, damage: str) -> None:
    whole = run(tiny, tmp_path / "whole")
    with pytest.raises(StopError):
        run(tiny, tmp_path / "run", stop_at(10))
    last, before = checkpoints.found(tmp_path / "run")
    data = bytearray(last.read_bytes())
    if damage == "cut":
        del data[-1000:]
    else:
        data[-1000] ^= 1
    last.write_bytes(data)
    said: list[str] = []
    record = run(tiny, tmp_path / "run", said.append)
    assert f"{last} is damaged" in said[0]
    assert f"going on from {before.name}" in said[0]
    assert said[1].startswith("step 5 of 12")
    assert numbers(record) == numbers(whole)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_checkpoint_before(tiny: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def fill(line: str) -> None:
        if line.startswith("step 6 of"):
            (folder / "checkpoints" / "000000008.safetensors.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device"):
        run(tiny, folder, fill)
    assert [path.name for path in checkpoints.found(folder)] == ["000000004.safetensors"]
    said: list[str] = []
    assert run(tiny, folder, said.append)["status"] == "ok"
    assert said[0].startswith("step 5 of")


@pytest.mark.parametrize(
    ("method", "options"),
    [("sparsify_reverse", {"switch": 0.4, "moments": "carry"}), ("self_guided", {"guided": 0.5})],
)
def test_methods_go_on_where_they_were(tiny: Recipe, tmp_path: Path, method: Any, options: dict[str, Any]) -> None:
    """The switch is after step 5 and the guides go after step 6: the checkpoint at 4 is before, that at 8 behind."""
    recipe = dataclasses.replace(tiny, method=method, structure="monarch:nblocks=4", **options)
    whole = run(recipe, tmp_path / "whole")
    for stop in (7, 10):
        with pytest.raises(StopError):
            run(recipe, tmp_path / "cut", stop_at(stop))
    assert numbers(run(recipe, tmp_path / "cut")) == numbers(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    model, _, _ = loop.load(tmp_path / "whole")
    structured = any(isinstance(layer, StructuredLinear) for layer in model.modules())
    assert structured == (method == "self_guided")
    assert not any("guide" in name for name in model.state_dict())


def test_a_number_that_is_not_finite_stops_with_its_layer(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.update

    def update(self: Engine, windows: torch.Tensor, step: int) -> None:
        if step == 6:
            layer = self.model.get_submodule("transformer.h.1.mlp.act")
            layer.register_forward_hook(lambda module, inputs, output: output * float("inf"))
        real(self, windows, step)

    monkeypatch.setattr(Engine, "update", update)
    record = run(dataclasses.replace(tiny, log_every=4), tmp_path / "run")
    assert record["status"] == "failed"
    assert record["error"] is not None
    assert "not finite at step 7" in record["error"]
    assert "the output of transformer.h.1.mlp" in record["error"]
    assert not (tmp_path / "run" / "model").exists()
    assert [path.name for path in checkpoints.found(tmp_path / "run")] == ["000000004.safetensors"]
    monkeypatch.undo()
    assert run(tiny, tmp_path / "run")["status"] == "ok"


def test_compiled_layers_are_measured_before_the_first_step(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("structlin.train.engine.MEASURED", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda run, mode: run)
    windows = torch.randint(300, (4, 33))
    asked: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(choice, "settle", lambda key: asked.append((key.tokens, key.dtype)) or choice.rule(key))
    for compile, dtype in (("none", "float32"), ("default", "float32"), ("default", "bfloat16")):
        engine = Engine(dataclasses.replace(tiny, compile=compile, dtype=dtype), 300, accelerator_for(tiny))
        engine.warm_up(windows)
        kinds = [] if compile == "none" else [f"{tiny.structure}@{shape}" for shape in ("32x64", "64x32")]
        assert sorted(engine.backends) == kinds
    assert asked == [(64, torch.float32)] * 2 + [(64, torch.bfloat16)] * 2


def test_waiting_for_a_turn_is_no_time_of_training(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        time.sleep(3)
        yield

    monkeypatch.setattr(loop, "alone", alone)
    begun = time.perf_counter()
    record = run(tiny, tmp_path / "run")
    assert (record["metrics"]["train_seconds"] or 9) < time.perf_counter() - begun - 3


def test_weights_stay_where_they_were_when_a_gradient_is_not_finite(tiny: Recipe) -> None:
    engine = Engine(tiny, 300, accelerator_for(tiny))
    windows = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
    engine.update(windows, 0)
    before = [parameter.clone() for parameter in engine.model.parameters()]
    engine.model.get_submodule("transformer.ln_f").weight.register_hook(lambda gradient: gradient / 0)
    for step in (1, 2):
        engine.update(windows, step)
    assert all(torch.equal(old, new) for old, new in zip(before, engine.model.parameters(), strict=True))
    assert (engine.failed.item(), engine.healthy.item()) == (1, 1)


def test_text_that_changes_is_noticed(tiny: Recipe, tmp_path: Path, text: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes((text / "a.jsonl").read_bytes())
    recipe = dataclasses.replace(tiny, data=(str(mine),), cache=str(tmp_path / "cache"))
    with pytest.raises(StopError):
        run(recipe, tmp_path / "run", stop_at(6))
    mine.write_text(mine.read_text(encoding="utf-8").replace("the", "teh", 1), encoding="utf-8")
    with pytest.raises(OptionError, match="--data: the data have changed since the run"):
        run(recipe, tmp_path / "run")


def test_a_folder_holds_one_run(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(tiny, tmp_path / "run", stop_at(2))
    with pytest.raises(OptionError, match=r"--out: .* another lr \(0.004 there, 0.1 here\)"):
        run(dataclasses.replace(tiny, lr=0.1), tmp_path / "run")
    with pytest.raises(ValueError, match="is not finished; the command that started it goes on: structlin train"):
        loop.load(tmp_path / "run")
    assert run(dataclasses.replace(tiny, log_every=2), tmp_path / "run")["status"] == "ok"


def test_checkpoints_hold_no_pickle(tiny: Recipe, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    assert kinds == {".json", ".safetensors"}
    with safe_open(checkpoints.found(tmp_path / "run")[0], framework="pt") as file:
        assert json.loads(file.metadata()["run"])["progress"]["step"] == STEPS


@pytest.mark.slow
def test_processes_share_a_batch(tiny: Recipe, tmp_path: Path) -> None:
    """Two processes with half of the batch each end where one ends."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671"]
    common = ["-m", "structlin", "train", "tiny_gpt2", "--steps", "6", "--device", "cpu", "--data", tiny.data[0],
              "--cache", tiny.cache, "--log-every", "1"]  # fmt: skip
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        subprocess.run(
            [*start, *common, "--out", tmp_path / name], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    (one,), (two,) = (records.read(tmp_path / name / "record.json") for name in ("one", "two"))
    assert two["config"]["processes"] == 2
    assert one["series"]["train_loss"] == pytest.approx(two["series"]["train_loss"], rel=1e-4)
    assert one["metrics"]["valid_loss"] == pytest.approx(two["metrics"]["valid_loss"], rel=1e-4)
