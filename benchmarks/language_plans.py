"""Plans of language-model runs: what is trained, with which recipe and options, and how the next stage follows.

A plan is a function from a stage, counted from 1, and the records so far to runs. All runs give embeddings eight times
the rate of the matrices (docs/learning-rates.md), take 64 windows of 1024 tokens a step, and let the rate fall to zero
at their own end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from structlin.report.records import Record

STEP = 64 * 1024  # tokens of an update
SMALL, LARGE = 10_000_000, 85_000_000  # tokens, the two scales of DYAD's paper with what there is of text
GLUE = ("glue:sst2", "glue:mrpc", "glue:cola")
SPEEDS = {"opt125m": 645e3, "pythia160m": 600e3, "gpt2_small": 645e3, "opt350m": 250e3, "gpt2_medium": 250e3}
"""Tokens a second of dense training on one H200, to plan with."""
DYADS = {
    "dyad4-it": "dyad:nblocks=4", "dyad4-ot": "dyad:nblocks=4:variant=ot", "dyad4-dt": "dyad:nblocks=4:variant=dt",
    "dyad8-it": "dyad:nblocks=8", "dyad4-narrow": "dyad:nblocks=4:variant=narrow",
    "dyad8-narrow": "dyad:nblocks=8:variant=narrow",
}  # fmt: skip
MONARCHS = {f"monarch{n}": f"monarch:nblocks={n}:order=blocked" for n in (4, 8)}
CONTENDERS = {
    "dyad8-all": ("dyad:nblocks=8:variant=narrow", "all"), "monarch8-all": (MONARCHS["monarch8"], "all"),
    "dyad4-all": ("dyad:nblocks=4:variant=narrow", "all"), "monarch4-all": (MONARCHS["monarch4"], "all"),
}  # fmt: skip
REVERSED = {f"{name}-reverse": name for name in ("monarch8-all", "dyad8-all")}
"""Contenders that become dense after this share of their steps, and the ones that they are until then."""
SWITCH = 0.8

Records = Sequence[Record]


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its name, recipe and changed fields, what is evaluated after it, and how fast it is thought to be.

    ``parts`` are "eval", BLiMP and k-shot prompts, and "glue:TASK", fine-tuning. Runs of a lower ``priority`` start
    first. ``speed`` is in tokens a second.
    """

    name: str
    recipe: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    speed: float = 600e3
    priority: int = 0


