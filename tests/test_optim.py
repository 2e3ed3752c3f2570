"""Learning rates: who gets which, and that one step of Adam moves a structured layer as far as a dense one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import structlin as sl
from structlin import analysis
from structlin.spec import STRUCTURES


def rates(model, **how):
    """Parameter name -> (learning rate, weight decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = sl.param_groups(model, **how)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def mixed():
    return nn.Sequential(
        nn.Embedding(8, 16), nn.Linear(16, 16), sl.StructuredLinear(16, 24, sl.LowRank(4)), nn.LayerNorm(24)
    )


def test_factors_get_the_rate_of_their_fan_in_and_everything_else_the_rate_given():
    assert rates(mixed(), lr=0.5, weight_decay=0.1) == {
        "0.weight": (0.5, 0.1),
        "1.weight": (0.5, 0.1),
        "1.bias": (0.5, 0.0),
        "2.down": (0.5 * 16 / 16 / 2, 0.1),
        "2.up": (0.5 * 16 / 4 / 2, 0.1),
        "2.bias": (0.5, 0.0),
        "3.weight": (0.5, 0.0),
        "3.bias": (0.5, 0.0),
    }


def test_parameters_of_one_rate_are_one_group_in_the_order_of_the_model():
    groups = sl.param_groups(mixed(), lr=0.5, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [2, 4, 1, 1]
    assert all(group.keys() == {"params", "lr", "weight_decay"} for group in groups)
    torch.optim.SGD(groups)


def test_there_is_no_decay_unless_asked_for():
    assert {decay for _, decay in rates(mixed(), lr=0.5).values()} == {0.0}


def test_a_dense_spec_is_treated_as_a_linear_layer():
    dense, linear = sl.StructuredLinear(16, 24, sl.Dense()), nn.Linear(16, 24)
    assert rates(dense, lr=0.5, weight_decay=0.1) == rates(linear, lr=0.5, weight_decay=0.1)


def test_frozen_parameters_are_left_out_and_shared_ones_occur_once():
    model = mixed()
    model[2].up.requires_grad_(False)
    model.append(sl.StructuredLinear(16, 24, sl.LowRank(4)))
    model[4].down = model[2].down
    model.append(model[1])
    found = [p for group in sl.param_groups(model, lr=0.5) for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p is not model[2].up for p in found)
    assert rates(model, lr=0.5)["2.down"][0] == 0.25


def test_a_parametrized_factor_keeps_its_rate():
    layer = sl.StructuredLinear(16, 24, sl.LowRank(4), bias=False)
    parametrizations.weight_norm(layer, "up")
    assert rates(layer, lr=0.5) == {
        "down": (0.25, 0.0),
        "parametrizations.up.original0": (1.0, 0.0),
        "parametrizations.up.original1": (1.0, 0.0),
    }


@pytest.mark.parametrize(
    ("lr", "decay"), [(-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (0.1, -1e-9), (0.1, float("nan"))]
)
def test_a_rate_that_is_none_is_refused(lr, decay):
    wrong = f"weight_decay={decay}" if lr == 0.1 else f"lr={lr}"
    with pytest.raises(ValueError, match=f"{wrong} must be finite and not negative"):
        sl.param_groups(mixed(), lr=lr, weight_decay=decay)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameters"):
        sl.param_groups(mixed().requires_grad_(False), lr=0.1)


def test_a_base_gives_every_parameter_the_multiplier_of_its_growth():
    def model(width):
        layers = {
            "embedding": nn.Embedding(8, width),
            "hidden": sl.StructuredLinear(width, 4 * width, sl.LowRank(0.25)),
            "dense": nn.Linear(4 * width, width),
            "norm": nn.LayerNorm(width),
            "patches": nn.Conv1d(3, width, 5),
            "head": nn.Linear(width, 8),
        }
        return nn.ModuleDict(layers)

    wide, base = model(16), model(4).to("meta")
    base["hidden"] = nn.Linear(4, 16, device="meta")  # the tuned model may have been dense
    adam = rates(wide, lr=1.0, base=base)
    sgd = rates(wide, lr=1.0, base=base, optimizer="sgd")
    assert {name: (rate, sgd[name][0]) for name, (rate, _) in adam.items()} == {
        "embedding.weight": (1, 4),
        "hidden.down": (1 / 4 / 2, 1 * (4 / 64) / 2),
        "hidden.up": (1 / 4 * 4 / 2, 1 * 4 / 2),
        "hidden.bias": (1, 4),
        "dense.weight": (1 / 4, 1),
        "dense.bias": (1, 4),
        "norm.weight": (1, 4),
        "norm.bias": (1, 4),
        "patches.weight": (1, 4),
        "patches.bias": (1, 4),
        "head.weight": (1 / 4, 1 / 4),
        "head.bias": (1, 1),
    }
    assert rates(base, lr=1.0, base=base) == rates(base, lr=1.0)


def test_a_base_that_is_another_model_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for base in (nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))):
        with pytest.raises(ValueError, match=r"1\.weight has shape \(8, 8\)"):
            sl.param_groups(model, lr=0.1, base=base)
    with pytest.raises(ValueError, match=r"0\.bias has shape \(8,\) in the model and no counterpart in base"):
        sl.param_groups(model, lr=0.1, base=nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)))


