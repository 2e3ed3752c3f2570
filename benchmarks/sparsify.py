"""Pixelfly beside other block-sparse masks, the product of butterfly factors and dense: speed and loss at one density.

    PYTHONPATH=src python benchmarks/sparsify.py --limit 1500 --out results/sparsify-h200.json
    PYTHONPATH=src python benchmarks/sparsify.py --parts models --limit 600 --out results/sparsify-h200.json
    PYTHONPATH=src python benchmarks/sparsify.py --smoke --out smoke.json    # on a CPU, in a minute

Layers: forward and backward in bfloat16, compiled, replayed as CUDA graphs in turns, after their outputs agree with the
same layers in float64. Models: a whole training step, loss and fused AdamW included, compiled and as one CUDA graph:
GPT-2 medium on windows of 1024 tokens, ViT-B and Mixer-B on 196 patches, with every linear layer replaced that
`sparsify` makes sparse; weights and optimizer in bfloat16, random data. Quality: a small decoder on bytes of Python's
standard library, trained at two rates from one seed, then at the better one from two more; the magnitude masks are
those of the trained dense model. The other structures have as many weights as pixelfly, as near as sizes allow.

Every job runs in a process of its own, and its record is written when it ends; a job whose record is there is skipped,
and none starts that is not expected to end within --limit. With --smoke all is tiny, on the CPU and in this process,
nothing is compiled and there are no graphs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structlin as sl
from structlin import analysis, recipes
from structlin.bench.timing import Clock, capture, take_turns
from structlin.machine import provenance
from structlin.models.gpt import GPT, GPTConfig
from structlin.models.mixer import Mixer
from structlin.report import records
from structlin.sparsity import block_sizes, pixelfly_within
from structlin.spec import parse
from structlin.testing import error
from structlin.train import data
from structlin.train import model as decoders
from structlin.train.attention import whole
from structlin.widths import butterfly

Shape = tuple[int, int]
Found = tuple[dict[str, Any], dict[str, float | int | None], dict[str, list[float]]]
SHAPES: tuple[Shape, ...] = ((4096, 4096), (4096, 1024), (1024, 4096), (1024, 1024), (3072, 768), (768, 768))
CONTENDERS = ("dense", "pixelfly", "random", "magnitude", "butterfly")
MODELS = ("gpt2_medium", "vit_b", "mixer_b")
DENSITIES, RATES, SEEDS, REPEATS, TOKENS = (0.25, 0.1), (3e-4, 1e-3), (0, 1, 2), 30, 16384
SECONDS = {"layers": 60, "models": 110, "quality": 60}  # that a job is expected to take
PARTS = tuple(SECONDS)


class Job(NamedTuple):
    """A record to be: its name, the part it belongs to, and what makes it."""

    name: str
    part: str
    run: Callable[..., Found]
    arguments: tuple[Any, ...]


def device_of(smoke: bool) -> torch.device:
    return torch.device("cpu" if smoke else "cuda")


def rival(name: str, fly: sl.Pixelfly, shape: Shape, weight: Tensor | None = None) -> sl.Spec:
    """The structure of that name with as many weights as ``fly`` has at ``shape``, as near as it comes.

    The butterfly is the one of most factors within a tenth of that, with cells of 16 or more, else the nearest.
    """
    params = analysis.num_params(fly.plan(*shape))
    if name == "pixelfly":
        return fly
    if name == "butterfly":
        cells = gcd(*shape) // 16
        sizes = [size for size in range(2, cells + 1) if cells % size == 0]
        every = [sl.BlockButterfly(size, n + 1) for size in sizes for n in range(len(butterfly(size, None, n=size)))]
        off = {spec: abs(math.log(analysis.num_params(spec.plan(*shape)) / params)) for spec in every}
        return min(every, key=lambda s: (max(off[s], 0.1), -(s.nfactors or 0), off[s]))
    slots = max(1, round(params / (shape[0] * shape[1]) * fly.butterfly_size))
    if name == "random":
        return sl.BlockSparse(fly.butterfly_size, slots)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if weight is None else weight
    return sl.magnitude_mask(weight, fly.butterfly_size, slots)


def layer(shape: Shape, density: float, smoke: bool) -> Found:
    """Milliseconds of forward and backward of every contender."""
    device, tokens = device_of(smoke), 64 if smoke else TOKENS
    dtype = torch.float32 if smoke else torch.bfloat16
    fly = pixelfly_within(shape, density, block_sizes())
    specs = {name: rival(name, fly, shape) for name in CONTENDERS[1:]}
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"dense": nn.Linear(shape[1], shape[0], bias=False)}
    modules |= {name: sl.StructuredLinear(shape[1], shape[0], spec, bias=False) for name, spec in specs.items()}
    given = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    dy = torch.randn(tokens, shape[0], device=device, dtype=dtype)
    runs: dict[str, Callable[[], object]] = {}
    metrics: dict[str, float | int | None] = {}
    for name, module in modules.items():
        module.to(device, dtype)
        run = module if smoke else compiled(module, tokens)
        with torch.no_grad():
            off = error(run(given), copy.deepcopy(module).double()(given.double()))
        if not off < 0.02:
            raise ValueError(f"{name} of {shape[0]}x{shape[1]} is {off:.3g} off itself in float64")
        metrics[f"{name}_error"] = off
        # an input of its own: a leaf remembers the stream of its first backward pass
        wanted = [given.detach().clone().requires_grad_(), *module.parameters()]

        def step(run: Callable[[Tensor], Tensor] = run, wanted: list[Tensor] = wanted) -> Tensor:
            return torch.autograd.grad(run(wanted[0]), wanted, dy)[0]

        runs[name] = step if smoke else capture(step).replay
    times = take_turns(Clock(device), runs, 1, 3 if smoke else REPEATS)
    for name, taken in times.items():
        metrics |= {f"{name}_ms": 1e3 * taken.median, f"{name}_p10_ms": 1e3 * taken.p10,
                    f"{name}_p90_ms": 1e3 * taken.p90}  # fmt: skip
        metrics[f"{name}_speedup"] = times["dense"].median / taken.median
        if name != "dense":
            metrics[f"{name}_density"] = analysis.num_params(specs[name].plan(*shape)) / (shape[0] * shape[1])
    config = {"shape": [*shape], "density": density, "tokens": tokens, "dtype": str(dtype)}
    return config | {"specs": {name: str(spec) for name, spec in specs.items()}}, metrics, {}


def compiled(module: nn.Module, tokens: int) -> Any:
    """The module through torch.compile, its backends measured before."""
    if any(isinstance(m, sl.StructuredLinear) for m in module.modules()):
        sl.tune(module, tokens)
    return torch.compile(module, dynamic=False)


class Loss(nn.Module):
    """A classifier's loss as one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, a float32 scalar."""
        found = self.model(x)
        return F.cross_entropy((found if isinstance(found, Tensor) else found.logits).float(), labels)


