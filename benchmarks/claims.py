"""Published claims beside what was measured here, as tables made from the records under results/.

    PYTHONPATH=src python benchmarks/claims.py    # puts the tables into docs/claims.md

A row whose records are not there says so. The verdict follows from the numbers by a rule that stands in the row's
function, so that a new record changes the page and nobody's opinion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from statistics import mean

from evidence import Finding, finished
from language_plans import (
    CONTENDERS,
    DYADS,
    MIXED_TOKENS,
    MIXED_WIDTHS,
    MIXTURES,
    MONARCHS,
    REVERSED,
    by_rate,
    final_mixtures,
    speed,
    spread,
)

from structlin.bench.problems import MLP_WIDTHS, PRESETS
from structlin.report.records import Record
from structlin.scaling import curves, laws

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "claims.md"
HEAD = "| claim | published | source | measured here | verdict |\n|---|---|---|---|---|"
NOTHING = "not run yet"
BLIMP_ERROR = "blimp/accuracy_stderr"
DYAD_MODELS = ("opt125m", "pythia160m", "opt350m")
GLUE = {"sst2": "accuracy", "mrpc": "f1", "cola": "matthews"}

Named = Mapping[str, Record]


def row(claim: str, published: str, source: str, measure: Callable[[], Finding]) -> str:
    """A row of a table: what is claimed, the published value and its source, what was measured, and the verdict."""
    found = measure()
    said, verdict = (NOTHING, NOTHING) if found is None else (found[0], "reproduced" if found[1] else "not reproduced")
    return f"| {claim} | {published} | {source} | {said} | {verdict} |"


def named(name: str) -> Named:
    """The finished records of results/NAME.json by their name, none where the file is missing."""
    return finished(ROOT / "results" / f"{name}.json")


def of_seeds(found: Named, prefix: str) -> list[Record]:
    """The records of all seeds of a run."""
    return [record for name, record in found.items() if re.fullmatch(rf"{re.escape(prefix)}-s\d+", name)]


def plus_minus(values: list[float], form: str = ".3f") -> str:
    """Mean and half of the range, and over how many seeds."""
    middle, half = spread(values)
    seeds = f"{len(values)} seeds" if len(values) > 1 else "1 seed"
    return f"{middle:{form}} ± {half:{form}} ({seeds})" if len(values) > 1 else f"{middle:{form}} ({seeds})"


def dyad_speed(model: str) -> Callable[[], Finding]:
    """Speed of whole training steps with DYAD in the MLPs, from benchmarks/step_time.py; the fastest of the variants
    with 4 blocks counts, and 1.07 is what the paper says at least."""

    def measure() -> Finding:
        ratios = {
            name: run["metrics"]["speedup_over_dense"] or 0.0
            for name, run in dyad_steps(model).items() if name != "dense"
        }  # fmt: skip
        if not ratios:
            return None
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        best = max(ratio for name, ratio in ratios.items() if name.startswith("dyad4"))
        return f"{said} times as fast, whole step, bf16", best >= 1.07

    return measure


def dyad_steps(model: str) -> Named:
    """The records of benchmarks/step_time.py by the names of the plan "dyad"."""
    found = named(f"step-time-{model}-h200")
    return {name: found[spec] for name, spec in {"dense": "dense", **DYADS}.items() if spec in found}


def dyad_rows() -> list[str]:
    """Every variant in every model: speed and memory of whole steps, and the loss after 10M tokens."""
    trained, rows = named("language-dyad") | named("language-dyad_models"), []
    for model in DYAD_MODELS:
        steps = dyad_steps(model)
        for name in ("dense", *DYADS):
            runs = [r for n, r in trained.items() if n.startswith(f"{model}-{name}-10M-")]
            cells = [NOTHING] * 3
            if name in steps:
                own = steps[name]["metrics"]
                rate, ratio = own["loop_tokens_per_second"] or 0.0, own["speedup_over_dense"] or 0.0
                cells = [f"{rate / 1e3:.0f} ({ratio:.2f})", f"{(own['peak_memory_bytes'] or 0) / 1e9:.1f}", NOTHING]
            if runs:
                best = min(runs, key=_loss)
                cells[2] = f"{_loss(best):.3f}, rate {best['config']['lr']:.2g}"
            rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return rows


def dyad_long_rows() -> list[str]:
    """Models at every rate that they had at 85M tokens: loss, BLiMP, fine-tuned tasks and prompts."""
    found, rows = named("language-dyad") | named("language-dyad_models"), []
    for model in DYAD_MODELS:
        for name in ("dense", *DYADS):
            for runs in by_rate(found.values(), f"{model}-{name}-85M"):
                cells = [f"{runs[0]['config']['lr']:.2g}", plus_minus([_loss(run) for run in runs])]
                done = [run for run in runs if _evaluated(run)]
                cells += [
                    plus_minus([100 * score(run) for run in done], ".1f") if done else NOTHING
                    for score in (blimp, glue, prompts)
                ]
                rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return rows


def layer(problem: str, least: float) -> Callable[[], Finding]:
    """Speed-up of one layer, forward and backward, as a CUDA graph."""

    def measure() -> Finding:
        for record in (*named("rows-h200").values(), *named("bench-h200").values()):  # the newer first
            if (record["config"]["problem"], record["config"]["backend"]) == (problem, "auto"):
                ratio = record["metrics"]["graph_forward_backward_speedup"]
                return f"{ratio:.2f} times as fast, bf16, 16,384 tokens, as a graph", (ratio or 0) >= least
        return None

    return measure


def mlp_rows() -> list[str]:
    """Both layers of an MLP together, by width and structure: how many times as fast as dense ones."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for record in named("bench-mlp-h200").values():
        spec, shape = record["config"]["problem"].split("@")
        value = record["metrics"]["graph_forward_backward_ms"] or math.inf
        times.setdefault((spec, shape), {})[record["config"]["backend"]] = value
    rows = []
    for width in MLP_WIDTHS:
        for spec in dict.fromkeys(text.split("@")[0] for text in PRESETS["mlp"]):
            both = [times.get((spec, shape), {}) for shape in (f"{4 * width}x{width}", f"{width}x{4 * width}")]
            cells = [NOTHING] * 3
            if all({"linear", "auto"} <= own.keys() for own in both):
                each = [own["linear"] / own["auto"] for own in both]
                cells = [f"{x:.2f}" for x in (*each, sum(o["linear"] for o in both) / sum(o["auto"] for o in both))]
            rows.append(f"| {width} | `{spec}` | {' | '.join(cells)} |")
    return rows


