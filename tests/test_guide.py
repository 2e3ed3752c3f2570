"""Self-guided training: the mix, its schedule, what is left of it afterwards, and resuming in its middle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.testing import assert_close, examples, inputs, make

ADAMS = [torch.optim.Adam, torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, momentum=0.9)]


def small(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        sl.StructuredLinear(16, 24, sl.BlockShuffle(2), dtype=dtype),
        nn.Tanh(),
        nn.Linear(24, 24, dtype=dtype),
        sl.StructuredLinear(24, 8, sl.LowRank(3), dtype=dtype),
    )


def train(model, optimizer, guide, steps, first=0):
    """Losses of ``steps`` training steps; the batch follows from the number of the step."""
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step), dtype=next(model.parameters()).dtype)
        loss = (model(x) - x[:, :8].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guide.step(optimizer)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_a_guide_starts_as_the_matrix_of_its_layer(spec, shape):
    if spec == sl.Dense():
        return
    layer = make(spec, shape, "cpu")
    x = inputs(layer, 5)
    before = layer(x)
    sl.guide_(layer, steps=10)
    for alpha in (1.0, 0.4, 0.0):
        layer.guide.alpha.fill_(alpha)
        assert_close(layer(x), before)


def test_outputs_are_mixed_and_to_dense_is_the_mix():
    layer = make(sl.Monarch(2), (24, 16), "cpu")
    structured = layer.to_dense()
    sl.guide_(layer, steps=10)
    dense = nn.Linear(16, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.guide.weight.copy_(dense.weight)
        dense.bias.copy_(layer.bias)
    x = inputs(layer, 3)
    for alpha in (1.0, 0.25, 0.0):
        layer.guide.alpha.fill_(alpha)
        wanted = alpha * dense(x) + (1 - alpha) * structured(x)
        assert_close(layer(x), wanted, 1e-7)  # alpha is a float32
        assert_close(layer.to_dense()(x), wanted, 1e-7)
        layer.backend = "dense"
        assert_close(layer(x), wanted, 1e-7)
        layer.backend = "auto"


def test_the_share_falls_as_a_cosine_or_a_line():
    def shares(**how):
        model = small()
        guide, found = sl.guide_(model, steps=6, warmup=2, **how), []
        optimizer = torch.optim.SGD(model.parameters())
        while not guide.done:
            assert model[0].guide.alpha.item() == pytest.approx(guide.alpha)
            found.append(guide.alpha)
            guide.step(optimizer)
        return [*found, guide.alpha]

    assert shares() == pytest.approx([1, 1, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4))])
    assert shares(schedule="linear") == [1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_nothing_is_left_of_the_guides(make_optimizer):
    model = small()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    guide = sl.guide_(model, steps=4)
    assert list(guide.layers) == ["0", "3"]
    guides = {model[0].guide.weight, model[3].guide.weight}
    optimizer = make_optimizer(sl.param_groups(model, lr=1e-2, weight_decay=0.1))
    groups = len(optimizer.param_groups)
    train(model, optimizer, guide, 3)
    assert guides <= {p for group in optimizer.param_groups for p in group["params"]}
    assert guides <= optimizer.state.keys()
    train(model, optimizer, guide, 1)
    assert guide.done
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    left = {p for group in optimizer.param_groups for p in group["params"]}
    assert left == {*model.parameters()} == {*optimizer.state}
    assert len(optimizer.param_groups) == groups
    losses = train(model, optimizer, guide, 30)
    assert losses[-1] < losses[0]


def test_an_emptied_group_stays_for_the_scheduler():
    model = small()
    guide = sl.guide_(model, steps=2)
    guides = [model[0].guide.weight, model[3].guide.weight]
    rest = [p for p in model.parameters() if all(p is not g for g in guides)]
    optimizer = torch.optim.AdamW([{"params": guides, "lr": 0.1}, {"params": rest, "lr": 0.01}])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    for step in range(4):
        train(model, optimizer, guide, 1, step)
        scheduler.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(rest)]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0], abs=1e-9)


def test_the_loss_is_continuous_where_the_guides_go():
    model = small()
    guide = sl.guide_(model, steps=50, schedule="linear")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, guide, 49)
    x = torch.randn(64, 16, dtype=torch.float64)
    before = model(x)
    assert torch.linalg.norm(model[0].guide.mixed(torch.zeros(24, 16)))  # the guide has a share of 1/50 still
    guide.drop(optimizer)
    assert 0 < (model(x) - before).norm() / before.norm() < 0.02


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_resumed_run_is_the_same_run(stochastic):
    def start():
        model = small()
        guide = sl.guide_(model, steps=6, warmup=1, stochastic=stochastic, seed=3)
        return model, guide, torch.optim.AdamW(sl.param_groups(model, lr=1e-2, weight_decay=0.1))

    model, guide, optimizer = start()
    whole = train(model, optimizer, guide, 10)
    for stop in (3, 6, 8):
        model, guide, optimizer = start()
        first = train(model, optimizer, guide, stop)
        saved = copy.deepcopy((model.state_dict(), guide.state_dict(), optimizer.state_dict()))
        model, guide, optimizer = start()
        guide.load_state_dict(saved[1], optimizer)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[2])
        assert first + train(model, optimizer, guide, 10 - stop, stop) == whole


def test_a_checkpoint_keeps_the_guides(tmp_path):
    model = small(torch.float32)
    guide = sl.guide_(model, steps=8)
    train(model, torch.optim.Adam(model.parameters(), 1e-2), guide, 4)
    sl.save(model, tmp_path / "model")
    x = torch.randn(5, 16)
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 8))
        sl.load(fresh, tmp_path / "model")
        assert_close(fresh(x), model(x), 0)
        again = sl.guide_(fresh, steps=8)
        again.load_state_dict(guide.state_dict())
        assert_close(fresh(x), model(x), 0)


def test_a_stochastic_run_leaves_out_all_guides_or_none_alike_everywhere():
    def decisions(seed):
        model = small()
        guide = sl.guide_(model, steps=100, schedule="linear", stochastic=True, seed=seed)
        optimizer, found = torch.optim.SGD(model.parameters()), []
        torch.seed()  # the state of torch's generators does not matter
        while not guide.done:
            assert model[0].guide.active == model[3].guide.active
            found.append(model[0].guide.active)
            guide.step(optimizer)
        return found

    first = decisions(0)
    assert first == decisions(0) != decisions(1)
    assert sum(first[:25]) > 17
    assert 35 < sum(first) < 65
    assert sum(first[-25:]) < 8


def test_a_guide_left_out_costs_nothing_and_learns_nothing_but_evaluates():
    layer = make(sl.Monarch(2), (16, 16), "cpu")
    x = inputs(layer, 3)
    before = layer(x)
    sl.guide_(layer, steps=10)
    with torch.no_grad():
        layer.guide.weight.mul_(2)
    mixed = layer(x)
    layer.guide.active = False
    assert_close(layer(x), before, 0)
    layer(x).sum().backward()
    assert layer.guide.weight.grad is None
    assert_close(layer.eval()(x), mixed, 0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_compiled_model_trains_alike_in_few_graphs(stochastic):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    runs = []
    for compiled in (False, True):
        model = small()
        run = torch.compile(model, fullgraph=True, backend=count) if compiled else model
        guide = sl.guide_(model, steps=6, stochastic=stochastic)
        optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-2))
        runs.append(train(run, optimizer, guide, 8))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert len(graphs) == (3 if stochastic else 2)  # guided, left out for a step, and without guides


def test_autocast_and_half_precision():
    model = small(torch.float32)
    guide = sl.guide_(model, steps=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(3, 16)).dtype == torch.bfloat16
        train(model, torch.optim.Adam(model.parameters()), guide, 3)
    assert guide.done
    model = small(torch.bfloat16)
    sl.guide_(model, steps=3)
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_explain_names_the_guide():
    layer = make(sl.Monarch(2), (16, 16), "cpu")
    before = sl.explain(layer, 8)
    sl.guide_(layer, steps=3)
    *own, last = sl.explain(layer, 8)
    assert own == before
    assert (last.what, last.why) == ("dense 16x16", "the guide, mixed in")


def test_normalised_layers_are_guided_too():
    model = small()
    sl.normalise_(model)
    guide = sl.guide_(model, steps=3)
    optimizer = torch.optim.Adam(sl.param_groups(model, lr=1e-2))
    assert all(math.isfinite(loss) for loss in train(model, optimizer, guide, 5))
    assert guide.done


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps=0 and warmup=0 must be whole numbers"),
        ({"steps": 4, "warmup": 4}, "warmup from 0 to below steps"),
        ({"steps": 4.5}, "whole numbers"),
        ({"steps": 4, "schedule": "exponential"}, "allowed: 'cosine', 'linear'"),
    ],
)
def test_what_cannot_be_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        sl.guide_(small(), **how)


def test_what_has_no_use_for_a_guide_is_refused():
    with pytest.raises(ValueError, match="no structured layer to guide"):
        sl.guide_(nn.Sequential(nn.Linear(4, 4), sl.StructuredLinear(4, 4, sl.Dense())), steps=3)
    model = small()
    optimizer = torch.optim.SGD(model.parameters())
    guide = sl.guide_(model, steps=3)
    with pytest.raises(ValueError, match="no optimizer given to step\\(\\) has the guide of 0"):
        guide.step(optimizer)
    with pytest.raises(ValueError, match="0: has a guide; drop it first"):
        sl.to_dense_(model)
    guide.drop(optimizer)
    assert sl.to_dense_(model) == ["0", "3"]
