"""Structured layers cut over the devices of one machine, beside one device: forward and backward, time and memory.

    torchrun --nproc-per-node 2 benchmarks/parallel.py results/parallel-h200.json
    torchrun --nproc-per-node 2 benchmarks/parallel.py records.json --width 64 --tokens 32

Every process runs the whole layer by itself, then all run it cut by `structlin.parallel.shard_`, on the same input. The
first process writes the records: median milliseconds of a pass, and the bytes of parameters in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import structlin as sl
from structlin.machine import provenance
from structlin.parallel import shard_
from structlin.report import records
from structlin.report.records import Record

SPECS = {
    "dense": sl.Dense(),
    "monarch": sl.Monarch(nblocks=4),
    "low_rank": sl.LowRank(rank=0.25),
    "blast": sl.Blast(nblocks=4, rank=0.25),
    "dyad": sl.Dyad(nblocks=4),
}


def milliseconds(model: nn.Module, x: torch.Tensor, repeats: int) -> float:
    times = []
    for turn in range(repeats + 3):
        if x.is_cuda:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])
        if x.is_cuda:
            torch.cuda.synchronize()
        if turn >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def held(model: nn.Module) -> int:
    found = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out")
    add("--width", type=int, default=8192)
    add("--tokens", type=int, default=16384)
    add("--repeats", type=int, default=20)
    options = parser.parse_args()
    rank, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    found: list[Record] = []
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        where = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}
        model = nn.Sequential(sl.StructuredLinear(options.width, options.width, spec, bias=False, **where))
        x = torch.randn(options.tokens, options.width, **where).requires_grad_()
        metrics: dict[str, float | int | None] = {
            "whole_ms": milliseconds(model, x, options.repeats), "whole_bytes": held(model)
        }  # fmt: skip
        shard_(model, mesh)
        metrics |= {"cut_ms": milliseconds(model, x, options.repeats), "cut_bytes": held(model)}
        record: Record = {
            "kind": "bench", "name": name, **provenance(" ".join(["torchrun", *sys.argv]), 0, device),
            "config": {**vars(options), "processes": dist.get_world_size(), "structure": str(spec)},
            "metrics": metrics, "status": "ok", "error": None,
        }  # type: ignore[typeddict-item]  # fmt: skip
        found.append(record)
        if rank == 0:
            print(name, {key: round(value, 3) for key, value in metrics.items() if value is not None}, flush=True)
            records.write(options.out, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