def quality(
    metric: Callable[[Record], float], form: str, least: float, error: str | None = None
) -> Callable[[], Finding]:
    """A score of DYAD beside dense after 85M tokens, each at its better rate; DYAD must have ``least`` of dense's.
    ``error`` is the metric that holds the standard error of one run."""

    def measure() -> Finding:
        found = named("language-dyad")
        scores = {}
        for name in ("dense", "dyad4-it", "dyad8-it"):
            rates = by_rate([run for run in found.values() if _evaluated(run)], f"opt125m-{name}-85M")
            if rates:
                scores[name] = [metric(run) for run in rates[0]]
        if not {"dense", "dyad4-it"} <= scores.keys():
            return None
        said = ", ".join(f"{name} {plus_minus(values, form)}" for name, values in scores.items())
        if error:
            largest = max(r["metrics"][error] or 0.0 for r in found.values() if error in r["metrics"])
            said += f"; standard error of a run {largest:{form}}"
        return said, mean(scores["dyad4-it"]) >= least * mean(scores["dense"])

    return measure


def _evaluated(run: Record) -> bool:
    return {"eval", *(f"glue:{task}" for task in GLUE)} <= set(run["config"]["parts"])


def blimp(run: Record) -> float:
    """Accuracy over 67 paradigms."""
    return run["metrics"]["blimp/accuracy"] or 0.0


def glue(run: Record) -> float:
    """Mean of the main metrics of the fine-tuned tasks."""
    return mean(run["metrics"][f"finetune/{task}/{metric}"] or 0.0 for task, metric in GLUE.items())


