"""A mixture of experts trained by two processes: what each has is what one process has on all tokens."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import structlin as sl
from structlin.nn import RoutedLinear, routing_loss, update_balance_

TOKENS, WIDTH = 12, 16


def build():
    torch.manual_seed(0)
    spec = sl.MoE(sl.BTT(), 4, 2, balance="bias")
    model = nn.Sequential(RoutedLinear(WIDTH, WIDTH, spec, dtype=torch.float64), nn.GELU())
    nn.init.normal_(model[0].router.weight)
    return model


def tokens():
    torch.manual_seed(1)
    return torch.randn(2 * TOKENS, WIDTH, dtype=torch.float64)


def losses(model, y):
    return y.square().mean() + routing_loss(model)


def replica(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build()
    parallel = nn.parallel.DistributedDataParallel(model)
    losses(model, parallel(tokens().chunk(2)[rank])).backward()
    update_balance_(model)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save((grads, model[0].router.bias_steps), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_replicas_are_one_model(tmp_path):
    mp.spawn(replica, (str(tmp_path),), nprocs=2)
    model = build()
    y = model(tokens())
    (y.square().mean() + routing_loss(model)).backward()
    update_balance_(model)
    for rank in range(2):
        grads, steps = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(steps, model[0].router.bias_steps)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad)
