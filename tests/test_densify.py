"""Structured first, then dense: what the loss, the groups and the moments are after the switch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structlin as sl
from structlin import moments
from structlin.testing import assert_close, error, examples, make

SPECS = (sl.Monarch(2), sl.Dyad(4), sl.LowRank(8))
OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_moments = pytest.mark.parametrize("how", ["reset", "carry"])


def small(bias=True, spec=SPECS[0]):
    torch.manual_seed(0)
    return nn.Sequential(
        sl.StructuredLinear(16, 24, spec, bias=bias, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(24, 24, bias=bias, dtype=torch.float64),
        sl.StructuredLinear(24, 8, sl.LowRank(3), bias=bias, dtype=torch.float64),
    )


def loss_at(model, step):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x[:, :8].sin()).square().mean()


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_moments
@every_optimizer
def test_the_loss_is_continuous_and_goes_on_falling(make_optimizer, how):
    model = small()
    optimizer = make_optimizer(model.parameters())
    losses = train(model, optimizer, 30)
    before = loss_at(model, 0).item()
    assert sl.densify_(model, optimizer, moments=how) == ["0", "3"]
    assert type(model[0]) is type(model[3]) is nn.Linear
    assert loss_at(model, 0).item() == pytest.approx(before, rel=1e-12)
    after = train(model, optimizer, 30)
    assert max(after) < 1.2 * max(losses[-10:])
    assert after[-1] < losses[-1]


@every_optimizer
def test_after_a_reset_training_is_that_of_a_run_started_dense(make_optimizer):
    model = nn.Sequential(*(m for m in small(bias=False) if not isinstance(m, nn.Linear)))
    model[2] = sl.StructuredLinear(24, 8, sl.LowRank(3), bias=False, dtype=torch.float64)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, 5)
    fresh = copy.deepcopy(model)
    sl.to_dense_(fresh)
    sl.densify_(model, optimizer)
    assert not optimizer.state
    assert train(model, optimizer, 5) == train(fresh, make_optimizer(fresh.parameters()), 5)


@every_moments
def test_other_parameters_and_biases_keep_their_state(how):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 3)
    kept = [model[0].bias, model[2].weight, model[2].bias, model[3].bias]
    states = [copy.deepcopy(optimizer.state[p]) for p in kept]
    sl.densify_(model, optimizer, moments=how)
    assert [model[0].bias, model[2].weight, model[2].bias, model[3].bias] == kept
    for parameter, state in zip(kept, states, strict=True):
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*held} == {*model.parameters()}
    assert len(held) == len({*held})
    assert optimizer.state.keys() == ({*held} if how == "carry" else {*kept})
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@every_optimizer
def test_carried_momentum_moves_the_matrix_on_as_it_moved(make_optimizer, spec):
    """Without a new gradient one step of either optimizer moves the matrix alike, to first order."""

    def coast(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 1e-7  # so small that what is left is the first order
        before = matrix(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return (matrix(model) - before) / 1e-7

    def matrix(model):
        layer = model[0] if type(model[0]) is nn.Linear else model[0].to_dense()
        return layer.weight.detach().clone()

    model = small(spec=spec)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, 7)
    structured, states = copy.deepcopy((model, optimizer.state_dict()))
    other = make_optimizer(structured.parameters())
    other.load_state_dict(states)
    sl.densify_(model, optimizer, moments="carry")
    # a step without a gradient shrinks the moments once more on both sides; Adam's root does not see it alike
    assert error(coast(model, optimizer), coast(structured, other)) < 1e-6


def test_carried_momentum_allows_for_the_rates_of_the_factors():
    model = small()
    rates = {"first": 0.02, "second": 0.005}
    groups = [{"params": [model[0].get_parameter(name)], "lr": lr} for name, lr in rates.items()]
    optimizer = torch.optim.SGD([*groups, {"params": list(model[3].parameters()), "lr": 0.01}], momentum=0.9)
    train(model, optimizer, 4)
    first, second = (optimizer.state[model[0].get_parameter(name)]["momentum_buffer"] for name in rates)
    layer, size = model[0], 1e-6
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        moved.first.add_(first, alpha=size * 0.02)
        moved.second.add_(second, alpha=size * 0.005)
    expected = (moved.to_dense().weight - layer.to_dense().weight) / (size * 0.01)
    sl.densify_(model, optimizer, moments="carry", lr=0.01)
    assert error(optimizer.state[model[0].weight]["momentum_buffer"], expected) < 1e-5


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_carried_second_moment_is_that_of_the_gradients_of_the_matrix(spec):
    """Gradients of variance 9 at every entry of the matrix: what the factors see of them gives 9 back."""
    torch.manual_seed(0)
    model = nn.Sequential(sl.StructuredLinear(64, 48, spec, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.eye(64)).backward(3 * torch.randn(64, 48))
        optimizer.step()
    sl.densify_(model, optimizer, moments="carry")
    state = optimizer.state[model[0].weight]
    assert state["step"] == 200
    assert (state["exp_avg_sq"] / (1 - 0.99**200)).mean().item() == pytest.approx(9, rel=0.1)
    assert state["exp_avg_sq"].shape == state["exp_avg"].shape == (48, 64)


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_every_structure_carries_its_moments(spec, shape):
    for normalised in (False, True) if not spec.masks(spec.plan(*shape)) else (False,):
        model = nn.Sequential(make(spec, shape, "cpu"))
        if normalised:
            sl.normalise_(model)
        optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-3, weight_decay=0.1))
        model(torch.randn(5, shape[1], dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        sl.densify_(model, optimizer, moments="carry", lr=1e-3)
        state = optimizer.state[model[0].weight]
        assert all(torch.isfinite(value).all() for value in state.values())
        assert state["exp_avg"].any()
        assert (state["exp_avg_sq"] > 0).all()
        model(torch.randn(5, shape[1], dtype=torch.float64)).sum().backward()
        optimizer.step()


def test_the_dense_weight_joins_the_group_that_has_its_rate():
    model = small()
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-3, weight_decay=0.1))
    count = len(optimizer.param_groups)
    group = next(g for g in optimizer.param_groups if any(p is model[2].weight for p in g["params"]))
    sl.densify_(model, optimizer, lr=1e-3)
    assert {*group["params"]} == {model[0].weight, model[2].weight, model[3].weight}
    assert len(optimizer.param_groups) == count


def test_a_rate_that_no_group_has_becomes_a_group_as_far_in_its_schedule():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for step in range(5):
        train(model, optimizer, 1, step)
        scheduler.step()
    sl.densify_(model, optimizer, lr=1e-3)
    old, new = optimizer.param_groups
    assert new["params"] == [model[0].weight, model[3].weight]
    assert (new["lr"], new["weight_decay"], new["betas"]) == (1e-3, 0.3, (0.8, 0.9))
    assert new["initial_lr"] == pytest.approx(2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10, last_epoch=5)
    optimizer.step()
    scheduler.step()
    assert old["lr"] / new["lr"] == pytest.approx(5)


def test_a_scheduler_goes_on_where_all_have_one_rate():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    train(model, optimizer, 1)
    sl.densify_(model, optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0075]


def test_frozen_layers_stay_out_of_the_optimizer():
    model = small()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    train(model, optimizer, 2)
    sl.densify_(model, optimizer, moments="carry")
    assert not model[0].weight.requires_grad
    assert all(p is not model[0].weight for p in optimizer.param_groups[0]["params"])


def test_before_the_first_step_there_is_nothing_to_carry():
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    sl.densify_(model, optimizer, moments="carry")
    assert not optimizer.state


@pytest.mark.parametrize(
    ("optimizer", "how", "message"),
    [
        (lambda p: torch.optim.Adagrad(p), {"moments": "carry"}, "no rule for Adagrad; .* Use moments='reset'"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"moments": "carry"}, "Adam with amsgrad"),
        (lambda p: torch.optim.Adam(p), {"moments": "keep"}, "allowed: 'reset', 'carry'"),
        (lambda p: torch.optim.Adam(p), {"lr": 0.0}, "must be finite and positive"),
        (lambda p: torch.optim.Adam([next(iter(p))]), {}, "0: the optimizer lacks second; give the one"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(optimizer, how, message):
    model = small(bias=False)
    optimizer = optimizer(model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(ValueError, match=message):
        sl.densify_(model, optimizer, **how)
    assert isinstance(model[0], sl.StructuredLinear)
    assert [p for group in optimizer.param_groups for p in group["params"]] == held


def test_rates_of_their_own_need_a_rate_for_the_dense_weight():
    model = small()
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-3))
    with pytest.raises(ValueError, match=r"3: its factors have the learning rates 0.0005, 0.004; give"):
        sl.densify_(model, optimizer)
    assert isinstance(model[0], sl.StructuredLinear)


def test_the_norm_of_the_derivative_is_estimated_well():
    layer = make(sl.LowRank(4), (24, 16), "cpu")
    down, up = layer.down.detach(), layer.up.detach()
    exact = 16 * up.square().sum() + 24 * down.square().sum()  # dW/d down = up x I, dW/d up = I x down
    found = moments._squared_norm(layer, ["down", "up"])
    assert_close(found, exact, 0.2)
