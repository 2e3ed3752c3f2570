"""Pixelated attention beside the fastest dense attention of PyTorch, on one device. Writes records and a picture.

    PYTHONPATH=src python benchmarks/attention.py --limit 560
    PYTHONPATH=src python benchmarks/attention.py --quality DATA --limit 560
    PYTHONPATH=src python benchmarks/attention.py --smoke --out /tmp/attention.json

Speed: 16 heads of 64 and of 128 features, bfloat16, 16,384 tokens as sequences of 1k to 16k, forward alone and forward
with backward, replayed as CUDA graphs in turns. Dense is scaled_dot_product_attention with the same causality, in each
of its backends (cuDNN, flash, memory-efficient); speed-ups are over the fastest of them. Masks take at most an eighth
and a quarter of its tiles of 128, by the budget rule; "butterfly" is an eighth without global blocks. Nothing is timed
before the errors of outputs and gradients are at most twice those of PyTorch's masked products in the same dtype.

Quality: a decoder of `structlin train` on the text of DATA, with windows of 4096 tokens, dense and with both budgets.

A problem whose record is in the file is not run again, and none starts that may not end within --limit seconds.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from structlin.bench.timing import Clock, capture, take_turns
from structlin.machine import provenance
from structlin.nn import PixelatedAttention, attention, pixelated_attention
from structlin.report import records
from structlin.testing import error

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "img" / "attention.png"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BUDGETS = {"eighth": 1 / 8, "quarter": 1 / 4}
HEADS, TOKENS, REPEATS, SEED = 16, 16384, 50, 0
LENGTHS = (8192, 16384, 4096, 2048, 1024)  # the one of the bar first
SECONDS = {"speed": 150, "quality": 180}  # that a problem may take


@dataclass(frozen=True)
class Problem:
    """Attention of one shape."""

    length: int
    head_dim: int
    causal: bool
    heads: int = HEADS
    tokens: int = TOKENS
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{'causal' if self.causal else 'full'} {self.length} x {self.heads} heads of {self.head_dim}"

    def specs(self) -> dict[str, PixelatedAttention]:
        """The masks that fit a budget, by name."""
        found = {}
        for name, share in BUDGETS.items():
            with suppress(ValueError):  # where the diagonal alone takes more
                found[name] = PixelatedAttention.for_budget(share, self.length, self.block_size, self.causal)
        if "eighth" in found and found["eighth"].nglobal:
            most = (-(-self.length // self.block_size) - 1).bit_length()
            flat = [PixelatedAttention(self.block_size, n, 0, self.causal) for n in range(most + 1)]
            found["butterfly"] = [spec for spec in flat if spec.cost(self.length).compute <= 1 / 8][-1]
        return found

    def inputs(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the gradient of the output, laid out as models do: heads within tokens."""
        generator = torch.Generator(device).manual_seed(SEED)
        shape = (self.tokens // self.length, self.length, self.heads, self.head_dim)
        made = [torch.randn(shape, generator=generator, device=device, dtype=self.dtype) for _ in range(4)]
        return [x.transpose(1, 2) for x in made]


def contenders(problem: Problem, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name -> function of q, k and v."""

    def dense(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal)

        return run

    backends = BACKENDS if device.type == "cuda" else {"cpu": SDPBackend.FLASH_ATTENTION}
    found = {name: dense(backend) for name, backend in backends.items()}
    for name, spec in problem.specs().items():
        found[name] = lambda q, k, v, spec=spec: pixelated_attention(q, k, v, spec)
    return found


def steps(run: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Forward alone, and forward with backward, each returning what it writes last."""
    *qkv, dy = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*qkv)

    return {"forward_ms": forward, "ms": lambda: torch.autograd.grad(run(*leaves), leaves, dy)[0]}


def worst_error(run: Callable[..., Tensor], spec: PixelatedAttention, inputs: list[Tensor]) -> tuple[float, float]:
    """The largest relative error of output and gradients against float64, and that over the one of plain PyTorch.

    On two heads of the first sequence, as float64 holds all scores.
    """
    *qkv, dy = inputs
    part = (slice(0, 1), slice(0, 2))
    mask = spec.mask(dy.shape[2], device=dy.device)

    def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        y = function(*leaves)
        return [x.detach() for x in (y, *torch.autograd.grad(y, leaves, given[3]))]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    some = [x[part] for x in inputs]
    exact = results(masked, [x.double() for x in some])
    plain = results(masked, some)
    ours = [x[part] for x in results(run, [*qkv, dy])]
    errors = [(error(x, e), error(p, e)) for x, p, e in zip(ours, plain, exact, strict=True)]
    return max(x for x, _ in errors), max(x / p for x, p in errors)


def measure(problem: Problem, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of a problem, and which contenders failed and why.

    Raises:
        ValueError: for a mask whose error is more than twice that of plain PyTorch.
    """
    torch._dynamo.reset()  # so that lengths are constants in the compiled kernels
    inputs, specs = problem.inputs(device), problem.specs()
    metrics: dict[str, float] = {}
    wrong: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, run in contenders(problem, device).items():
        if name in specs:
            metrics[f"{name}_error"], ratio = worst_error(run, specs[name], inputs)
            if not ratio <= 2:
                raise ValueError(f"{problem}, {specs[name]}: {ratio:.3g} times the error of PyTorch's products")
            cost = specs[name].cost(problem.length)
            metrics |= {f"{name}_compute": cost.compute, f"{name}_density": cost.density, f"{name}_error_ratio": ratio}
        try:
            for mode, step in steps(run, inputs).items():
                runs[f"{name}_{mode}"] = capture(step).replay if device.type == "cuda" else step
        except RuntimeError as failure:  # a backend that does not take this shape
            wrong[name] = repr(failure)[:300]
    times = take_turns(Clock(device), runs, 1, REPEATS)
    metrics |= {name: 1e3 * taken.median for name, taken in times.items()}
    for mode in ("forward_ms", "ms"):
        dense = min(metrics[f"{n}_{mode}"] for n in (*BACKENDS, "cpu") if f"{n}_{mode}" in metrics)
        metrics[f"dense_{mode}"] = dense
        for name in specs:
            if f"{name}_{mode}" in metrics:
                metrics[f"{name}_{mode.removesuffix('ms')}speedup"] = dense / metrics[f"{name}_{mode}"]
    return metrics, wrong


def note(
    name: str, config: dict[str, Any], metrics: dict[str, Any], device: torch.device, why: str | None = None
) -> Any:
    where = provenance(" ".join(["python", *sys.argv]), SEED, device)
    outcome = {"metrics": metrics, "status": "failed" if why else "ok", "error": why}
    return {"kind": "bench", "name": name, **where, "config": config, **outcome}


def speed(problem: Problem, device: torch.device) -> records.Record:
    """The record of a problem."""
    config: dict[str, Any] = {k: str(v) if k == "dtype" else v for k, v in vars(problem).items()}
    config |= {"specs": {name: str(spec) for name, spec in problem.specs().items()}}
    try:
        metrics, wrong = measure(problem, device)
    except Exception as failure:
        return note(str(problem), config, {}, device, repr(failure)[:600])
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return note(str(problem), config | {"failed": wrong}, metrics, device)


def quality(name: str, setting: str, data: Path, smoke: bool) -> records.Record:
    """A short run of ``structlin train``, its record without the curve's every point."""
    from structlin.recipes import find
    from structlin.train.loop import train
    from structlin.train.settings import override

    fields: dict[str, Any] = {"attention": setting, "embedding_lr": "8", "data": [str(data)], "valid_share": "0.05"}
    if smoke:
        recipe = override(find("tiny_llama"), fields | {"steps": "4", "valid_every": "2", "device": "cpu"})
    else:
        sizes = {"context": "4096", "batch": "16", "micro_batch": "8", "steps": "400", "valid_every": "50"}
        recipe = override(find("llama_like"), fields | sizes | {"valid_windows": "64", "checkpoint_every": "400"})
    with tempfile.TemporaryDirectory() as folder:
        command = " ".join(["python", *sys.argv])
        record = train(recipe, Path(folder), command, lambda line: print(f"  {line}", flush=True))
    here = ("data", "valid", "tokenizer", "cache", "text")
    config = {key: value for key, value in record["config"].items() if key not in here}
    return {**record, "name": f"quality {name}", "config": config}


def settings(context: int, block_size: int) -> dict[str, str]:
    """The attention of the quality runs, by name."""
    masks = {n: PixelatedAttention.for_budget(share, context, block_size) for n, share in BUDGETS.items()}
    return {"dense": "dense", **{name: str(spec) for name, spec in masks.items()}}


def jobs(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, float, Callable[[], records.Record]]]:
    """Name, seconds that it may take, and what runs it."""
    if options.quality:
        masks = settings(64, 4) if options.smoke else settings(4096, 128)
        for name, setting in masks.items():
            run = lambda name=name, setting=setting: quality(name, setting, options.quality, options.smoke)  # noqa: E731
            yield f"quality {name}", SECONDS["quality"], run
        return
    problems = [Problem(n, d, causal) for causal in (True, False) for d in (64, 128) for n in LENGTHS]
    if options.smoke:
        problems = [Problem(n, 32, c, 2, 1024, 32, torch.float32) for c in (True, False) for n in (512, 1024)]
    for problem in problems:
        yield str(problem), SECONDS["speed"], lambda problem=problem: speed(problem, device)


def draw(found: list[records.Record], path: Path) -> None:
    """Speed-up of forward with backward over the fastest dense attention, by length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kept = [r for r in found if r["status"] == "ok" and "length" in r["config"]]
    panels = sorted({(not r["config"]["causal"], r["config"]["head_dim"]) for r in kept})
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(3.6 * max(1, len(panels)), 3.2), squeeze=False)
    for (full, head_dim), panel in zip(panels, axes[0], strict=False):
        chosen = [r for r in kept if (not r["config"]["causal"], r["config"]["head_dim"]) == (full, head_dim)]
        for name in (*BUDGETS, "butterfly"):
            points = sorted((r["config"]["length"], r["metrics"].get(f"{name}_speedup")) for r in chosen)
            points = [(length, value) for length, value in points if value]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set(title=f"{'full' if full else 'causal'}, heads of {head_dim}", xlabel="tokens of a sequence")
        panel.legend(fontsize=7)
    axes[0][0].set_ylabel("forward and backward,\ntimes as fast as dense")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "attention-h200.json", help="JSON of records")
    parser.add_argument("--picture", type=Path, help=f"PNG; {PICTURE.relative_to(ROOT)} unless --smoke")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--quality", type=Path, metavar="DATA", help="train on this text instead of timing")
    parser.add_argument("--smoke", action="store_true", help="tiny, in float32, on the CPU")
    parser.add_argument("--tuned", action="store_true", help="let torch.compile try tile sizes (max-autotune)")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    if options.tuned:
        from torch.nn.attention.flex_attention import flex_attention

        tuned = torch.compile(flex_attention, fullgraph=True, mode="max-autotune-no-cudagraphs")
        attention._compiled = lambda code: tuned
    begin = time.perf_counter()
    found = list(records.read(options.out)) if options.out.exists() else []
    done = {record["name"] for record in found if record["status"] == "ok"}
    for name, seconds, run in jobs(options, device):
        left = options.limit - (time.perf_counter() - begin)
        if name in done or seconds > left:
            print(f"{name}: {'there' if name in done else f'not started, {left:.0f} s are left'}", flush=True)
            continue
        record = run()
        found = [old for old in found if old["name"] != name] + [record]
        records.write(options.out, found)
        told = {k: v for k, v in record["metrics"].items() if k.endswith(("speedup", "dense_ms", "valid_loss"))}
        print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in told.items()), record["error"] or "", flush=True)
    picture = options.picture or (None if options.smoke else PICTURE)
    if picture:
        draw(found, picture)


if __name__ == "__main__":
    main()
