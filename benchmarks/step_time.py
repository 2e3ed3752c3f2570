"""Steps of language-model training on one device: structures beside dense, and our loop beside the bare step.

    PYTHONPATH=src python benchmarks/step_time.py results/step-time-h200.json
    PYTHONPATH=src python benchmarks/step_time.py --recipe tiny_opt --vocabulary 512 --steps 2 /tmp/records.json

Each structure is built and compiled as `structlin train` builds it, over random tokens in a file mapped into memory.
Then two kinds of steps take turns on the same model: "bare" is forward, backward, clipping and fused AdamW on one batch
that stays on the device, in plain PyTorch; "loop" is all that `structlin train` does in a step, reading windows and
progress included. Compilation and the first steps are not timed. Records are written after every structure, so a run
that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from structlin import recipes
from structlin.machine import provenance
from structlin.once import alone
from structlin.report import records
from structlin.train.checkpoints import Progress
from structlin.train.engine import Engine, accelerator_for
from structlin.train.model import flops_per_token
from structlin.train.monitor import Monitor
from structlin.train.recipe import Recipe
from structlin.train.windows import Windows, ahead
from structlin.train.worker import peak_memory

STRUCTURES = ("dense", "dyad:nblocks=4", "dyad:nblocks=8", "monarch:nblocks=4:order=blocked")
TURNS = 3


class Steps:
    """Both kinds of steps of one recipe."""

    def __init__(self, recipe: Recipe, vocabulary: int, tokens: np.ndarray[Any, Any]) -> None:
        self.recipe = recipe
        self.engine = Engine(recipe, vocabulary, accelerator_for(recipe))
        self.windows = Windows(tokens, recipe.context, recipe.seed)
        self.batch = self.fetch(0).to(self.engine.device)
        self.engine.warm_up(self.batch)
        self.monitor = Monitor(self.engine, Progress(), lambda line: None)
        self.done = 0

    def fetch(self, step: int) -> torch.Tensor:
        return self.windows.batch(step, self.recipe.batch)

    def bare(self, count: int) -> None:
        engine, optimizer = self.engine, self.engine.optimizer
        optimizer.found_inf = None  # type: ignore[attr-defined]
        for _ in range(count):
            for piece in self.batch.split(self.recipe.micro_batch):
                loss = engine.loss(piece) * (len(piece) / len(self.batch))
                loss.backward()
            torch.nn.utils.clip_grad_norm_(engine.model.parameters(), self.recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    def loop(self, count: int) -> None:
        self.monitor.start()
        for step, batch in enumerate(ahead(self.fetch, self.done, self.done + count, self.engine.device), self.done):
            self.engine.update(batch, step)
            self.done = step + 1
            if self.done % self.recipe.log_every == 0 or self.done % count == 0:
                self.monitor.read(self.done)


def seconds(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def measure(recipe: Recipe, vocabulary: int, tokens: np.ndarray[Any, Any], steps: int) -> dict[str, float | int]:
    start = time.perf_counter()
    both = Steps(recipe, vocabulary, tokens)
    both.loop(max(2, steps // 4))
    both.bare(max(2, steps // 4))
    built = time.perf_counter() - start
    bare, loop = [], []
    with alone():
        for turn in range(TURNS):  # whoever comes second finds a warmer device, so they change places
            for times, run in ((bare, both.bare), (loop, both.loop))[:: 1 - 2 * (turn % 2)]:
                times.append(seconds(run, steps))
    size = recipe.batch * recipe.context
    spread = max(max(times) / min(times) for times in (bare, loop)) - 1
    return {
        "bare_step_s": median(bare),
        "loop_step_s": median(loop),
        "bare_tokens_per_second": size / median(bare),
        "loop_tokens_per_second": size / median(loop),
        "loop_overhead": median(loop) / median(bare) - 1,
        "spread": spread,
        "utilisation": both.monitor.utilisation(size / median(loop)),
        "peak_flops": both.monitor.peak,
        "flops_per_token": flops_per_token(recipe, both.engine.model),
        "model_params": sum(parameter.numel() for parameter in both.engine.model.parameters()),
        "peak_memory_bytes": peak_memory(both.engine.device),
        "build_and_compile_s": built,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="JSON file of records")
    parser.add_argument("--recipe", default="opt125m")
    parser.add_argument("--structures", default=",".join(STRUCTURES), help="comma separated")
    parser.add_argument("--layers", default="mlp")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--compile")
    parser.add_argument("--steps", type=int, default=20, help="of a turn; each kind has three")
    options = parser.parse_args()
    recipe = recipes.find(options.recipe)
    recipe = dataclasses.replace(
        recipe,
        layers=options.layers,
        micro_batch=options.micro_batch or recipe.micro_batch,
        compile=options.compile or recipe.compile,
    )
    found: list[records.Record] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        random = np.random.default_rng(recipe.seed)
        random.integers(options.vocabulary, size=200 * recipe.batch * recipe.context, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, np.uint16, mode="r")
        for structure in options.structures.split(","):
            one = dataclasses.replace(recipe, structure=structure)
            metrics = measure(one, options.vocabulary, tokens, options.steps)
            dense = next((r["metrics"] for r in found if r["name"] == "dense"), metrics)
            metrics["speedup_over_dense"] = dense["loop_step_s"] / metrics["loop_step_s"]
            print(
                f"{structure}: {metrics['loop_tokens_per_second']:,.0f} tokens/s in the loop, "
                f"{metrics['bare_tokens_per_second']:,.0f} bare (overhead {metrics['loop_overhead']:.1%}), "
                f"{metrics['speedup_over_dense']:.3f} x dense, {metrics['utilisation']:.1%} of peak, "
                f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB, built and compiled in "
                f"{metrics['build_and_compile_s']:.0f} s, turns differ by {metrics['spread']:.1%}",
                flush=True,
            )
            device = accelerator_for(one).device
            where = provenance(" ".join(["python", *sys.argv]), recipe.seed, device)
            config = {**one.to_dict(), "vocabulary": options.vocabulary, "turn": options.steps, "turns": TURNS}
            fields = {"config": config, "metrics": metrics, "status": "ok", "error": None}
            found.append({"kind": "bench", "name": structure, **where, **fields})
            records.write(options.out, found)
            torch._dynamo.reset()  # compiled code holds the model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
