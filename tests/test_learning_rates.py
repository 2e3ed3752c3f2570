"""The rates do what they are for: activations change alike at two widths and depths, and so does nothing else."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.spec import STRUCTURES

WIDTHS = (64, 256)
RATES = {"adam": 1e-3, "sgd": 0.04}
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SEEDS = 2
WITHIN = {"adam": 1.7, "sgd": 2.2}  # largest ratio of the changes at two widths


def fits(spec):
    try:
        return all(spec.plan(width, width) for width in WIDTHS)
    except ValueError:
        return False


def specs():
    """Of every registered structure its default where that fits both widths, or else an example that does."""
    found = [
        sl.LowRank(0.25), sl.Pixelfly(block_size=4), sl.Chain("g i; g o i -> g o", sizes="g=4"), sl.BTT(2).T,
        sl.LowRank(0.25) + sl.BlockDiagonal(4), sl.Kronecker() @ sl.Monarch(4),
    ]  # fmt: skip
    for cls in STRUCTURES.values():
        # trained masks decide how many inputs a factor sums over, which the rates do not follow
        if cls is not sl.Gblr and not any(type(spec) is cls for spec in found):
            required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            defaults = [] if required else [cls()]
            found += [spec for spec in (*defaults, *(spec for spec, _ in cls.examples())) if fits(spec)][:1]
    return found


def network(spec, width, seed=0):
    """Two structured layers between a dense input and a dense readout, which starts at zero, as muP allows."""
    torch.manual_seed(seed)
    hidden = [sl.StructuredLinear(width, width, spec) for _ in range(2)]
    net = nn.Sequential(nn.Linear(8, width), hidden[0], nn.ReLU(), hidden[1], nn.ReLU(), nn.Linear(width, 8))
    nn.init.normal_(net[0].weight)
    nn.init.zeros_(net[5].weight)
    for layer in (net[0], net[5]):
        nn.init.zeros_(layer.bias)
    return net


def changes(spec, width, optimizer, ours):
    """Root mean square of what five steps change behind each layer after the first."""
    squares = torch.zeros(3)
    with torch.device("meta"):
        base = network(spec, WIDTHS[0])
    for seed in range(SEEDS):
        net, lr = network(spec, width, seed), RATES[optimizer]
        scaled = sl.param_groups(net, lr, optimizer=optimizer, base=base)
        x, y = torch.randn(64, 8), torch.randn(64, 8)
        old = copy.deepcopy(net)
        chosen = OPTIMIZERS[optimizer](scaled if ours else net.parameters(), lr=lr)
        train(net, chosen, lambda: (net(x) - y).square().mean(), 5)  # noqa: B023, called at once
        with torch.no_grad():
            squares += torch.stack([(net[:k](x) - old[:k](x)).square().mean() for k in (2, 4, 6)])
    return (squares / SEEDS).sqrt()


def train(net, optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def drift(spec, optimizer, ours):
    """Largest ratio, either way up, of a change at the large width to that at the small one."""
    small, large = (changes(spec, width, optimizer, ours) for width in WIDTHS)
    return max((small / large).max().item(), (large / small).max().item())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("spec", specs(), ids=str)
def test_activations_change_alike_at_both_widths(spec, optimizer):
    assert drift(spec, optimizer, ours=True) < WITHIN[optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("spec", [sl.Dense(), sl.Monarch(4), sl.Dyad(4), sl.LowRank(0.25)], ids=str)
def test_under_one_rate_they_do_not(spec, optimizer):
    assert drift(spec, optimizer, ours=False) > WITHIN[optimizer]


class Residual(nn.Module):
    """Branches of a structured layer, each multiplied by 1 / sqrt(depth)."""

    def __init__(self, depth):
        super().__init__()
        self.branches = nn.ModuleList(sl.StructuredLinear(32, 32, sl.Monarch(2)) for _ in range(depth))

    def forward(self, x):
        for branch in self.branches:
            x = x + torch.tanh(branch(x)) * len(self.branches) ** -0.5
        return x


def change_at_depth(layers, optimizer, **how):
    torch.manual_seed(0)
    net = Residual(layers)
    x, cotangent = torch.randn(2, 16, 32)
    before = net(x).detach()
    optimizer = OPTIMIZERS[optimizer](sl.param_groups(net, RATES[optimizer] / 10, optimizer=optimizer, **how))
    train(net, optimizer, lambda: (net(x) * cotangent).sum() / 32**0.5, 1)
    return (net(x) - before).square().mean().sqrt().item()


def test_deep_models_change_as_shallow_ones_do():
    shallow = change_at_depth(4, "adam")
    assert change_at_depth(64, "adam", depth={"branches.*": 16}) == pytest.approx(shallow, rel=0.4)
    assert change_at_depth(64, "adam") > 2.5 * shallow
    assert change_at_depth(64, "sgd", depth={"branches.*": 16}) == change_at_depth(64, "sgd")
    assert change_at_depth(64, "sgd") == pytest.approx(change_at_depth(4, "sgd"), rel=0.4)
