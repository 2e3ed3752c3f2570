"""Two processes compute what one does: data parallelism, fully sharded data parallelism, and tensor parallelism."""

from __future__ import annotations

import os
import traceback

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import structlin as sl
from structlin.testing import assert_close

WORLD = 2
CUDA = os.environ.get("STRUCTLIN_TEST_DEVICE") == "cuda" and torch.cuda.device_count() >= WORLD

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

RULES = {
    "monarch": sl.Monarch(nblocks=4),
    "low_rank": sl.LowRank(rank=6),
    "blast": sl.Blast(nblocks=2, rank=6),
    "dyad": sl.Dyad(nblocks=4),
    "kronecker": sl.Kronecker(),
    "tensor_train": sl.TensorTrain(),
    "padded": sl.Monarch(nblocks=6, rank=2, pad=True),
    "sum": sl.BlockDiagonal(nblocks=2) + sl.LowRank(rank=4),
    "dense": sl.Dense(),
}


def build(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).double()
    sl.to_structured_(model, {"*": spec})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def tokens():
    return torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model, x):
    """Output, gradients, and parameters after two steps at the rates of structlin."""
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        grads = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
        optimizer.step()
    return full(y.detach()), grads, {name: full(parameter.detach()) for name, parameter in model.named_parameters()}


def full(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().cpu()


def worker(rank, folder):
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if CUDA else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    found = {}
    for job, name in JOBS:
        try:
            found[job.__name__, name] = job(RULES[name], rank, device)
        except Exception:  # told by the test of this job
            found[job.__name__, name] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(name of a job, name of a structure) -> what each process returned; they start once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    return {key: [result[key] for result in results] for key in results[0]}


def returned(found, job, name):
    results = found[job.__name__, name]
    for result in results:
        assert not isinstance(result, str), result
    return results


def mesh(device):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (WORLD,))


def data_parallel(spec, rank, device):
    model = build(spec).to(device)
    y, grads, weights = trained(nn.parallel.DistributedDataParallel(model), tokens().chunk(WORLD)[rank].to(device))
    return y, {n.removeprefix("module."): g for n, g in grads.items()}, {
        n.removeprefix("module."): w for n, w in weights.items()
    }  # fmt: skip


def fully_sharded(spec, rank, device):
    from torch.distributed.fsdp import fully_shard

    model = build(spec).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh(device))
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    return trained(model, tokens().chunk(WORLD)[rank].to(device))


def tensor_parallel(spec, rank, device):
    from structlin.parallel import ShardedLinear, shard_

    model = build(spec).to(device)
    assert shard_(model, mesh(device)) == ["0", "2"]
    layer = model[0]
    assert isinstance(layer, ShardedLinear)
    largest = max((p for n, p in layer.named_parameters() if n != "bias"), key=lambda p: p.numel())
    assert largest.to_local().numel() * WORLD == largest.numel()
    x = tokens().to(device).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().mean(), x)
    y, grads, weights = trained(model, tokens().to(device))
    assert_close(layer.whole()(x), layer(x))
    assert_close(layer.to_dense()(x), layer(x))
    return y, grads, weights, dx.cpu()


def refusals(spec, rank, device):
    from structlin.parallel import shard_

    told = []
    odd = nn.Sequential(sl.StructuredLinear(15, 9, sl.LowRank(rank=3)))
    table, (rows, columns) = next(sl.Pixelfly.examples())
    normalised, looked_up = build(spec), nn.Sequential(sl.StructuredLinear(columns, rows, table))
    sl.normalise_(normalised)
    hooked, tied = build(spec), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    hooked[2].register_forward_hook(lambda *_: None)
    sl.to_structured_(tied, {"*": spec})
    tied[1].first = tied[0].first
    for model in (odd, normalised, looked_up, nn.Sequential(nn.Linear(4, 4)), hooked, tied):
        before = [type(module) for module in model.modules()]
        try:
            shard_(model, mesh(device))
        except ValueError as refusal:
            told.append((str(refusal),))
        assert [type(module) for module in model.modules()] == before
    return told


def two_names(spec, rank, device):
    from structlin.parallel import shard_

    model = nn.ModuleDict({"a": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    model["b"] = model["a"]
    sl.to_structured_(model, {"*": spec})
    names = shard_(model, mesh(device))
    return [(names, model["a"] is model["b"])]


JOBS = [
    (data_parallel, "monarch"),
    (fully_sharded, "monarch"),
    (refusals, "monarch"),
    (two_names, "monarch"),
    *((tensor_parallel, name) for name in RULES),
]


def check(wanted, results, parts):
    y = torch.cat([result[0] for result in results]) if parts else results[0][0]
    assert_close(y, wanted[0])
    for result in results:
        for mine, right in zip(result[1:3], wanted[1:3], strict=True):
            assert mine.keys() == right.keys()
            for name in right:
                assert_close(mine[name], right[name], 1e-9)


@pytest.mark.parametrize("job", [data_parallel, fully_sharded], ids=["ddp", "fsdp2"])
def test_replicas_on_halves_of_a_batch_are_one_model(job, found):
    check(trained(build(RULES["monarch"]), tokens()), returned(found, job, "monarch"), parts=True)


def test_a_layer_of_two_names_is_cut_once(found):
    for ((names, one),) in returned(found, two_names, "monarch"):
        assert sorted(names) == ["a", "b", "c"]
        assert one


@pytest.mark.parametrize("name", RULES)
def test_a_layer_cut_in_two_is_one_layer(name, found):
    results = returned(found, tensor_parallel, name)
    check(trained(build(RULES[name]), tokens()), results, parts=False)
    x = tokens().requires_grad_()
    (dx,) = torch.autograd.grad(build(RULES[name])(x).square().mean(), x)
    for result in results:
        assert_close(result[3], dx)


def test_what_cannot_be_cut_is_refused_in_words(found):
    (odd,), (normalised,), (looked_up,), (dense,), (hooked,), (tied,) = returned(found, refusals, "monarch")[0]
    assert "2: has hooks, which would be lost" in hooked
    assert "1: shares first with another module" in tied
    assert "no axis of i=15, o=9, r=3 can be cut into 2 equal parts" in odd
    assert "0: has normalised" in normalised
    assert "2: has normalised" in normalised
    assert "looks up blocks by a table" in looked_up
    assert "no structured layer" in dense
