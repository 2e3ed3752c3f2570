"""The loop that trains on problems: what a run leaves, how it goes on after a stop, and what it refuses.

The problem here is one of seconds: a perceptron, and a learnable transform, that imitate a fixed one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import structlin as sl
from structlin import recipes
from structlin.nn import MonarchFourier
from structlin.problems import Problem, ProblemRecipe, train
from structlin.problems.problem import chosen
from structlin.recipes import command
from structlin.report import records
from structlin.testing import plain
from structlin.train.config import OptionError
from structlin.train.settings import override, setting


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(ProblemRecipe):
    """Imitate the reversal of a vector, or a Fourier transform."""

    TITLE = "toys"
    width: int = setting(16, "features")
    transform: bool = setting(False, "whether the model is a transform of complex numbers")
    breaks: int = setting(10**6, "the step whose loss is not finite")

    def problem(self) -> Problem:
        return Toy(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width % 4:
            yield "--width", f"{self.width} is no multiple of 4"


class Toy(Problem):
    def __init__(self, recipe: ToyRecipe) -> None:
        self.recipe, self.about = recipe, {"toy": {"sha256": "data" if not recipe.data else recipe.data[0]}}

    def model(self) -> nn.Module:
        width = self.recipe.width
        if self.recipe.transform:
            return MonarchFourier(width)
        return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def rules(self) -> dict[str, Any]:
        return chosen(self.recipe, {"all": ("*",), "first": ("0",)})

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1000 + step)
        dtype = torch.complex64 if self.recipe.transform else torch.float32
        return (torch.randn(self.recipe.batch, self.recipe.width, generator=generator, dtype=dtype),
                torch.tensor(torch.nan if step == self.recipe.breaks else 1.0))  # fmt: skip

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x, one = batch
        return (model(x) - one * x.flip(1)).abs().square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"valid_loss": self.loss(model, self.batch(-1)).item(), "accuracy": 0.5}

    def test(self, model: nn.Module) -> dict[str, float]:
        return {"test_loss": self.loss(model, self.batch(-2)).item()}

    def picture(self, model: nn.Module, series: dict[str, list[float]], path: Path) -> None:
        path.write_bytes(f"{len(series['accuracy'])} points".encode())


def toy(**fields: Any) -> ToyRecipe:
    small = {"steps": 40, "batch": 8, "lr": 1e-2, "dtype": "float32", "compile": "none", "device": "cpu",
             "log_every": 5, "valid_every": 20, "checkpoint_every": 10}  # fmt: skip
    return ToyRecipe(name="toy", **{**small, **fields})


@pytest.mark.parametrize("fields", [{}, {"structure": "monarch:nblocks=4"}, {"transform": True}], ids=str)
def test_a_run_learns_and_leaves_record_model_and_picture(tmp_path: Path, fields: dict[str, Any]) -> None:
    said: list[str] = []
    record = train(toy(**fields), tmp_path, "structlin train toy", said.append)
    assert records.read(tmp_path / "record.json") == [record]
    metrics, series = record["metrics"], record["series"]
    assert series["valid_loss"][-1] < series["valid_loss"][0]
    assert series["step"] == [20, 40]
    assert metrics["valid_loss"] == series["valid_loss"][-1]
    assert {"test_loss", "accuracy", "step_seconds", "model_params"} <= set(metrics)
    assert (tmp_path / "picture.png").read_bytes() == b"2 points"
    assert sum(line.startswith("step 20 of 40") for line in said) == 1
    recipe = toy(**fields)
    again = sl.load(Toy(recipe).model(), tmp_path / "model")
    assert again(torch.ones(1, 16, dtype=torch.complex64 if fields.get("transform") else None)).shape == (1, 16)
    structured = [m for m in again.modules() if isinstance(m, sl.StructuredLinear)]
    assert len(structured) == {"structure": 2, "transform": 1}.get(next(iter(fields), ""), 0)


def test_the_last_update_is_measured_whatever_the_intervals(tmp_path: Path) -> None:
    said: list[str] = []
    record = train(toy(steps=33), tmp_path, "c", said.append)
    assert record["series"]["step"] == [20, 33]
    assert any(line.startswith("step 33 of 33, 0 s left") for line in said)
    assert record["metrics"]["steps"] == 33


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [7, 23, 39])
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path, at: int, monkeypatch: Any) -> None:
    whole = train(toy(structure="btt"), tmp_path / "whole", "c", lambda _: None)
    batch = Toy.batch

    def kill(self: Toy, step: int) -> Any:
        if step == at:
            raise Killed
        return batch(self, step)

    monkeypatch.setattr(Toy, "batch", kill)
    with pytest.raises(Killed):
        train(toy(structure="btt"), tmp_path / "killed", "c", lambda _: None)
    monkeypatch.undo()
    resumed = train(toy(structure="btt"), tmp_path / "killed", "c", lambda _: None)
    assert resumed["metrics"]["test_loss"] == whole["metrics"]["test_loss"]
    assert resumed["series"]["valid_loss"] == whole["series"]["valid_loss"]
    models = [sl.load(Toy(toy()).model(), tmp_path / name / "model").state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(toy(), tmp_path, "c", lambda _: None)
    assert train(toy(log_every=1), tmp_path, "c", lambda _: None) == first


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoint.safetensors").write_bytes(b"damaged")
    said: list[str] = []
    assert train(toy(), tmp_path, "c", said.append)["status"] == "ok"
    assert said[0].startswith("starting anew: ")


def test_compiled_layers_choose_their_backends_first(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("structlin.problems.loop.MEASURED", ("cpu",))
    order: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda run, mode: lambda *given: order.append("compiled") or run(*given))
    monkeypatch.setattr(sl.StructuredLinear, "forward", lambda self, x: order.append("layer") or plain(self, x))
    for structure in ("dense", "monarch:nblocks=4"):
        order.clear()
        folder = tmp_path / structure.partition(":")[0]
        train(toy(structure=structure, compile="default", steps=1), folder, "", lambda line: None)
        expected = ["compiled"] * 2 if structure == "dense" else ["layer"] * 2 + ["compiled", "layer", "layer"] * 2
        assert order[: len(expected)] == expected


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    record = train(toy(breaks=12), tmp_path, "c", lambda _: None)
    assert record["status"] == "failed"
    assert record["error"] == "the loss is nan between steps 11 and 15"
    assert record["metrics"]["valid_loss"] is None
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"structure": "monarch:nblocks=5"}, "--structure, --layers: .*nblocks=5 does not fit 32x16"),
        ({"structure": "monach"}, "--structure: .*monach.*did you mean 'monarch'"),
        ({"structure": "monarch", "layers": "middle"}, "--structure, --layers: .*middle"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], part: str
) -> None:
    with pytest.raises(OptionError, match=part):
        train(toy(**fields), tmp_path / "run", "c", lambda _: None)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_of_one_recipe_and_its_data(tmp_path: Path) -> None:
    train(toy(), tmp_path, "c", lambda _: None)
    with pytest.raises(OptionError, match=r"--out: .* another lr \(0.01 there, 0.1 here\)"):
        train(toy(lr=0.1), tmp_path, "c", lambda _: None)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "data": {"toy": {"sha256": "other"}}}))
    with pytest.raises(OptionError, match="--data: the data have changed"):
        train(toy(), tmp_path, "c", lambda _: None)


def test_fields_of_a_problem_are_options(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in ("RECIPES",):
        monkeypatch.setattr(recipes, name, {**recipes.RECIPES, "toy": toy})
        monkeypatch.setattr(command, name, recipes.RECIPES)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert "whether the model is a transform" in parser.format_help()
    out = str(tmp_path / "run")
    assert command.main(parser.parse_args(["toy", "--width", "32", "--steps", "10", "--out", out]), "c") == 0
    assert "valid loss" in capsys.readouterr().out
    assert command.main(parser.parse_args(["toy", "--heads", "2", "--width", "6", "--out", out]), "c") == 2
    assert "--heads: toy has no such field; it has --name" in capsys.readouterr().err
    with pytest.raises(OptionError, match="--width: 6 is no multiple of 4"):
        override(toy(), {"width": "6"})
    assert dataclasses.asdict(override(toy(), {"data": ["a", "b"]}))["data"] == ("a", "b")