def prompts(run: Record) -> float:
    """Mean accuracy of the tasks given as prompts with examples."""
    found = [value or 0.0 for name, value in run["metrics"].items() if re.fullmatch(r"kshot/\w+/accuracy", name)]
    return mean(found)


def monarch_speed(model: str, least: float) -> Callable[[], Finding]:
    """Step speed of Monarch in every linear layer and in the MLPs alone."""

    def measure() -> Finding:
        found = named("language-monarch")
        names = {f"{name}-{layers}" for name in MONARCHS for layers in ("all", "mlp")}
        runs = {name: found.get(f"{model}-{name}-speed") for name in ("dense", *sorted(names))}
        dense, main = runs.pop("dense"), runs["monarch4-all"]
        if dense is None or main is None:
            return None
        ratios = {name: speed(run) / speed(dense) for name, run in runs.items() if run is not None}
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        return f"{said} times as fast, whole step, bf16", ratios["monarch4-all"] >= least

    return measure


def monarch_loss() -> Finding:
    """Loss of Monarch in GPT-2 small beside dense; equal is within 1%."""
    found = named("language-monarch")
    losses = {
        name: [r["metrics"]["valid_loss"] or math.inf for r in of_seeds(found, f"gpt2_small-{name}-85M")]
        for name in ("dense", *(f"{n}-{layers}" for n in MONARCHS for layers in ("all", "mlp")))
    }
    structured = {name: values for name, values in losses.items() if values and name != "dense"}
    if not losses["dense"] or not structured:
        return None
    said = ", ".join(f"{name} {plus_minus(losses[name])}" for name in ("dense", *structured))
    gap = min(mean(values) for values in structured.values()) / mean(losses["dense"]) - 1
    return f"loss {said}: {gap:+.1%}, at 85M tokens", gap <= 0.01


def reverse() -> Finding:
    """Reverse sparsification: as good as dense, in half of the time."""
    found = named("language-methods")
    if not {"methods-dense", "methods-reverse-carry", "methods-reverse-reset"} <= found.keys():
        return None
    dense = found["methods-dense"]["metrics"]
    said, good = [], False
    for name in ("reverse-carry", "reverse-reset"):
        own = found[f"methods-{name}"]["metrics"]
        ratio = (own["train_seconds"] or math.inf) / (dense["train_seconds"] or math.inf)
        gap = (own["valid_loss"] or math.inf) - (dense["valid_loss"] or math.inf)
        said.append(f"{name.removeprefix('reverse-')} {gap:+.3f} nats in {ratio:.2f} of the time")
        good |= gap <= 0.01 and ratio <= 0.5
    return f"{', '.join(said)}; GPT-2 small, 30M tokens, 1 seed", good


def guided() -> Finding:
    """Self-guided training: part of the gap to dense that it closes; where there is none, that is not reproduced."""
    found = named("language-methods")
    runs = [found.get(f"methods-{name}") for name in ("dense", "monarch4", "self_guided")]
    if None in runs:
        return None
    dense, plain, own = (_loss(run) for run in runs if run is not None)
    times = [_seconds(run) for run in runs if run is not None]
    said = f"loss dense {dense:.3f}, Monarch {plain:.3f}, with a guide {own:.3f}"
    said += f": {(plain - own) / (plain - dense):.0%} of the gap closed" if plain > dense else ", so there is no gap"
    return f"{said}; {times[2] / times[1]:.2f} times the time; GPT-2 small, 30M tokens, 1 seed", dense < plain > own


def rates() -> Finding:
    """How far apart the best rates of structures are, under one rate for all matrices and under ours, at width 512."""
    best: dict[str, list[float]] = {}
    for record in named("mup-h200").values():
        config, series = record["config"], record["series"]
        if config["width"] == 512:
            curve = dict(zip(series["lr"], series["valid_loss"], strict=True))
            best.setdefault(config["rule"], []).append(math.log2(min(curve, key=curve.__getitem__)))
    if not best:
        return None
    apart = {rule: max(values) - min(values) for rule, values in best.items()}
    said = f"one rate: best rates of 7 structures lie 2^{apart['one rate']:.0f} apart, by our rule 2^"
    return f"{said}{apart['param_groups']:.0f}; small GPT, width 512, 1 seed", apart["one rate"] > apart["param_groups"]