def test_a_matrix_whose_fan_in_is_not_known_is_refused():
    class Transposed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width, 3 * width))

    with pytest.raises(ValueError, match=r"weight grows from .4, 12. to .8, 24., and which .* of a Transposed"):
        sl.param_groups(Transposed(8), lr=0.1, base=Transposed(4))
    sl.param_groups(Transposed(8), lr=0.1, base=Transposed(8))
    sl.param_groups(Transposed(8), lr=0.1)


def test_depth_divides_the_rates_of_adam_in_branches():
    assert rates(mixed(), lr=1.0, depth={"1": 4, "*": 16}) == {
        name: (rate / (2 if name[0] == "1" else 4), 0.0) for name, (rate, _) in rates(mixed(), lr=1.0).items()
    }
    assert rates(mixed(), lr=1.0, depth={"1": 4}, optimizer="sgd") == rates(mixed(), lr=1.0, optimizer="sgd")
    for depth in ({"missing.*": 2}, {"1": 0}, {"1": -1}, {"1": float("nan")}):
        with pytest.raises(ValueError, match="allowed: globs that match"):
            sl.param_groups(mixed(), lr=1.0, depth=depth)


def test_independent_decay_shrinks_every_matrix_alike():
    found = rates(mixed(), lr=0.5, weight_decay=0.1, independent_decay=True)
    assert {rate * decay for rate, decay in found.values() if decay} == {0.5 * 0.1}
    assert found["2.up"] == (1.0, 0.05)
    assert found["2.bias"] == (0.5, 0.0)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer='adamw' is unknown; allowed: adam, sgd"):
        sl.param_groups(mixed(), lr=0.1, optimizer="adamw")
    with pytest.raises(ValueError, match="optimizer='adamw' is unknown; allowed: adam, sgd"):
        analysis.lr_scale(sl.LowRank(4).plan(8, 8), "up", "adamw")


class Trainer:
    """What transformers.Trainer does with optimizers: takes one if given, else asks the hook; scales its rates."""

    def __init__(self, model, args, optimizers=(None, None)):
        self.model, self.args = model, args
        self.optimizer, self.lr_scheduler = optimizers

    def create_optimizer(self):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer

    def train(self):
        self.create_optimizer()
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5**step)
        self.model(torch.zeros(3, dtype=torch.int64)).sum().backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        return [group["lr"] for group in self.optimizer.param_groups]


class HookedTrainer(Trainer):
    def create_optimizer(self, *arguments):
        if self.optimizer is None:
            groups = sl.param_groups(self.model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, betas=(self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer


def test_the_rates_reach_a_trainer_and_its_schedule():
    args = SimpleNamespace(learning_rate=0.5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95)
    groups = sl.param_groups(model := mixed(), lr=0.5, weight_decay=0.1)
    wanted = [group["lr"] / 2 for group in groups]
    assert len(set(wanted)) > 1
    assert Trainer(model, args, optimizers=(torch.optim.AdamW(groups), None)).train() == wanted
    assert HookedTrainer(mixed(), args).train() == wanted


def change(spec, width):
    """Root mean square of what one step of Adam does to the output of a square layer."""
    torch.manual_seed(0)
    layer = sl.StructuredLinear(width, width, spec, bias=False)
    x, cotangent = torch.randn(2, 64, width)
    optimizer = torch.optim.Adam(sl.param_groups(layer, lr=1e-4))
    before = layer(x)
    (before * cotangent).sum().backward()
    optimizer.step()
    return (layer(x) - before).square().mean().sqrt().item()


def defaults():
    for cls in STRUCTURES.values():
        try:
            spec = cls()
            plan = spec.plan(64, 64)
        except (TypeError, ValueError):
            continue
        if not spec.masks(plan):
            yield spec


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("spec", [*defaults(), sl.BTT(rank=4), sl.LowRank(rank=32)], ids=str)
def test_one_step_moves_the_output_as_far_as_that_of_a_dense_layer(spec, width):
    assert 0.3 < change(spec, width) / change(sl.Dense(), width) < 3


def test_without_the_scales_one_step_would_not(monkeypatch):
    monkeypatch.setattr(analysis, "lr_scale", lambda plan, name, optimizer: 1.0)
    assert change(sl.BTT(), 256) / change(sl.Dense(), 256) < 0.3


def fall(spec, width):
    """By how much, to first order, one step of SGD lowers a linear loss of a square layer's output."""
    torch.manual_seed(0)
    layer = sl.StructuredLinear(width, width, spec, bias=False)
    x, cotangent = torch.randn(2, 256, width)
    (layer(x) * cotangent).sum().backward()
    groups = sl.param_groups(layer, lr=1.0, optimizer="sgd")
    return sum(group["lr"] * p.grad.square().sum().item() for group in groups for p in group["params"])


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("spec", [*defaults(), sl.BTT(rank=4), sl.LowRank(rank=32)], ids=str)
def test_one_step_of_sgd_lowers_a_loss_as_a_dense_layer_does(spec, width):
    plan = spec.plan(width, width)
    narrowest = min(plan.size(step.y) for _, step in plan.factors.values())  # carries that share of a random vector
    assert fall(spec, width) / fall(sl.Dense(), width) == pytest.approx(min(1, narrowest / width), rel=0.2)
