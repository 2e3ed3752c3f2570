"""Mixtures of experts in one linear layer, and in a whole block, beside dense ones. Writes records and prints them.

    PYTHONPATH=src python benchmarks/routed.py --out results/routed-h200.json
    PYTHONPATH=src python benchmarks/routed.py --steps --out results/routed-steps-h200.json

Layers: BTT-MoE of 8 experts, 2 for each token, beside nn.Linear and beside the same mixture with all experts computed
and multiplied by a gate of zeros, as the published code does. Blocks: a decoder block with BTT-MoE in every linear
layer, beside a dense one and one whose MLP is the standard mixture with the active parameters of the dense MLP. The
time is that of forward and backward, with the losses of the routers, replayed as a CUDA graph; the mixture runs as it
is, under torch.compile, and with tokens sorted by expert alone. Routers are random, so that all experts have work.
Nothing is timed before the mixture agrees with the one that computes all experts. Each problem runs in a process of its
own, and again without a contender that fails, whose failure the record names; the file is written after each problem.
With --steps the kernels of each layer are timed one by one instead, beside the bytes that they have to move, and for
other sizes of their loops. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench_cudagraph

import structlin as sl
from structlin.bench.timing import Clock, capture, take_turns
from structlin.kernels import route, routed
from structlin.kernels.sets import group
from structlin.machine import provenance
from structlin.models.gpt import Block, GPTConfig, angles
from structlin.nn import MoEFFN, RoutedLinear, Router, routing_load, routing_loss
from structlin.ops import mixture
from structlin.ops.rows import program
from structlin.report import records
from structlin.testing import error

SHAPES = ((1024, 4096), (2048, 8192), (4096, 4096))
EXPERTS, TOP_K, SEED, CONTEXT, REPEATS = 8, 2, 0, 1024, 30
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
TRIED = {
    "first": ((64, 4, 3), (128, 8, 3)), "second": ((128, 4, 3), (128, 8, 3)),
    "backward_second": ((64, 4, 2), (128, 8, 2)), "backward_first": ((64, 4, 2), (128, 8, 2)),
}  # fmt: skip
"""Other ways to run a kernel: for how many places at a time, with how many warps and stages."""


class AllExperts(nn.Module):
    """The weights of a BTT-MoE layer of two cores, every expert computed for every token and then gated."""

    def __init__(self, routed: RoutedLinear) -> None:
        super().__init__()
        self.router = routed.router
        # (experts, c, f, rank, a) and (experts, f, e, c, rank), of rank 1
        first, second = routed.first.detach()[:, :, :, 0], routed.second.detach()[..., 0]
        self.first = nn.Parameter(first.permute(1, 3, 2, 0).contiguous())  # c, a, f, experts
        self.second = nn.Parameter(second.permute(1, 3, 0, 2).contiguous())  # f, c, experts, e

    def forward(self, x: Tensor) -> Tensor:
        (c, a, f, experts), e = self.first.shape, self.second.shape[-1]
        _, gate, chosen, _ = self.router(x)
        gates = x.new_zeros(x.shape[0], experts).scatter(1, chosen, gate.to(x.dtype))
        z = torch.bmm(x.view(-1, c, a).transpose(0, 1), self.first.flatten(2)).view(c, -1, f, experts)
        z = (z * gates[:, None, :]).permute(2, 1, 0, 3).flatten(2)
        return torch.bmm(z, self.second.view(f, c * experts, e)).transpose(0, 1).flatten(1)


class ByExpert(nn.Module):
    """The layer with its tokens sorted by expert and grouped GEMMs of PyTorch, without kernels of ours."""

    def __init__(self, routed: RoutedLinear) -> None:
        super().__init__()
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch.object(mixture, "_on", return_value=False):
            y: Tensor = self.routed(x)
        return y


class OnTokens(nn.Module):
    """A decoder block on (tokens, width), read as sequences."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = GPTConfig(context=CONTEXT, width=width, heads=width // 64)
        self.block = Block(config)
        self.register_buffer("rotation", angles(config), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.view(-1, CONTEXT, x.shape[1]), self.rotation).flatten(0, 1)


def on_device(module: nn.Module) -> nn.Module:
    """The module, with routers that spread their tokens."""
    module = module.to(device=DEVICE, dtype=DTYPE)
    for router in (m for m in module.modules() if isinstance(m, Router)):
        nn.init.normal_(router.weight, std=router.in_features**-0.5)
    return module