def mixed(width: int, budget: str, other: str) -> Callable[[], Finding]:
    """BTT-MoE's loss beside that of ``other``, "dense" or "moe8", at equal training FLOPs or time: every one of its
    seeds has to be below all of the other's."""

    def measure() -> Finding:
        found = named("language-mixtures").values()
        runs = {name: final_mixtures(found, width, name, budget) for name in (other, "btt_moe8", "btt_moe16")}
        if not all(runs.values()):
            return None
        losses = {name: [_loss(r) for r in best[0]] for name, best in runs.items()}
        said = ", ".join(f"{name} {plus_minus(values)}" for name, values in losses.items())
        ours = min((losses[name] for name in ("btt_moe8", "btt_moe16")), key=mean)
        return f"loss {said}; GPT-2 of 6 blocks, dense {MIXED_TOKENS / 1e6:.0f}M tokens", max(ours) < min(losses[other])

    return measure


def never() -> Finding:
    """Nothing was run for this yet."""
    return None


DYAD_PAGE, GPT2_PAGE, OWT_PAGE = "repository, ff_speedup_results", "table on WikiText-103", "table on OpenWebText"


def above_chance(run: Record) -> float:
    """BLiMP's accuracy beyond that of guessing."""
    return blimp(run) - 0.5


EINSUM = "Potapczynski et al. 2024, abstract"
FULL = ["einsum:theta=0.5x0x0.5x0x0.5x0.5x0", "einsum:theta=0.33x0x0.67x0x0.67x0.33x0"]
LOW_RANK = ["einsum:theta=1x0x0x0x1x0x0.5", "einsum:theta=1x0x0x0x1x0x0.75"]
NARROW = "einsum:theta=0.67x0x0.33x0x0.67x0.33x0"
KRONECKER, TRAIN = "einsum:theta=0.5x0.5x0x0.5x0.5x0x0", "einsum:theta=0.5x0.5x0x0.5x0.5x0x0.25"


def on_teacher(
    ours: list[str], others: list[str], above: float | None, name: str = "taxonomy-cpu"
) -> Callable[[], Finding]:
    """Ratio of losses at equal FLOPs on the synthetic teacher, with its 95% interval over seeds: all of it has to lie
    above ``above``, or, for None, none of it more than 5% above 1. Structures that lack widths are left out."""

    def measure() -> Finding:
        runs = curves.by_structure(curves.curves(named(name).values()))
        if not {*ours, *others} <= set(runs):
            return None
        widths = {structure: len({run.size for run in found}) for structure, found in runs.items()}
        compared = [[s for s in names if widths[s] == max(widths.values())] for names in (ours, others)]
        if not all(compared):
            return None
        found = laws.paired(runs, *compared)
        low, high = found.low or found.value, found.high or found.value
        cut = len(ours) + len(others) - sum(map(len, compared))
        left_out = f"; {cut} structure{'s' if cut > 1 else ''} without all widths left out" if cut else ""
        said = f"loss ratio {found} at equal FLOPs, MLPs on a teacher{left_out}"
        return said, high <= 1.05 if above is None else low > above

    return measure


TAXONOMY: list[tuple[str, tuple[list[str], list[str], float | None]]] = [
    ("omega > 0 does worse than omega = 0", ([KRONECKER, TRAIN], FULL, 1.0)),
    ("psi < 1 does worse than psi = 1: low rank", (LOW_RANK, FULL, 1.0)),
    ("the same: another point, psi = 2/3", ([NARROW], FULL, 1.0)),
    ("omega = 0, psi = 1 does as well as dense", (FULL, ["dense"], None)),
]

