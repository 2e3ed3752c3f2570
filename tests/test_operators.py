"""Neural operators against transforms of PyTorch and against each other, and the recipes that train them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from structlin.nn import MonarchFourier
from structlin.problems import train
from structlin.problems.operators.fno import FNO, SpectralConv
from structlin.problems.operators.problem import OperatorProblem
from structlin.problems.operators.recipe import OperatorRecipe
from structlin.problems.operators.rollout import relative_l2
from structlin.problems.operators.unet import UNet
from structlin.recipes import find
from structlin.testing import error
from structlin.train.config import OptionError

TINY = [
    "tiny_fno_navier_stokes",
    "tiny_monarch_no_navier_stokes",
    "tiny_unet_navier_stokes",
    "tiny_burgers",
    "tiny_darcy",
]
FULL = ["fno_navier_stokes", "monarch_no_navier_stokes", "unet_navier_stokes", "burgers", "darcy"]


def recipe(name: str, cache: Path, **fields: Any) -> OperatorRecipe:
    """The tiny recipe on the CPU, its solutions kept in ``cache``."""
    found = find(name)
    assert isinstance(found, OperatorRecipe)
    small = {"grid": 16, "times": 7, "samples": 16} if found.equation == "navier_stokes" else {}
    return dataclasses.replace(found, cache=str(cache), device="cpu", **{**small, **fields})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("solutions")


def by_transforms(layer: SpectralConv, x: Tensor) -> Tensor:
    """The layer as the paper writes it, in float64 by `torch.fft`."""
    axes = (1, 2) if len(layer.shape) == 2 else (1,)
    z = torch.fft.rfftn(x.double(), dim=axes)
    weight = torch.view_as_complex(layer.weight.detach().double().movedim(2, -1).contiguous())
    out, m = torch.zeros_like(z), layer.modes
    if len(axes) == 2:
        kept = [*range(m), *range(layer.shape[0] - m, layer.shape[0])]
        out[:, kept, :m] = torch.einsum("brkc,rkcd->brkd", z[:, kept, :m], weight)
    else:
        out[:, :m] = torch.einsum("bkc,kcd->bkd", z[:, :m], weight[0])
    return torch.fft.irfftn(out, s=layer.shape, dim=axes)


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "monarch"])
@pytest.mark.parametrize(("shape", "modes"), [((12, 10), 5), ((8, 16), 3), ((18,), 9), ((20,), 4)], ids=str)
def test_a_spectral_layer_is_that_of_the_paper(shape: tuple[int, ...], modes: int, learned: bool) -> None:
    torch.manual_seed(0)
    layer, x = SpectralConv(3, shape, modes, learned), torch.randn(2, *shape, 3)
    assert error(layer(x, *layer.matrices()), by_transforms(layer, x)) < 1e-6


@pytest.mark.parametrize(("shape", "pad"), [((16, 16), 0), ((16, 16), 2), ((24,), 0)], ids=str)
def test_monarch_no_starts_as_the_fourier_operator(shape: tuple[int, ...], pad: int) -> None:
    models = []
    for learned in (False, True):
        torch.manual_seed(0)
        models.append(FNO(shape, 3, 6, 4, 3, learned, pad))
    window = torch.randn(2, *shape, 3)
    exact, monarch = (model(window, 4) for model in models)
    assert exact.shape == (2, *shape, 4)
    assert error(monarch, exact.double()) < 5e-6
    more = sum(p.numel() for m in models[1].modules() if isinstance(m, MonarchFourier) for p in m.parameters())
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[1] == counts[0] + more > counts[0]


def test_the_transforms_of_monarch_no_learn() -> None:
    torch.manual_seed(0)
    model = FNO((16, 16), 2, 4, 3, 2, learned=True)
    model(torch.randn(2, 16, 16, 2), 2).square().sum().backward()
    transforms = [m for m in model.modules() if isinstance(m, MonarchFourier)]
    assert len(transforms) == 2 * 4
    for transform in transforms:
        for factor in transform.parameters():
            assert factor.grad is not None
            assert factor.grad.abs().max() > 0


def test_a_published_operator_has_its_published_size() -> None:
    model = FNO((64, 64), 10, 20, 12, 4)
    spectral = 4 * 2 * 12 * 12 * 20 * 20 * 2  # layers, signs of a mode, modes, channels, parts of a number
    rest = (12 * 20 + 20) + 4 * (20 * 20 + 20) + (20 * 128 + 128) + (128 + 1)
    size = sum(p.numel() for p in model.parameters())
    assert size == spectral + rest
    unet = find("unet_navier_stokes")
    assert isinstance(unet, OperatorRecipe)
    assert sum(p.numel() for p in UNet(unet.history, unet.width).parameters()) == pytest.approx(size, rel=0.02)


def test_the_u_net_knows_no_edges() -> None:
    torch.manual_seed(0)
    model, window = UNet(2, 4), torch.randn(2, 16, 24, 2)
    moved = model(window.roll((8, 16), (1, 2)), 2)
    torch.testing.assert_close(moved, model(window, 2).roll((8, 16), (1, 2)), rtol=1e-4, atol=1e-5)


def test_a_rollout_goes_on_from_its_own_times() -> None:
    torch.manual_seed(0)
    model, window = FNO((8, 8), 3, 4, 2, 2), torch.randn(2, 8, 8, 3)
    first = model(window)
    second = model(torch.cat([window[..., 1:], first], -1))
    torch.testing.assert_close(model(window, 2), torch.cat([first, second], -1))


def test_relative_errors() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(relative_l2(truth + torch.tensor([0.0, 1.0]), truth), torch.tensor([0.2, 0.5]))


# recipes


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_learns_and_is_pictured(name: str, cache: Path, tmp_path: Path) -> None:
    made = recipe(name, cache, steps=16, batch=4, valid_every=8)
    record = train(made, tmp_path, f"structlin train {name}", lambda _: None)
    assert record["status"] == "ok"
    metrics = record["metrics"]
    assert metrics["valid_loss"] < 0.85
    assert {"relative_l2", "test_relative_l2", "test_relative_l2_last"} <= set(metrics)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert len(record["config"]["about"]["sha256"]) == 64


@pytest.mark.parametrize("name", FULL)
def test_a_full_recipe_is_its_tiny_one_at_another_size(name: str) -> None:
    full, tiny = find(name), find(f"tiny_{name}")
    assert isinstance(full, OperatorRecipe)
    assert isinstance(tiny, OperatorRecipe)
    assert (full.name, tiny.name) == (name, f"tiny_{name}")
    assert (full.equation, full.model) == (tiny.equation, tiny.model)
    assert full.samples == 1000
    assert OperatorRecipe.from_dict(full.to_dict()) == full


def test_batches_follow_from_seed_and_step(cache: Path) -> None:
    made = recipe("tiny_fno_navier_stokes", cache)
    problem, again = OperatorProblem(made), OperatorProblem(made)
    for step, times in ((0, 2), (29, 2), (30, 3), (59, 3)):
        batch = problem.batch(step)
        assert batch[0].shape == (8, 16, 16, 4)
        assert batch[1].shape == (8, 16, 16, times)
        for one, other in zip(batch, again.batch(step), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    other = OperatorProblem(dataclasses.replace(made, seed=1))
    assert not torch.equal(other.batch(0)[0], problem.batch(0)[0])
    # an epoch of whole solutions has each training sample once, and no other
    seen = torch.cat([problem.batch(step)[0] for step in range(30, 36)])[:, :, :, 0].flatten(1)
    wanted = problem.series[16:, 0].flatten(1)
    assert {tuple(row) for row in seen[:, :3].tolist()} == {tuple(row) for row in wanted[:, :3].tolist()}


def test_structures_go_into_the_pointwise_layers(cache: Path) -> None:
    made = recipe("tiny_burgers", cache, structure="low_rank:rank=2", layers="all")
    assert set(OperatorProblem(made).rules()) == {"lift", "pointwise.*", "hidden"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ("here",)}, "--data: here is given; allowed: nothing"),
        ({"history": 9}, "--history: 9 is given; allowed: 1 to 6"),
        ({"short": 6}, "--short: 6 is given; allowed: 1 to 3"),
        ({"grid": 40}, "--grid: 40 is given; allowed: multiples of 16"),
        ({"time_step": 0.3}, "--time-step: 0.3 is given; allowed: 1 / a whole number, as 0.333"),
        ({"modes": 9}, "--modes: 9 is given; allowed: 1 to 8"),
        ({"pad": 1, "model": "monarch_no"}, "--pad: 1 makes an axis of 17 points"),
        ({"model": "unet", "resolution": 12, "grid": 24}, "--model: unet is given for navier_stokes"),
        ({"model": "unet", "structure": "btt"}, "--structure: btt is given; allowed for unet"),
        ({"equation": "burgers"}, "--times: 7 is given; allowed for burgers: 2"),
        ({"equation": "darcy", "times": 2, "history": 1, "short": 1, "grid": 32}, "--grid: 32 .* 1 \\+ mult"),
        ({"short_share": 1.5}, "--short-share: 1.5 is given; allowed: 0 to 1"),
        ({"time_step": 0.0}, "--time-step: 0.0 is given; allowed: positive numbers up to 1"),
        ({"viscosity": 0.0}, "--viscosity: 0.0 is given; allowed: positive"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_bad_field_is_refused_before_anything_is_computed(fields: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(OptionError, match=message):
        recipe("tiny_fno_navier_stokes", cache, **fields)


def test_solutions_that_cannot_be_computed_or_read_are_a_matter_of_options(tmp_path: Path) -> None:
    wild = recipe("tiny_fno_navier_stokes", tmp_path, time_step=1.0, times=50, viscosity=1e-6, initial_variance=1e8)
    with pytest.raises(OptionError, match="no longer finite"):
        wild.problem()
    assert not list(tmp_path.iterdir())
    made = recipe("tiny_burgers", tmp_path)
    made.problem()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"nothing")
    with pytest.raises(OptionError, match=f"{file.name} cannot be used .* delete it"):
        made.problem()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_only_the_step_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop compiles the loss; what is compiled must not have every step of a rollout in it."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_(function, backend=backend))
    problems = [OperatorProblem(recipe("tiny_fno_navier_stokes", cache, compile=mode)) for mode in ("none", "default")]
    losses = []
    for problem in problems:
        torch.manual_seed(0)
        model, loss = problem.model(), torch.compile(problem.loss, mode="default")
        losses.append(loss(model, problem.batch(59)))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert 1 <= len(graphs) <= 2