def build(name: str, smoke: bool) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """The dense model with its loss, a batch for it, and the rows that its linear layers see."""
    import structlin.hf  # noqa: F401, for the layers of transformers

    torch.manual_seed(0)
    if name == "gpt2_medium":
        recipe = recipes.find("tiny_gpt2" if smoke else name)
        recipe = dataclasses.replace(recipe, width=256, mlp_width=1024) if smoke else recipe
        words, windows, context = (512, 2, 32) if smoke else (50257, 8, 1024)
        batch = (torch.randint(words, (windows, context + 1)),)
        return decoders.LanguageModel(decoders.dense(recipe, words)), batch, windows * context
    images, classes, depth = (2, 10, 1) if smoke else (128, 1000, 12)
    labels = torch.randint(classes, (images,))
    if name == "mixer_b":
        side, width, tokens, channels = (32, 256, 64, 1024) if smoke else (224, 768, 384, 3072)
        model: nn.Module = Mixer(side, 8 if smoke else 16, 3, classes, width, depth, tokens, channels)
        return Loss(model), (torch.randn(images, 3, side, side), labels), images * (16 if smoke else 196)
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4} if smoke else {}
    side = 32 if smoke else 224
    config = ViTConfig(
        num_labels=classes, num_hidden_layers=depth, image_size=side, attn_implementation=whole(), **sizes
    )
    model = ViTForImageClassification(config)
    return Loss(model.train()), (torch.randn(images, 3, side, side), labels), images * ((side // 16) ** 2 + 1)


def model(name: str, contender: str, density: float, smoke: bool) -> Found:
    """Milliseconds of a training step of a model."""
    device, dtype = device_of(smoke), torch.float32 if smoke else torch.bfloat16
    whole, batch, tokens = build(name, smoke)
    config: dict[str, Any] = {"model": name, "contender": contender, "density": density, "dtype": str(dtype)}
    config |= {"tokens": tokens, "batch": len(batch[0])}
    metrics: dict[str, float | int | None] = {"dense_params": sum(p.numel() for p in whole.parameters())}
    if contender != "dense":
        found = sl.sparsify(whole, density)
        rules = {n: s and rival(contender, s, found.shapes[n]) for n, s in found.rules.items()}
        swaps = sl.to_structured_(whole, rules)
        metrics["density"] = sum(s.params for s in swaps) / sum(s.dense_params for s in swaps)
        config["specs"] = sorted({f"{s.spec}@{s.out_features}x{s.in_features}" for s in swaps})
        config["dense_layers"] = len(found.kept)
    metrics["params"] = sum(p.numel() for p in whole.parameters())
    whole.to(device, dtype)
    inputs = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in batch]
    run = whole if smoke else compiled(whole, tokens)
    optimizer = torch.optim.AdamW(sl.param_groups(whole, 1e-4), fused=True, capturable=not smoke)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = run(*inputs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    start = time.perf_counter()
    once = step if smoke else capture(step).replay
    metrics["compile_s"] = time.perf_counter() - start
    taken = take_turns(Clock(device), {"step": once}, 1, 3 if smoke else REPEATS)["step"]
    metrics |= {"step_ms": 1e3 * taken.median, "step_p10_ms": 1e3 * taken.p10, "step_p90_ms": 1e3 * taken.p90}
    metrics["peak_bytes"] = None if smoke else torch.cuda.max_memory_allocated()
    return config, metrics, {}


def quality(contender: str, rate: float, seed: int, masks: Mapping[str, str], smoke: bool) -> Found:
    """Validation loss of a small decoder; ``masks`` are those of the magnitude contender, by layer."""
    device, density = device_of(smoke), DENSITIES[0]
    sizes = (
        GPTConfig(context=32, width=256, depth=1) if smoke else GPTConfig(context=256, width=1024, depth=4, heads=16)
    )
    steps, size = (3, 2) if smoke else (1500, 32)
    torch.manual_seed(seed)
    net = GPT(sizes)
    found = sl.sparsify(net, density, layers=["blocks.*"])
    shares: dict[str, float | int | None] = {}
    if contender != "dense":
        rules = {n: rival(contender, s, found.shapes[n]) for n, s in found.specs.items() if contender != "magnitude"}
        swaps = sl.to_structured_(net, rules or {name: parse(text) for name, text in masks.items()})
        shares["density"] = sum(s.params for s in swaps) / sum(s.dense_params for s in swaps)
    net.to(device)
    text = data.read_text()
    train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.valid))
    optimizer = torch.optim.AdamW(sl.param_groups(net, rate, 0.1), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 15), 0.5 + 0.45 * math.cos(math.pi * step / steps) + 0.05)
    )
    losses, start = [], time.perf_counter()
    for step in range(steps):
        windows = data.batch(train, seed, step, size, sizes.context).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not smoke):
            loss = net.loss(windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 3) == steps // 3 - 1:
            losses.append(float(loss.detach()))
    seconds = time.perf_counter() - start
    net.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not smoke):
        pieces = data.spread(valid, 8 if smoke else 512, sizes.context).to(device).split(size)
        final = sum(float(net.loss(piece)) * len(piece) for piece in pieces) / sum(map(len, pieces))
    config: dict[str, Any] = {"contender": contender, "density": density, "rate": rate, "seed": seed, "steps": steps}
    config |= {"batch": size, "context": sizes.context, "width": sizes.width, "depth": sizes.depth}
    if contender == "dense" and seed == SEEDS[0]:
        weights = {name: net.get_submodule(name).weight.detach().float().cpu() for name in found.specs}
        config["masks"] = {
            n: str(rival("magnitude", spec, found.shapes[n], weights[n])) for n, spec in found.specs.items()
        }
    metrics = {"valid_loss": final, "training_s": seconds, "params": sum(p.numel() for p in net.parameters())} | shares
    return config, metrics, {"loss": losses}


