"""Does the best learning rate stay when the width grows? Trains a small GPT at two widths over a grid of rates.

    PYTHONPATH=src python benchmarks/mup.py --out results/mup-h200.json
    PYTHONPATH=src python benchmarks/mup.py --draw docs/img/mup.png results/mup-h200.json

Every linear layer of the blocks has the structure; the head starts at zero, heads have 32 channels at every width, and
the text is the source of Python's standard library. Each (structure, width, seed) is trained under two rules that
start from the same weights: "param_groups", whose base is the first width, and "one rate" for all matrices; embedding
and head have eight times the rate under both. On a GPU a whole step is one CUDA graph that reads its learning rates
from memory, so one capture serves every rate.
docs/learning-rates.md says what is concluded.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import structlin as sl
from structlin.machine import provenance
from structlin.models.gpt import GPT, GPTConfig
from structlin.report import records
from structlin.report.records import Record
from structlin.train.data import Text, batch, read_text, spread
from structlin.train.worker import BETAS, schedule

RULES = ("param_groups", "one rate")
STRUCTURES = ("dense", "low_rank:rank=0.25", "block_diagonal:nblocks=4:shuffle=true", "monarch:nblocks=4",
              "dyad:nblocks=4", "btt:rank=2", "kronecker")  # fmt: skip
HEAD_CHANNELS = 32
OUTSIDE, MULTIPLIER = ("embedding", "head"), 8.0  # both rules: at the rate of the matrices these two learn too little


@dataclass(frozen=True)
class Settings:
    """What fixes the numbers besides structure, width, rule, rate and seed. Rates are powers of two."""

    widths: tuple[int, ...] = (128, 512)
    exponents: tuple[int, ...] = (-11, -10, -9, -8, -7, -6, -5, -4)
    steps: int = 400
    batch_size: int = 64
    context: int = 128
    depth: int = 2
    valid_windows: int = 256
    dtype: str = "bfloat16"


SMOKE = Settings(widths=(64, 128), exponents=(-8, -6), steps=4, batch_size=4, context=32, depth=1, valid_windows=4,
                 dtype="float32")  # fmt: skip


def build(width: int, settings: Settings) -> GPT:
    model = GPT(GPTConfig(settings.context, width, settings.depth, width // HEAD_CHANNELS))
    torch.nn.init.zeros_(model.head.weight)
    return model


class Sweep:
    """One structure at one width with one seed: trained from the same weights for every rate that is asked for."""

    def __init__(self, structure: str, width: int, seed: int, settings: Settings, text: Text, device: str) -> None:
        self.settings, self.device = settings, torch.device(device)
        torch.manual_seed(seed)
        model = build(width, settings)
        sl.to_structured_(model, {"blocks.*": sl.spec.parse(structure)})
        self.model = model.to(self.device)
        with torch.device("meta"):
            base = build(settings.widths[0], settings)
        groups = self._groups(base)
        self.scales = torch.tensor([group["lr"] for group in groups], device=self.device)
        self.single = torch.tensor([group.pop("single") for group in groups], device=self.device)
        self.peaks, self.rates = self.scales.clone(), self.scales.clone()
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate  # a view, so that the captured optimizer sees every change
        self.optimizer = torch.optim.AdamW(
            groups, betas=BETAS, weight_decay=0.0, fused=True, capturable=self.device.type == "cuda"
        )
        train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.valid))
        steps, size, context = settings.steps, settings.batch_size, settings.context
        batches = [batch(train, seed, step, size, context).to(torch.uint8) for step in range(steps)]
        self.batches = torch.stack(batches).to(self.device)
        self.valid = spread(valid, settings.valid_windows, context).to(self.device)
        self.shares = torch.tensor([schedule(step, steps) for step in range(steps)], device=self.device)
        self.losses = torch.zeros(steps, device=self.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.advance = self._captured() if self.device.type == "cuda" else self.step

    def _groups(self, base: GPT) -> list[dict[str, Any]]:
        """Parameter groups at rate 1, each with its rate under the rule of one rate as well."""
        outside = {p for name in OUTSIDE for p in self.model.get_submodule(name).parameters()}
        groups = []
        for group in sl.param_groups(self.model, lr=1.0, base=base, multipliers=dict.fromkeys(OUTSIDE, MULTIPLIER)):
            for inside in (True, False):
                params = [p for p in group["params"] if (p not in outside) == inside]
                groups += [{**group, "params": params, "single": 1.0 if inside else MULTIPLIER}] * bool(params)
        return groups

    def loss(self, windows: Tensor) -> Tensor:
        dtype = getattr(torch, self.settings.dtype)
        # without the cache of autocast: a captured graph must cast the weights anew in every replay
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return self.model.loss(windows)

    def step(self) -> None:
        torch.mul(self.peaks, self.shares[self.at], out=self.rates)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.batches[self.at][0].long())
        loss.backward()
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, loss.detach()[None])
        self.at += 1

    def _captured(self) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    @torch.no_grad()
    def run(self, lr: float, rule: str) -> tuple[float, float]:
        """Validation loss and mean training loss of the last tenth of the steps, in nats; not finite if it diverged."""
        self.peaks.copy_(lr * (self.scales if rule == "param_groups" else self.single))
        for parameter, start in zip(self.model.parameters(), self.start, strict=True):
            parameter.copy_(start)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.at.zero_()
        with torch.enable_grad():
            for _ in range(self.settings.steps):
                self.advance()
        chunks = self.valid.split(self.settings.batch_size)
        valid = torch.stack([self.loss(chunk) * len(chunk) for chunk in chunks]).sum() / len(self.valid)
        return valid.item(), self.losses[-max(1, self.settings.steps // 10) :].mean().item()


def sweep(structure: str, width: int, seed: int, settings: Settings, text: Text, device: str) -> Iterator[Record]:
    """The records of both rules, one each."""
    trained = Sweep(structure, width, seed, settings, text, device)
    found: dict[str, list[tuple[float, float]]] = {}
    for rule in RULES:
        start = time.perf_counter()
        same = rule == RULES[1] and bool((trained.scales == 1).all())
        found[rule] = found[RULES[0]] if same else [trained.run(2.0**e, rule) for e in settings.exponents]
        seconds = time.perf_counter() - start
        rates = [2.0**e for e in settings.exponents]
        kept = [(lr, *losses) for lr, losses in zip(rates, found[rule], strict=True) if all(map(math.isfinite, losses))]
        best = min(kept, key=lambda row: row[1], default=(None, None, None))
        yield {
            "kind": "train",
            "name": f"{structure}, width {width}, {rule}",
            **provenance(" ".join(["python", *sys.argv]), seed, torch.device(device)),
            "config": {**asdict(settings), "structure": structure, "width": width, "rule": rule,
                       "data": text.describe(), "diverged": [lr for lr in rates if lr not in [row[0] for row in kept]]},
            "metrics": {"best_lr": best[0], "valid_loss": best[1], "train_loss": best[2], "seconds": seconds},
            "series": {name: [row[i] for row in kept] for i, name in enumerate(("lr", "valid_loss", "train_loss"))},
            "status": "ok",
            "error": None,
        }  # fmt: skip


def curve(found: Sequence[Record], structure: str, width: int, rule: str) -> dict[float, float]:
    """Rate -> validation loss, the mean over the seeds, for the rates at which none diverged; empty if never run."""
    wanted = {"structure": structure, "width": width, "rule": rule}
    runs = [
        dict(zip(record["series"]["lr"], record["series"]["valid_loss"], strict=True))
        for record in found
        if wanted.items() <= record["config"].items()
    ]
    return {
        lr: sum(run[lr] for run in runs) / len(runs) for lr in (runs[0] if runs else ()) if all(lr in r for r in runs)
    }


def verdicts(found: Sequence[Record]) -> list[dict[str, Any]]:
    """For every structure and rule the best rate at each width, and by how many doublings it moves between them."""
    rows = []
    for structure in dict.fromkeys(record["config"]["structure"] for record in found):
        for rule in RULES:
            curves = {w: curve(found, structure, w, rule) for w in found[0]["config"]["widths"]}
            if all(curves.values()):
                best = {width: min(losses, key=losses.__getitem__) for width, losses in curves.items()}
                first, *_, last = best
                tuned = curves[last].get(best[first])
                rows.append({
                    "structure": structure, "rule": rule, "best": best, "drift": math.log2(best[last] / best[first]),
                    "loss": {width: min(losses.values()) for width, losses in curves.items()},
                    "loss_at_base_rate": tuned,
                })  # fmt: skip
    return rows


def show(found: Sequence[Record]) -> None:
    for row in verdicts(found):
        rates = ", ".join(f"{width}: 2^{math.log2(lr):.0f}" for width, lr in row["best"].items())
        (*_, last), tuned = row["loss"], row["loss_at_base_rate"]
        at_base = "diverges" if tuned is None else f"{tuned:.4f}"
        print(
            f"{row['structure']:40} {row['rule']:12} best at {rates:24} drift {row['drift']:+.0f}   "
            f"loss at {last}: {row['loss'][last]:.4f}, with the best rate of the base {at_base}"
        )


def draw(found: Sequence[Record]) -> bytes:
    """A PNG: validation loss against learning rate, a column per structure, a row per rule, a line per width."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from structlin.report.plots import COLOURS, STYLE

    structures = list(dict.fromkeys(record["config"]["structure"] for record in found))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.1 * len(structures) + 1, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(RULES), len(structures), sharex=True, sharey="col", squeeze=False)
        for row, rule in zip(panels, RULES, strict=True):
            for axes, structure in zip(row, structures, strict=True):
                for width, colour in zip(found[0]["config"]["widths"], COLOURS, strict=False):
                    losses = curve(found, structure, width, rule)
                    axes.plot(
                        list(losses), list(losses.values()), "o-", color=colour, markersize=3, label=f"width {width}"
                    )
                    if losses:
                        best = min(losses, key=losses.__getitem__)
                        axes.plot(best, losses[best], "*", color=colour, markersize=12)
                axes.set_xscale("log", base=2)
                axes.set_title(structure.replace(":", "\n", 1) if rule == RULES[0] else "", fontsize=8)
            row[0].set_ylabel(f"{rule}\nvalidation loss, nats")
        figure.supxlabel("learning rate; the star is the best", fontsize=9)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def measure(options: argparse.Namespace) -> None:
    """Run seed by seed, structure by structure, until done or out of time; the file grows as it goes."""
    settings, text = SMOKE if options.smoke else Settings(), read_text()
    if options.exponents:
        low, high = options.exponents
        settings = replace(settings, exponents=tuple(range(low, high + 1)))
    given = {name: getattr(options, name) for name in ("widths", "steps", "batch_size") if getattr(options, name)}
    settings = replace(settings, **given)
    work = [
        (structure, width, seed)
        for seed in range(options.seeds)
        for structure in options.structures.split(",")
        for width in settings.widths
    ]
    found: list[Record] = []
    start = time.perf_counter()
    for done, (structure, width, seed) in enumerate(work):
        spent = time.perf_counter() - start
        if spent > 60 * options.minutes:
            print(f"left out after {spent / 60:.1f} minutes:", *(f"{s} {w} seed {n};" for s, w, n in work[done:]))
            break
        for record in sweep(structure, width, seed, settings, text, options.device):
            found.append(record)
            print(
                f"{time.perf_counter() - start:6.1f} s  seed {seed}  {record['name']}: {record['metrics']}", flush=True
            )
        records.write(options.out, found)
    show(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Best learning rates at several widths.")
    parser.add_argument("--out", default="mup.json", help="the file of records to write")
    parser.add_argument("--structures", default=",".join(STRUCTURES), help="specs, separated by commas")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--widths", type=int, nargs="+", help="the first is the base")
    parser.add_argument("--exponents", type=int, nargs=2, metavar=("LOW", "HIGH"), help="of the rates, powers of two")
    parser.add_argument("--steps", type=int, help="of one run")
    parser.add_argument("--batch-size", type=int, help="windows in a step")
    parser.add_argument("--minutes", type=float, default=4.5, help="start nothing new after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--draw", nargs=2, metavar=("PNG", "RECORDS"), help="only draw and show what was recorded")
    options = parser.parse_args()
    if options.draw:
        found = records.read(options.draw[1])
        records.write_bytes(options.draw[0], draw(found))
        show(found)
    else:
        measure(options)


if __name__ == "__main__":
    main()