ROWS: dict[str, list[tuple[str, str, str, Callable[[], Finding]]]] = {
    "dyad": [
        ("OPT-125m trains faster on a GPU, n=4", "7 to 15%", "abstract", dyad_speed("opt125m")),
        ("OPT-350m trains faster", "over 7%, more with width", "abstract", dyad_speed("opt350m")),
        ("Pythia-160m trains faster", "7 to 15%", "abstract", dyad_speed("pythia160m")),
        ("MLP layer of 1024 to 4096, n=4", "1.37 times", DYAD_PAGE, layer("dyad:nblocks=4@4096x1024", 1.37)),
        ("BLiMP of OPT-125m, 100M words", "0.730, dense 0.749", "repository", quality(blimp, ".4f", 0.9, BLIMP_ERROR)),
        ("the same above chance, 85% of dense", "no number", "-", quality(above_chance, ".4f", 0.85, BLIMP_ERROR)),
        ("GLUE, fine-tuned: sst2, mrpc, cola", "90% of dense", "abstract", quality(glue, ".3f", 0.9)),
    ],
    "monarch": [
        ("GPT-2 small trains faster, n=4", "1.8 times (V100)", GPT2_PAGE, monarch_speed("gpt2_small", 1.8)),
        ("GPT-2 medium trains faster, n=4", "2.0 times (V100)", GPT2_PAGE, monarch_speed("gpt2_medium", 2.0)),
        ("equal perplexity, GPT-2 small", "20.7, dense 20.6", GPT2_PAGE, monarch_loss),
        ("reverse sparsification reaches dense's loss", "in half of the time", OWT_PAGE, reverse),
    ],
    "einsum": [
        ("best learning rates differ greatly", "no number", "Qiu et al. 2024, abstract", rates),
        ("BTT matches a dense ViT-S/32", "3.8 times less compute", "Qiu et al. 2024, abstract", never),
        *(
            (claim + said, "no number", EINSUM, on_teacher(*compared, record))
            for record, said in (("taxonomy-cpu", ""), ("taxonomy-h200", ", teacher 1024 wide"))
            for claim, compared in TAXONOMY
        ),
        *(
            (
                f"BTT-MoE beats {said} at equal {'FLOPs' if what == 'flops' else what}, width {width}",
                "substantially",
                EINSUM,
                mixed(width, what, other),
            )
            for width in MIXED_WIDTHS
            for what in ("flops", "time")
            for other, said in (("dense", "dense"), ("moe8", "standard MoE"))
        ),
        ("self-guided training narrows the gap", "to 0.4 in perplexity", "Wei et al. 2024, project page", guided),
    ],
}


def time_rows() -> list[str]:
    """Time to dense's loss: all schedules tried, each in full, by width and structure."""
    rows = []
    for width in (768, 1024, 2048):
        found = [r for r in named(f"language-time{width}").values() if "-x" in r["name"]]
        dense = [r for r in found if f"w{width}-dense-x1-" in r["name"]]
        if not dense:
            rows.append(f"| {width} | dense | {NOTHING} | | | |")
            continue
        rate = min(dense, key=_loss)["config"]["lr"]
        goal, base = ([value(r) for r in dense if r["config"]["lr"] == rate] for value in (_loss, _seconds))
        groups: dict[tuple[str, float, float], list[Record]] = {}
        for record in found:
            name, share, lr = re.fullmatch(r"w\d+-(.*)-x([\d.]+)-lr(.*)-s\d+", record["name"]).groups()  # type: ignore[union-attr]
            groups.setdefault((name, float(share), float(lr)), []).append(record)
        order = ["dense", *CONTENDERS, *REVERSED]
        for (name, _, lr), runs in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])):
            share = mean(map(_seconds, runs)) / mean(base)
            losses = plus_minus(list(map(_loss, runs)))
            reached = "yes" if mean(map(_loss, runs)) <= mean(goal) else "no"
            tokens = runs[0]["metrics"]["tokens"] / 1e6
            rows.append(f"| {width} | {name}, {lr:.3g} | {tokens:.0f}M | {share:.2f} | {losses} | {reached} |")
    return rows


def sweep_rows() -> list[str]:
    """The sweeps before it, over 20M tokens each: speed, and loss by learning rate."""
    rows = []
    for width in (768, 1024, 2048):
        groups: dict[str, list[Record]] = {}
        for name, record in named(f"language-time{width}").items():
            if "-sweep-" in name:
                groups.setdefault(name.removeprefix(f"w{width}-").split("-sweep-")[0], []).append(record)
        for name, runs in groups.items():
            runs = sorted(runs, key=lambda run: float(run["config"]["lr"]))
            rates = ", ".join(f"{run['config']['lr']:.2g}: {_loss(run):.3f}" for run in runs)
            rows.append(f"| {width} | {name} | {mean(map(speed, runs)) / 1e3:.0f} | {rates} |")
    return rows