def run(recipe: str, steps: int, structure: str = "dense", **more: Any) -> Run:
    """A run of ``steps`` updates; ``more`` are attributes of `Run`, else fields of the recipe."""
    own = {name: more.pop(name) for name in ("name", "parts", "speed", "priority") if name in more}
    fields = {
        "structure": structure, "steps": steps, "batch": 64, "embedding_lr": 8.0, "valid_windows": 512,
        "valid_every": math.ceil(steps / 12), "checkpoint_every": steps, "log_every": max(5, steps // 50), **more,
    }  # fmt: skip
    return Run(recipe=recipe, fields=fields, **{"speed": SPEEDS.get(recipe, 600e3), **own})


def found(records: Records, name: str) -> Record:
    """The record of a run that an earlier stage did.

    Raises:
        ValueError: when it is not there.
    """
    for record in records:
        if record["name"] == name:
            return record
    raise ValueError(f"this stage follows from the run {name}, which is not in the records; allowed: an earlier stage")


def loss(record: Record) -> float:
    """Last validation loss in nats per token; infinite for a run that diverged."""
    value = record["metrics"].get("valid_loss")
    return math.inf if value is None else value


def speed(record: Record) -> float:
    """Tokens a second once a run is under way, from the second line of its log on.

    Raises:
        ValueError: for a run that shared its GPU.
    """
    if (share := record["config"].get("share", 1)) > 1:
        raise ValueError(f"{record['name']} ran with --share {share}, and its speed counts; allowed: 1")
    steps, seconds = record["series"]["step"], record["series"]["seconds"]
    assert len(steps) > 2, "a run whose speed counts has three lines of progress"
    return (steps[-1] - steps[0]) * STEP / (seconds[-1] - seconds[0])


def best(records: Iterable[Record]) -> Record:
    """The one with the lowest loss."""
    return min(records, key=loss)


def dyad(stage: int, records: Records) -> list[Run]:
    """DYAD in the MLPs of OPT-125m: all variants at 10M tokens, then the main ones at 85M with their evaluations.

    Stage 1 tries several rates. As a sweep of short runs may favour rates that are too low for longer ones, stage 2
    takes dense's best and twice as much for everything, and stage 3 repeats dense and the main variant, each at its
    better one, with another seed.
    """
    rates = {"dense": (5e-4, 1e-3, 2e-3), **dict.fromkeys(DYADS, (5e-4, 1e-3))}
    if stage == 1:
        return [dyad_run("opt125m", name, lr, SMALL) for name, own in rates.items() for lr in own]
    lr = best(found(records, f"opt125m-dense-10M-lr{lr:g}") for lr in rates["dense"])["config"]["lr"]
    main = ("dense", "dyad4-it", "dyad8-it")
    if stage == 2:
        return [dyad_run("opt125m", name, rate, LARGE) for rate in (lr, 2 * lr) for name in main]
    return [
        dyad_run("opt125m", name, best(both)["config"]["lr"], LARGE, seed=1)
        for name in main[:2]
        if (both := [found(records, f"opt125m-{name}-85M-lr{rate:g}-s0") for rate in (lr, 2 * lr)])
    ]


def dyad_models(stage: int, records: Records) -> list[Run]:
    """The other models of DYAD's paper: a sweep of dense, all variants at its best rate, 10M tokens, and the main
    variant beside dense at 85M tokens with their evaluations."""
    sweeps = {"opt350m": (2e-4, 1e-4, 5e-5), "pythia160m": (5e-4, 1e-3, 2e-3)}
    if stage == 1:
        return [dyad_run(recipe, "dense", lr, SMALL) for recipe, rates in sweeps.items() for lr in rates]
    lrs = {
        recipe: best(found(records, f"{recipe}-dense-10M-lr{lr:g}") for lr in rates)["config"]["lr"]
        for recipe, rates in sweeps.items()
    }
    names, tokens = (DYADS, SMALL) if stage == 2 else (("dense", "dyad4-it"), LARGE)
    return [dyad_run(recipe, name, lr, tokens) for recipe, lr in lrs.items() for name in names]


def dyad_run(recipe: str, name: str, lr: float, tokens: int, seed: int = 0) -> Run:
    """A run of 10M tokens, or one of 85M with its evaluations."""
    spec = {"dense": "dense", **DYADS}[name]
    if tokens == SMALL:
        return run(recipe, round(tokens / STEP), spec, lr=lr, name=f"{recipe}-{name}-10M-lr{lr:g}")
    title = f"{recipe}-{name}-85M-lr{lr:g}-s{seed}"
    return run(recipe, math.ceil(tokens / STEP), spec, lr=lr, seed=seed, name=title, parts=("eval", *GLUE))


def by_rate(records: Iterable[Record], title: str) -> list[list[Record]]:
    """The finished runs named TITLE-lrRATE-sSEED, all seeds of a rate together, the best rate first."""
    rates: dict[float, list[Record]] = {}
    for record in records:
        if record["name"].startswith(f"{title}-lr"):
            rates.setdefault(record["config"]["lr"], []).append(record)
    return sorted(rates.values(), key=lambda runs: mean(map(loss, runs)))


def monarch(stage: int, records: Records) -> list[Run]:
    """Monarch in GPT-2: step speeds, then the loss at 85M tokens with two seeds.

    Stage 2 compares dense with the variant of the lowest loss after stage 1 among those that are 1.12 times as fast as
    dense, or among all where none is.
    """
    if stage == 1:
        variants = {"dense": ("dense", "mlp")}
        variants |= {f"{name}-{layers}": (spec, layers) for name, spec in MONARCHS.items() for layers in ("all", "mlp")}
        return [
            run(recipe, 80, spec, layers=layers, lr=lr, name=f"{recipe}-{name}-speed")
            for recipe, lr in (("gpt2_medium", 6e-4), ("gpt2_small", 1e-3))
            for name, (spec, layers) in variants.items()
        ]
    dense = found(records, "gpt2_small-dense-speed")
    others = [found(records, f"gpt2_small-{name}-{layers}-speed") for name in MONARCHS for layers in ("all", "mlp")]
    fast = [record for record in others if speed(record) >= 1.12 * speed(dense)] or others
    chosen = best(fast)
    specs = {"dense": ("dense", "mlp")}
    specs[chosen["name"].split("-", 1)[1].removesuffix("-speed")] = (
        chosen["config"]["structure"], chosen["config"]["layers"]
    )  # fmt: skip
    steps = math.ceil(LARGE / STEP)
    return [
        run("gpt2_small", steps, spec, layers=layers, lr=1e-3, seed=seed, name=f"gpt2_small-{name}-85M-s{seed}")
        for seed in (0, 1)
        for name, (spec, layers) in specs.items()
    ]


def methods(stage: int, records: Records) -> list[Run]:
    """Reverse sparsification and self-guided training of GPT-2 small beside dense and plain structured, 30M tokens."""
    steps, spec = round(30e6 / STEP), MONARCHS["monarch4"]
    common = {"layers": "all", "lr": 1e-3}
    plan = [
        run("gpt2_small", steps, name="methods-dense", **common),
        run("gpt2_small", steps, spec, name="methods-monarch4", **common),
    ]
    plan += [
        run(
            "gpt2_small",
            steps,
            spec,
            method="sparsify_reverse",
            moments=moments,
            name=f"methods-reverse-{moments}",
            **common,
        )
        for moments in ("carry", "reset")
    ]
    plan.append(run("gpt2_small", steps, spec, method="self_guided", name="methods-self_guided", **common))
    return plan


@dataclass(frozen=True)
class Race:
    """How the time to dense's loss is looked for, GPT-2 of ``depth`` blocks of ``width``.

    Learning rates of the sweep are ``sweep`` times 1.536 over the width; full budgets take ``dense`` and ``other``
    times the best of it, for dense and for contenders. Contenders get the share ``first`` of dense's time, those that
    reached its loss in it ``shorter`` ones then, the rest ``longer`` ones; those that become dense get ``reverse``.
    """

    width: int
    depth: int
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    sweep: tuple[float, ...] = (1.0, 0.5, 2.0)
    dense: tuple[float, ...] = (1.0, 0.7, 0.5)
    other: tuple[float, ...] = (1.0, 0.5)
    first: float = 0.5
    shorter: tuple[float, ...] = (0.35, 0.42)
    longer: tuple[float, ...] = (0.65, 0.58)
    reverse: tuple[float, ...] = (0.65, 0.58)


FASTEST = ("dyad8-all", "monarch8-all")
RACES = {
    768: Race(768, 12, FASTEST, (0.5, 1.0, 0.25), (1.0, 1.5, 2.0), (1.0, 1.5), 0.8, (0.65,), (1.0,), (0.8,)),
    1024: Race(1024, 12, FASTEST, (0.5, 1.0, 0.25), (1.0, 1.5, 2.0), (1.0, 1.5), 0.65, (0.5,), (0.8,), (0.65,)),
    2048: Race(2048, 4),
}
"""The narrower a model the less a structure saves, so its shares are larger. Short sweeps favour low rates."""


def time_to_loss(race: Race) -> Callable[[int, Records], list[Run]]:
    """Wall-clock to dense's final loss.

    1. A sweep: dense and each contender over 20M tokens at three learning rates.
    2. Dense for 180 seconds, or for 100M tokens where that is longer, and each contender for the first share of that
       time, at rates around its best of the sweep.
    3. Each contender at its best rate for a shorter time if it had reached dense's loss, and for a longer one if not;
       and the two fastest becoming dense for the last fifth of their steps (reverse sparsification).
    4. Two more seeds of dense and of the two contenders that got there in the least time or came nearest.

    A budget in seconds is turned into updates by the speed that the sweep measured for that structure and width.
    """
    width, depth = race.width, race.depth
    sizes = {"width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width}
    raced = {name: CONTENDERS[name] for name in race.contenders}
    names = {"dense": ("dense", "mlp"), **raced, **{name: raced[base] for name, base in REVERSED.items()}}
    thought = SPEEDS["gpt2_small"] * 98e6 / (12 * depth * width**2 + 16384 * width)
    rates = [float(f"{1.536 / width * factor:.2g}") for factor in race.sweep]

    def swept(records: Records, name: str) -> Record:
        title = f"w{width}-{REVERSED.get(name, name)}-sweep-"
        done = [r for r in records if r["name"].startswith(title)]
        return best(done) if done else found(records, title + f"lr{rates[0]:g}")

    def pace(records: Records, name: str) -> float:
        """The fastest run of its sweep, as what else happens on a machine only slows others."""
        title = f"w{width}-{REVERSED.get(name, name)}-sweep-"
        return max(speed(r) for r in records if r["name"].startswith(title))

    def budget(records: Records, name: str, share: float, lr: float, seed: int = 0, priority: int = 0) -> Run:
        own, dense = pace(records, name), pace(records, "dense")
        seconds = share * max(180.0, 100e6 / dense)
        spec, layers = names[name]
        method: dict[str, Any] = {}
        if name in REVERSED:
            own = 1 / (SWITCH / own + (1 - SWITCH) / dense)
            method = {"method": "sparsify_reverse", "switch": SWITCH, "moments": "carry"}
        title = f"w{width}-{name}-x{share:g}-lr{lr:.3g}-s{seed}"
        return run("gpt2_small", math.ceil(seconds * own / STEP), spec, layers=layers, lr=lr, seed=seed, **sizes,
                   **method, name=title, speed=own, priority=priority)  # fmt: skip

    def of(records: Records, name: str) -> list[Record]:
        return [r for r in records if r["name"].startswith(f"w{width}-{name}-x")]

    def share(record: Record) -> float:
        return float(record["name"].split("-x")[1].split("-lr")[0])

    def plan(stage: int, records: Records) -> list[Run]:
        if stage == 1:
            return [
                run("gpt2_small", math.ceil(20e6 / STEP), spec, layers=layers, lr=lr, **sizes, speed=thought,
                    name=f"w{width}-{name}-sweep-lr{lr:g}", priority=rank)
                for rank, (name, (spec, layers)) in enumerate(names.items())
                if name not in REVERSED
                for lr in rates
            ]  # fmt: skip
        tried = [name for name in raced if any(r["name"].startswith(f"w{width}-{name}-sweep-") for r in records)]
        if stage == 2:
            lr = {name: swept(records, name)["config"]["lr"] for name in ("dense", *tried)}
            return [
                budget(records, name, share, lr[name] * factor, priority=rank)
                for name, share, factors in (
                    ("dense", 1.0, race.dense), *((name, race.first, race.other) for name in tried)
                )
                for rank, factor in enumerate(factors)
            ]  # fmt: skip
        dense = best(of(records, "dense") or [found(records, f"w{width}-dense-x1")])
        goal = mean(loss(r) for r in of(records, "dense") if r["config"]["lr"] == dense["config"]["lr"])

        def reach(name: str) -> tuple[float, float, Record]:
            """The least share that got to dense's mean loss, the lowest loss, and the run to repeat."""
            done = of(records, name)
            reached = [r for r in done if loss(r) <= goal]
            least = min(map(share, reached), default=math.inf)
            return least, loss(best(done)), best([r for r in reached if share(r) == least] or done)

        if stage == 3:
            return [
                budget(records, name, each, reach(name)[2]["config"]["lr"])
                for name in tried
                for each in (race.longer if reach(name)[0] == math.inf else race.shorter)
            ] + [
                budget(records, name, each, reach(base)[2]["config"]["lr"])
                for name, base in REVERSED.items()
                if base in tried
                for each in race.reverse
            ]
        tried += [name for name in REVERSED if of(records, name)]
        runs = [budget(records, "dense", 1.0, dense["config"]["lr"], seed) for seed in (1, 2)]
        for name in sorted(tried, key=lambda name: reach(name)[:2])[:2]:
            again = reach(name)[2]
            runs += [budget(records, name, share(again), again["config"]["lr"], seed) for seed in (1, 2)]
        return runs

    return plan


MIXTURES = {
    "moe8": ("moe_ffn:experts=8:top_k=2", "mlp"), "btt_moe8": ("btt_moe:experts=8:top_k=2", "all"),
    "btt_moe16": ("btt_moe:experts=16:top_k=2", "all"),
}  # fmt: skip
MIXED_WIDTHS, MIXED_TOKENS = (512, 1024), 20_000_000


def mixtures(stage: int, records: Records) -> list[Run]:
    """Mixtures of experts beside dense: GPT-2 of six blocks, two widths.

    1. A sweep: dense, the standard mixture and BTT-MoE over 10M tokens at four or five learning rates.
    2. A short run of each, for its speed.
    3. Two seeds: dense over 20M tokens, the others for its training FLOPs and for its time, by what the sweep counted
       and the short runs measured. BTT-MoE at its best rate; dense and the standard mixture at their two best, as a
       sweep of short runs may favour rates that are too low for longer ones.
    """
    names = {"dense": ("dense", "mlp"), **MIXTURES}
    plan = []
    for width in MIXED_WIDTHS:
        sizes = {"width": width, "depth": 6, "heads": width // 64, "mlp_width": 4 * width}
        thought = 0.5 * SPEEDS["gpt2_small"] * 98e6 / (12 * 6 * width**2 + 16384 * width)
        rates = [float(f"{factor * 1.024 / width:.2g}") for factor in (1.0, 0.5, 0.25, 0.125, 0.0625)]

        def title(width: int, name: str, lr: float) -> str:
            return f"moe-w{width}-{name}-sweep-lr{lr:g}"

        if stage == 1:
            plan += [
                run("gpt2_small", math.ceil(10e6 / STEP), spec, layers=layers, lr=lr, **sizes, speed=thought,
                    name=title(width, name, lr))
                for name, (spec, layers) in names.items() for lr in rates[: 4 if name.startswith("btt") else 5]
            ]  # fmt: skip
            continue
        if stage == 2:
            plan += [
                run("gpt2_small", 60, spec, layers=layers, lr=rates[0], **sizes, speed=thought,
                    name=f"moe-w{width}-{name}-speed")
                for name, (spec, layers) in names.items()
            ]  # fmt: skip
            continue
        swept = {name: sorted((r for r in records if r["name"] in {title(width, name, lr) for lr in rates}), key=loss)
                 for name in names}  # fmt: skip
        speeds = {name: speed(found(records, f"moe-w{width}-{name}-speed")) for name in names}
        flops = {name: runs[0]["metrics"]["flops_per_token"] or 1 for name, runs in swept.items()}
        for name, (spec, layers) in names.items():
            budgets = {"flops": MIXED_TOKENS * flops["dense"] / flops[name]}
            if name != "dense":
                budgets["time"] = MIXED_TOKENS * speeds[name] / speeds["dense"]
            chosen = [r["config"]["lr"] for r in swept[name][: 1 if name.startswith("btt") else 2]]
            plan += [
                run("gpt2_small", math.ceil(most / STEP), spec, layers=layers, lr=lr, seed=seed, **sizes,
                    speed=speeds[name], priority=seed, name=f"moe-w{width}-{name}-{budget}-lr{lr:g}-s{seed}")
                for budget, most in budgets.items() for lr in chosen for seed in (0, 1)
            ]  # fmt: skip
    return plan


def final_mixtures(records: Iterable[Record], width: int, name: str, budget: str) -> list[list[Record]]:
    """The finished runs of stage 3 of `mixtures`, both seeds of each rate together, the best rate first.

    Dense has one budget, its own.
    """
    return by_rate(records, f"moe-w{width}-{name}-{'flops' if name == 'dense' else budget}")


def smoke(stage: int, records: Records) -> list[Run]:
    """The machinery on a CPU in seconds: two tiny runs, one with its evaluations."""
    small = {"batch": 8, "micro_batch": 8, "steps": 12, "valid_windows": 8, "log_every": 3, "device": "cpu"}
    return [
        run("tiny_gpt2", **small, name="tiny_gpt2-dense", speed=1e6, parts=("eval", "glue:sst2")),
        run("tiny_gpt2", **small, structure="dyad:nblocks=4", name="tiny_gpt2-dyad4", speed=1e6),
    ]


PLANS: dict[str, Callable[[int, Records], list[Run]]] = {
    "dyad": dyad, "dyad_models": dyad_models, "monarch": monarch, "methods": methods, "mixtures": mixtures,
    **{f"time{width}": time_to_loss(race) for width, race in RACES.items()},
    "smoke": smoke,
}  # fmt: skip
STAGES = {"dyad": 3, "dyad_models": 3, "monarch": 2, "methods": 1, "mixtures": 3, "time768": 4, "time1024": 4,
          "time2048": 4, "smoke": 1}  # fmt: skip


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the range."""
    return mean(values), (max(values) - min(values)) / 2