def jobs(parts: list[str], smoke: bool, found: Mapping[str, records.Record]) -> Iterator[Job]:
    """What is to be done, the most wanted first; later jobs depend on the records of earlier ones in ``found``."""
    shapes: tuple[Shape, ...] = ((256, 256), (1024, 256)) if smoke else SHAPES
    densities = DENSITIES[:1] if smoke else DENSITIES
    if "layers" in parts:
        for density in densities:
            for shape in shapes:
                yield Job(f"layer {shape[0]}x{shape[1]} d{density}", "layers", layer, (shape, density, smoke))
    if "models" in parts:
        for contender, density in (("dense", 1.0), ("pixelfly", densities[0]), ("butterfly", densities[0]),
                                   ("random", densities[0]), ("pixelfly", densities[-1])):  # fmt: skip
            for name in MODELS:
                yield Job(f"{name} {contender} d{density}", "models", model, (name, contender, density, smoke))
    for seed in SEEDS[: 2 if smoke else None] if "quality" in parts else ():
        for contender in CONTENDERS:
            for rate in RATES if seed == SEEDS[0] else best(found, contender)[:1]:
                masks = next(
                    (found[n]["config"]["masks"] for n in map(_dense_run, best(found, "dense")) if n in found), {}
                )
                if contender != "magnitude" or masks:
                    name = f"quality {contender} lr{rate} s{seed}"
                    yield Job(name, "quality", quality, (contender, rate, seed, masks, smoke))