def training(module: nn.Module, run: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; returns the gradient of the input."""
    mixture = any(isinstance(m, Router) for m in module.modules())
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]

    def step() -> Tensor:
        y = run(x)
        ends = [(y, dy), (routing_loss(module), None)] if mixture else [(y, dy)]
        return torch.autograd.grad([end for end, _ in ends], wanted, [d for _, d in ends])[0]

    return step


class ContenderError(RuntimeError):
    """Name of a contender, and why it failed; the device may be of no more use to this process."""


def measure(modules: dict[str, nn.Module], x: Tensor, dy: Tensor, without: dict[str, str]) -> dict[str, float]:
    """Median milliseconds of each but those ``without``, replayed in turns.

    Raises:
        ContenderError: when one fails.
    """
    graphs: dict[str, Callable[[], None]] = {}
    for name, module in modules.items():
        if name in without:
            continue
        try:
            run = torch.compile(module, fullgraph=True) if name.endswith("compiled") else module
            graphs[name] = capture(training(module, run, x, dy)).replay
        except Exception as failure:
            raise ContenderError(name, repr(failure)[:600]) from failure
    times = take_turns(Clock(DEVICE), graphs, 1, REPEATS)
    return {name: 1e3 * taken.median for name, taken in times.items()}


def note(
    name: str, config: dict[str, object], metrics: dict[str, float], wrong: dict[str, str], error: str | None = None
) -> records.Record:
    """The record of a problem; ``wrong`` says which contenders failed, ``error`` why it has no result."""
    print(f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()), error or "", flush=True)
    where = provenance(" ".join(["python", *sys.argv]), SEED, DEVICE)
    measured = {"config": config | {"failed": wrong}, "metrics": metrics, "error": error}
    return {"kind": "spike", "name": f"routed {name}", **where, **measured, "status": "failed" if error else "ok"}


def relative(times: dict[str, float], to: dict[str, str]) -> dict[str, float]:
    """Times, and each of them over those named in ``to``, in which the label stands for a contender."""
    metrics = {f"{name}_ms": ms for name, ms in times.items()}
    for label, base in to.items():
        metrics |= {f"{n}_over_{label}": ms / times[base] for n, ms in times.items() if n != base and base in times}
    return metrics


@torch.no_grad()
def disagreement(way: nn.Module, every: nn.Module, router: Router, x: Tensor) -> float:
    """Error of tokens that both ways send to the same experts: rounded logits are now and then equal.

    Raises:
        ValueError: when these are not nearly all.
    """
    found, sent = [], []
    for run in (way, every):
        found.append(run(x))
        assert router.last is not None
        sent.append(router.last.chosen.sort(1).values)
    same = (sent[0] == sent[1]).all(1)
    if not same.float().mean() > 0.99:
        raise ValueError(f"{int((~same).sum())} of {x.shape[0]} tokens go to other experts")
    return error(found[0][same], found[1][same])


def layer(shape: tuple[int, int], tokens: int, wrong: dict[str, str]) -> records.Record:
    in_features, out_features = shape
    spec = sl.btt_moe(EXPERTS, TOP_K)
    torch.manual_seed(SEED)
    routed = on_device(RoutedLinear(in_features, out_features, spec, bias=False))
    every, dense = AllExperts(routed), on_device(nn.Linear(in_features, out_features, bias=False))
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(tokens, out_features, device=DEVICE, dtype=DTYPE)
    off = max(disagreement(way, every, routed.router, x) for way in (routed, ByExpert(routed)))
    if not off < 0.02:
        raise ValueError(f"{in_features}->{out_features}: the mixture is {off:.3g} off the one of all experts")
    modules = {"dense": dense, "all_experts": every, "all_experts_compiled": every}
    modules |= {"routed": routed, "routed_compiled": routed, "routed_by_expert": ByExpert(routed)}
    times = measure(modules, x, dy, wrong)
    load = next(iter(routing_load(routed).values())).load
    config = {"spec": str(spec), "shape": [out_features, in_features], "tokens": tokens, "dtype": str(DTYPE)}
    metrics = relative(times, {"dense": "dense", "all_experts": "all_experts"})
    metrics |= {"error": off, "largest_load": load.max().item()}
    return note(f"{in_features}->{out_features}", config, metrics, wrong)


def block(width: int, tokens: int, wrong: dict[str, str]) -> records.Record:
    spec = sl.btt_moe(EXPERTS, TOP_K)
    torch.manual_seed(SEED)
    dense, standard, routed = OnTokens(width), OnTokens(width), OnTokens(width)
    standard.block.mlp = MoEFFN(width, 4 * width // TOP_K, EXPERTS, TOP_K)
    sl.to_structured_(routed, {"*": spec})
    modules = {"dense": on_device(dense), "standard_moe": on_device(standard), "routed": on_device(routed)}
    x, dy = (torch.randn(tokens, width, device=DEVICE, dtype=DTYPE) for _ in range(2))
    times = measure(modules | {f"{name}_compiled": module for name, module in modules.items()}, x, dy, wrong)
    config = {"spec": str(spec), "width": width, "context": CONTEXT, "tokens": tokens, "dtype": str(DTYPE)}
    metrics = relative(times, {"dense": "dense", "standard_moe": "standard_moe"})
    return note(f"block of width {width}", config, metrics, wrong)


def steps(shape: tuple[int, int], tokens: int, wrong: dict[str, str]) -> records.Record:
    """Milliseconds of each kernel of a layer, and its terabytes a second, of the bytes that it has to move."""
    in_features, out_features = shape
    torch.manual_seed(SEED)
    spec = sl.btt_moe(EXPERTS, TOP_K)
    (chain,) = program(spec.expert_plan(out_features, in_features)).chains
    assert chain.digits is not None
    c, a, f, o = chain.digits

    def rand(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=DTYPE) * scale

    x, dy, weight = rand(tokens, c * a), rand(tokens, f * o), rand(EXPERTS, c * a, scale=(c * a) ** -0.5)
    first, second = rand(EXPERTS, c, f, a, scale=a**-0.5), rand(EXPERTS, f, o, c, scale=c**-0.5)
    logits, gate, chosen = route.route(x, weight, None, TOP_K)
    sets = group(chosen, EXPERTS)
    _, z = routed.forward(x, first, second, gate, sets)
    dz, _, parts = routed.backward_second(dy, second, gate, z, sets)
    dlogits = route.unroute(parts, None, logits, gate, EXPERTS, sets)
    between = tokens * TOP_K * c * f * 2
    into, out = 2 * x.numel(), 2 * dy.numel()
    placed = routed.by_place(gate, sets)
    added = torch.empty(sets.unit.numel(), second[0].numel(), device=DEVICE)
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "route": (into, lambda: route.route(x, weight, None, TOP_K)),
        "group": (0, lambda: group(chosen, EXPERTS)),
        "forward": (into + 2 * between + out, lambda: routed.forward(x, first, second, gate, sets)),
        "backward_second": (out + 2 * between, lambda: routed.backward_second(dy, second, gate, z, sets)),
        "unroute": (4 * parts.numel(), lambda: route.unroute(parts, None, logits, gate, EXPERTS, sets)),
        "backward_first": (between + 2 * into, lambda: routed.backward_first(dz, x, first, sets, dlogits, weight)),
        "first": (into + between, lambda: routed.forward_first(x, first, sets)),
        "second": (between + out, lambda: routed.forward_second(z, second, placed, sets)),
        "by_place": (8 * gate.numel(), lambda: routed.by_place(gate, sets)),
        "added": (4 * added.numel(), lambda: routed.added(added, sets.unit, second)),
    }
    metrics: dict[str, float] = {}
    for name, (size, run) in runs.items():
        metrics[f"{name}_ms"] = do_bench_cudagraph(run, rep=25, return_mode="median")
        metrics[f"{name}_tb_per_s"] = size / metrics[f"{name}_ms"] * 1e-9
    for name, ways in TRIED.items():
        for size in ways:
            with mock.patch.object(routed, name.upper(), size), suppress(OutOfResources):
                taken = do_bench_cudagraph(runs[name][1], rep=25, return_mode="median")
                metrics["_".join(map(str, (name, *size, "ms")))] = taken
    config = {"spec": str(spec), "shape": [out_features, in_features], "digits": [c, a, f, o], "tokens": tokens}
    return note(f"steps of {in_features}->{out_features}", config | {"dtype": str(DTYPE)}, metrics, wrong)


def apart(
    problem: Callable[[Any, int, dict[str, str]], records.Record], size: tuple[int, int] | int, tokens: int
) -> records.Record:
    """The record of a problem, each attempt in a new process, as a capture that fails leaves a device without use."""
    wrong: dict[str, str] = {}
    while True:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                return process.submit(problem, size, tokens, wrong).result()
            except ContenderError as failure:
                name, why = failure.args
            except Exception as failure:
                config: dict[str, object] = {"size": size, "tokens": tokens}
                return note(f"{problem.__name__} {size}", config, {}, wrong, repr(failure)[:600])
        print(f"  {name} failed: {why}", flush=True)
        wrong[name] = why


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="times mixtures of experts beside dense layers")
    parser.add_argument("--out", required=True, help="file for the records, JSON")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", action="store_true", help="time the kernels of each layer one by one")
    parser.add_argument("--blocks", type=int, nargs="*", default=[1024], help="widths of the blocks, none for no block")
    arguments = parser.parse_args()
    found: list[records.Record] = []
    problems = [*((layer, shape) for shape in SHAPES), *((block, width) for width in arguments.blocks)]
    for problem, size in [(steps, shape) for shape in SHAPES] if arguments.steps else problems:
        found.append(apart(problem, size, arguments.tokens))
        records.write(arguments.out, found)
    ratios = [r["metrics"]["routed_over_dense"] for r in found if "routed_over_dense" in r["metrics"]]
    if ratios:
        print(f"routed over dense, median of {len(ratios)}: {statistics.median(ratios):.3g}")