def mixture_rows() -> list[str]:
    """Mixtures beside dense: speed alone on a GPU, the sweep, and the losses at dense's FLOPs and at its time."""
    rows, found = [], named("language-mixtures")
    for width in MIXED_WIDTHS:
        for name in ("dense", *MIXTURES):
            title = f"moe-w{width}-{name}"
            alone = found.get(f"{title}-speed")
            if alone is None:
                rows.append(f"| {width} | {name} | {NOTHING} | | | |")
                continue
            swept = sorted((r["config"]["lr"], _loss(r)) for n, r in found.items() if n.startswith(f"{title}-sweep-"))
            cells = [f"{speed(alone) / 1e3:.0f}", ", ".join(f"{lr:.2g}: {loss:.2f}" for lr, loss in swept)]
            for budget in ("flops", "flops" if name == "dense" else "time"):
                rates = final_mixtures(found.values(), width, name, budget)
                said = [f"{plus_minus([_loss(r) for r in runs])}, rate {runs[0]['config']['lr']:.2g}" for runs in rates]
                tokens = f"{rates[0][0]['metrics']['tokens'] / 1e6:.0f}M: " if rates else ""
                cells.append(tokens + "; ".join(said) if rates else NOTHING)
            rows.append(f"| {width} | {name} | {' | '.join(cells)} |")
    return rows


def _loss(record: Record) -> float:
    return record["metrics"]["valid_loss"] or math.inf


def _seconds(record: Record) -> float:
    return record["metrics"]["train_seconds"] or math.inf


def tables() -> dict[str, str]:
    """Name -> table in Markdown."""
    found = {name: "\n".join([HEAD, *(row(*claim) for claim in claims)]) for name, claims in ROWS.items()}
    head = ("| width | structure, learning rate | tokens | time, dense's best = 1 | validation loss | dense's loss "
            "reached |\n|---|---|--:|--:|---|---|")  # fmt: skip
    swept = "| width | structure | 1,000 tokens a second | learning rate: validation loss |\n|---|---|--:|---|"
    found["beyond"] = "\n\n".join(beyond())
    columns = ("| width | structure | 1,000 tokens a second | sweep, 10M tokens, learning rate: loss | at dense's "
               "FLOPs, tokens: loss | in dense's time, tokens: loss |\n|---|---|--:|---|---|---|")  # fmt: skip
    found["dyad-models"] = "\n".join([
        "| model | structure | 1,000 tokens a second (times dense) | peak memory, GB | loss after 10M tokens |",
        "|---|---|--:|--:|---|", *dyad_rows(),
    ])  # fmt: skip
    found["dyad-long"] = "\n".join([
        "| model | structure | rate | loss | BLiMP, % | fine-tuned, % | prompts, % |",
        "|---|---|--:|---|---|---|---|", *dyad_long_rows(),
    ])  # fmt: skip
    found["mlps"] = "\n".join([
        "| width | structure | widening layer | narrowing layer | both |", "|---|---|--:|--:|--:|", *mlp_rows(),
    ])  # fmt: skip
    found["mixtures"] = "\n".join([columns, *mixture_rows()])
    return found | {"time": "\n".join([head, *time_rows()]), "sweep": "\n".join([swept, *sweep_rows()])}


def beyond() -> list[str]:
    """The sections of the modules claims_*.py beside this one: a title, a word before it, and a table of its rows."""
    modules = [import_module(path.stem) for path in sorted(Path(__file__).parent.glob("claims_*.py"))]
    return [
        "\n".join([f"### {module.TITLE}", "", module.INTRO, "", HEAD, *(row(*claim) for claim in module.ROWS)])
        for module in modules
    ]


def filled(page: str) -> str:
    """``page`` with every table between its marks made anew."""
    for name, table in tables().items():
        mark = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(mark, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.S)
        assert count == 1, f"the page has {count} places for the table {name}"
    return page


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