def _dense_run(rate: float) -> str:
    return f"quality dense lr{rate} s{SEEDS[0]}"


def best(found: Mapping[str, records.Record], contender: str) -> list[float]:
    """The rates that were tried with the first seed, the one of the lowest loss first."""
    runs = {rate: found.get(f"quality {contender} lr{rate} s{SEEDS[0]}") for rate in RATES}
    losses = {rate: run["metrics"]["valid_loss"] for rate, run in runs.items() if run and run["status"] == "ok"}
    return sorted(losses, key=lambda rate: losses[rate] or math.inf)


def apart(job: Job, command: str) -> records.Record:
    """The record of a job, made in a new process, as a capture that fails leaves a device without use."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(work, job, False, command).result()
        except BrokenProcessPool as death:
            return work(job._replace(run=_dead, arguments=(str(death),)), False, command)


def _dead(why: str) -> Found:
    raise RuntimeError(why)


def work(job: Job, smoke: bool, command: str) -> records.Record:
    """The record of a job, made in this process."""
    where = provenance(command, 0, device_of(smoke))
    fields: dict[str, Any] = {"kind": "bench", "name": job.name, **where, "status": "ok", "error": None}
    try:
        config, metrics, series = job.run(*job.arguments)
    except Exception as failure:
        config, metrics, series = {"arguments": [str(a) for a in job.arguments]}, {}, {}
        fields |= {"status": "failed", "error": f"{type(failure).__name__}: {failure}"[:600]}
    fields |= {"config": config, "metrics": metrics, "series": series, "seed": config.get("seed", 0)}
    return fields  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file of records, gone on with if it is there")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", default="*", help="glob over names of jobs, as 'vit_b *'")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds; nothing is started that ends later")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    path, command, start = Path(options.out), " ".join(["python", *sys.argv]), time.monotonic()
    found = {record["name"]: record for record in (records.read(path) if path.exists() else [])}
    waiting = []
    for job in jobs(options.parts, options.smoke, found):
        done = job.name in found and found[job.name]["status"] == "ok"
        if done or not fnmatchcase(job.name, options.only):
            continue
        if time.monotonic() - start + SECONDS[job.part] > options.limit:
            waiting.append(job.name)
            continue
        begin = time.monotonic()
        record = work(job, True, command) if options.smoke else apart(job, command)
        shown = {name: value for name, value in record["metrics"].items() if not name.endswith(("_p10_ms", "_p90_ms"))}
        said = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        print(f"{job.name} ({time.monotonic() - begin:.0f} s): {record['error'] or said}", flush=True)
        found[job.name] = record
        records.write(path, list(found.values()))
    if waiting:
        print(f"not started, {len(waiting)}: {', '.join(waiting)}; the same command goes on with them")


if __name__ == "__main__":
    main()
