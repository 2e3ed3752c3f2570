"""Pretrained models made structured: what is lost, what distillation brings back, and the time and memory they take.

    python benchmarks/real_weights.py models
    python benchmarks/real_models.py results/minilm.json --model models/minilm --data DATA
    python benchmarks/real_models.py results/smollm2.json --model models/smollm2 --data DATA --stages project
    python benchmarks/real_models.py results/minilm-tasks.json --model models/minilm --data DATA --stages tasks

DATA holds glue/, blimp/ and text/ in the formats of docs/evaluate.md. All attention and MLP layers are swapped, each
for the member of its family that comes nearest to a share of the dense parameters. Stages:

- project: the nearest layers, with and without inputs to fit them to, and the model measured as it is then: an encoder
  by the correlation on STS-B, a decoder by its perplexity and by minimal pairs.
- recover: the same, after so many steps of distillation from the dense model.
- tasks: fine-tuning on GLUE tasks from the dense weights and from the projected ones, score and seconds (D2S), at each
  of ``--task-lrs``; with ``--distilled`` after the distillation of recover, which ``--match tokens`` makes one of all
  tokens of pairs.
- speed: milliseconds of a training step and of a forward pass, launched from Python and compiled, and their memory.

All stages but recover begin with the dense model. Seconds and milliseconds count where nothing else runs beside them.
A record is written after every case, and cases that are in the file already are not run again, so that a run which is
cut short goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import structlin as sl
from structlin import Spec
from structlin.calibration import record_inputs
from structlin.conversion import Conversion
from structlin.evaluate import blimp, finetune, loss, sts
from structlin.evaluate.loading import is_encoder, load_model, load_tokenizer
from structlin.evaluate.metrics import pearson
from structlin.evaluate.tokens import encoder
from structlin.machine import provenance
from structlin.once import alone
from structlin.report import records

RULES = {"minilm": "*.layer.*", "smollm2": "model.layers.*"}
FAMILIES: dict[str, Callable[[int], Spec]] = {
    "monarch": lambda n: sl.Monarch(nblocks=4, rank=n),
    "low_rank": lambda n: sl.LowRank(rank=n),
    "blast": lambda n: sl.Blast(nblocks=4, rank=n),
    "dyad": lambda n: sl.Dyad(nblocks=n),
}
SENTENCES = {"sick": ("sentence1", "sentence2"), "mrpc": ("sentence1", "sentence2"),
             "qqp": ("question1", "question2"), "sst2": ("sentence",)}  # fmt: skip
PAIRS = {"sick": ("sentence1", "sentence2"), "mrpc": ("sentence1", "sentence2"), "qqp": ("question1", "question2"),
         "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence")}  # fmt: skip
"""Tasks with the fields that are read of them: as sentences, and as pairs."""
TASKS = ("rte", "mrpc", "cola", "stsb", "sick", "qnli")
Windows = list[dict[str, list[int]]]
PREFIX = "<|endoftext|>"  # what stood between documents when SmolLM2 was pretrained


@dataclass(frozen=True)
class Bench:
    """The dense model, what measures it, and what it is trained on."""

    folder: Path
    options: argparse.Namespace
    tokenizer: Any
    encodes: bool
    distilled: dict[tuple[str | None, float, bool], Distilled] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def dense(self) -> nn.Module:
        return load_model(self.folder, self.options.device, body=self.encodes)

    def text(self, part: str, tokens: int) -> Windows:
        """Windows of a part of the text, or for an encoder of GLUE tasks, as the tokenizer gives them."""
        if self.encodes:
            return self.sentences(tokens)
        ids: list[int] = []
        for document in documents(Path(self.options.data) / "text" / f"{part}.jsonl.xz", 8 * tokens):
            ids += self.tokenizer(PREFIX + document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= tokens:
                break
        size = self.options.context
        return [{"input_ids": ids[:tokens][start : start + size]} for start in range(0, min(tokens, len(ids)), size)]

    def sentences(self, tokens: int) -> Windows:
        """Sentences, or pairs of them, in a shuffled order, from the training parts of tasks other than STS-B."""
        found: Windows = []
        pairs = self.options.match == "tokens"
        for name, fields in (PAIRS if pairs else SENTENCES).items():
            rows = [
                row for row in lines(Path(self.options.data) / "glue" / f"{name}.jsonl.xz") if row["split"] == "train"
            ]
            if pairs:
                texts = [tuple(row[field] for field in fields) for row in rows][:8000]
            else:
                texts = [(row[field],) for row in rows for field in fields][:8000]
            columns = (list(column) for column in zip(*texts, strict=True))
            given = self.tokenizer(*columns, truncation=True, max_length=128 if pairs else 64)
            found += [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.options.seed)).tolist()
        chosen: Windows = []
        for index in order:
            chosen.append(found[index])
            tokens -= len(found[index]["input_ids"])
            if tokens <= 0:
                break
        return chosen

    def batches(self, windows: Windows, size: int, passes: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Inputs of the model, ``size`` windows at a time, over and over or so many times."""
        for _ in count() if passes is None else range(passes):
            for start in range(0, len(windows) - size + 1, size):
                several = windows[start : start + size]
                length = max(len(window["input_ids"]) for window in several)
                given = {name: [window[name] for window in several] for name in several[0]}
                given["attention_mask"] = [[1] * len(ids) for ids in given["input_ids"]]
                fill = {"input_ids": self.tokenizer.pad_token_id or 0}
                yield {
                    name: torch.tensor([[*row, *[fill.get(name, 0)] * (length - len(row))] for row in rows]).to(
                        self.device
                    )
                    for name, rows in given.items()
                }

    def measure(self, model: nn.Module) -> dict[str, float | int | None]:
        data, options = Path(self.options.data), self.options
        if self.encodes:
            pairs, labels, _ = sts.read_sentences(data / "glue")
            pairs, labels = pairs[: options.pairs], labels[: options.pairs]
            both = sts.embed(model, self.tokenizer, [text for pair in pairs for text in pair]).double()
            cosines = torch.cosine_similarity(both[0::2], both[1::2])
            return {"pearson": pearson(cosines, labels), "pairs": len(pairs)}
        encode = encoder(self.tokenizer, PREFIX)
        texts = list(documents(data / "text" / "test.jsonl.xz", options.test_bytes))
        on_text = loss.text_loss(model, encode, texts, options.context)
        paradigms: dict[str, list[blimp.Pair]] = {}
        for pair in blimp.read_pairs(data / "blimp" / "blimp.jsonl.xz"):
            paradigms.setdefault(pair.paradigm, []).append(pair)
        pairs_ = [pair for several in paradigms.values() for pair in several[: options.pairs]]
        on_pairs = blimp.blimp(model, encode, pairs_)
        names = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "tokens")
        kept = {"blimp": "accuracy", "blimp_stderr": "accuracy_stderr", "pairs": "pairs"}
        return {**{name: on_text[name] for name in names}, **{new: on_pairs[name] for new, name in kept.items()}}


def lines(path: Path) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def documents(path: Path, size: int) -> Iterator[str]:
    """Texts of a file, the last one cut, until they have ``size`` characters."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"][:size]
            size -= len(text)
            if text:
                yield text
            if size <= 0:
                return


def nearest(family: str, rows: int, columns: int, share: float) -> Spec:
    """The member of a family whose parameters are nearest to a share of the dense ones."""
    made, best = FAMILIES[family], None
    for n in range(1, min(rows, columns) + 1):
        try:
            params = sl.analysis.num_params(made(n).plan(rows, columns))
        except ValueError:
            continue
        distance = abs(params / (rows * columns) - share)
        best = min(best or (distance, n), (distance, n))
    if best is None:
        raise ValueError(f"no {family} fits {rows}x{columns}")
    return made(best[1])


def rules_for(model: nn.Module, glob: str, family: str, share: float) -> dict[str, Spec | None]:
    """A rule for every layer that ``glob`` matches."""
    layers = sl.to_structured_(model, {glob: sl.LowRank(rank=1)}, dry_run=True)
    shapes = {(s.out_features, s.in_features) for s in layers}
    specs = {shape: nearest(family, *shape, share) for shape in shapes}
    return {s.name: specs[s.out_features, s.in_features] for s in layers}


def speed(bench: Bench, model: nn.Module) -> dict[str, float | int | None]:
    """Median milliseconds of the model's body on random tokens, as it is and compiled, and the peak of memory as it is.

    A step is forward, backward and AdamW with weights in float32, on a GPU under autocast to bfloat16; then a forward
    pass without gradients, there with weights in bfloat16.
    """
    rows, columns = bench.options.speed_shape
    cuda = bench.device.type == "cuda"
    body: Any = getattr(model, "base_model", model)
    compiled = torch.compile(body, mode="reduce-overhead" if cuda else None)
    ids = torch.randint(min(1000, len(bench.tokenizer)), (rows, columns), device=bench.device)
    optimizer = torch.optim.AdamW(sl.param_groups(body, 1e-5), fused=cuda)

    def step(run: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = run(input_ids=ids).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward(run: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            run(input_ids=ids)

    def timed(call: Callable[[Any], None], run: Any) -> float:
        def once() -> float:
            start = time.perf_counter()
            call(run)
            if cuda:
                torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start)

        for _ in range(5 if cuda else 2):  # compiled here
            once()
        with alone():
            return median(once() for _ in range(20 if cuda else 3))

    found: dict[str, float | int | None] = {}
    for name, call in (("step", step), ("forward", forward)):
        if name == "forward":
            body.eval().to(torch.bfloat16 if cuda else torch.float32)
            torch.compiler.reset()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found[f"{name}_ms"] = timed(call, body)
        found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        found[f"compiled_{name}_ms"] = timed(call, compiled)
    return found


def distil(bench: Bench, teacher: nn.Module, student: nn.Module, windows: Windows) -> dict[str, float]:
    """Train the structured layers of ``student`` towards the outputs of ``teacher``; loss at both ends and seconds."""
    options = bench.options
    layers = [module for module in student.modules() if isinstance(module, sl.StructuredLinear)]
    student.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(sl.param_groups(student, options.lr), fused=bench.device.type == "cuda")
    steps = options.steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    losses, start = [], time.perf_counter()
    for _, batch in zip(range(steps), bench.batches(windows, options.batch), strict=False):
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bench.device.type == "cuda"):
            with torch.no_grad():
                wanted = outputs(bench, teacher, batch)
            found = outputs(bench, student, batch)
            if bench.encodes:
                distance = (1 - torch.cosine_similarity(found, wanted)).mean()
            else:
                distance = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        distance.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(distance.detach())
    taken = time.perf_counter() - start
    ends = max(1, steps // 10)
    first, last = (float(torch.stack(part).float().mean()) for part in (losses[:ends], losses[-ends:]))
    return {"distil_seconds": taken, "distil_loss_first": first, "distil_loss_last": last}


@dataclass(frozen=True)
class Distilled:
    """What making and `distil` said of a case, and the weights that they left."""

    metrics: dict[str, float | int | None]
    weights: dict[str, Tensor]


def outputs(bench: Bench, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of sentences, states of tokens, or log-probabilities (tokens, vocabulary), in float32."""
    if bench.options.match == "tokens":
        states: Tensor = model(**batch).last_hidden_state
        return states[batch["attention_mask"].bool()].float()
    if bench.encodes:
        return sts.pooled(model, batch["input_ids"], batch["attention_mask"]).float()
    logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()].float().log_softmax(-1)


@dataclass(frozen=True)
class Case:
    """What one record is about; the dense model has no family."""

    stage: str
    family: str | None = None
    share: float = 1.0
    fitted: bool = False
    task: str | None = None
    rate: str | None = None

    @property
    def name(self) -> str:
        what = "dense" if self.family is None else f"{self.family} {self.share:.0%}" + " fitted" * self.fitted
        return " ".join(filter(None, [self.stage, self.task, what, self.rate and f"at {self.rate}"]))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    families, shares = options.structures.split(","), [float(share) for share in options.shares.split(",")]
    for stage in options.stages.split(","):
        named, rates = [None], [None]
        if stage == "tasks":
            named, rates = options.tasks.split(","), options.task_lrs.split(",")
        for task, rate in product(named, rates):
            if stage != "recover":
                yield Case(stage, task=task, rate=rate)
            for share in shares:
                for family in families:
                    fits = {"no": (False,), "yes": (True,), "both": (False, True)}[options.fit]
                    for fitted in (False,) if stage == "speed" else fits:
                        yield Case(stage, family, share, fitted, task, rate)


def structured(
    bench: Bench, case: Case, inputs: Callable[[], dict[str, Tensor]], made: bool
) -> tuple[nn.Module, Conversion | None, dict[str, float | int | None]]:
    """The model of a case, what was swapped, and what that cost and took; not fitted where its weights do not count."""
    model = bench.dense()
    total = sum(p.numel() for p in model.parameters())
    if case.family is None:
        return model, None, {"model_params": total}
    rules = rules_for(model, RULES[bench.folder.name], case.family, case.share)
    given = inputs() if case.fitted and not made else None
    start = time.perf_counter()
    done = sl.to_structured_(model, rules, weights="init" if made else "project", inputs=given)
    params, dense = sum(s.params for s in done), sum(s.dense_params for s in done)
    return model, done, {
        "project_seconds": time.perf_counter() - start,
        "params": params / dense,
        "flops": sum(s.flops for s in done) / sum(s.dense_flops for s in done),
        "swapped_params": params,
        "swapped_dense_params": dense,
        "model_params": sum(p.numel() for p in model.parameters()),
        "error": None if made else sum(s.error or 0.0 for s in done) / len(done),
    }  # fmt: skip


def recovered(
    bench: Bench, case: Case, inputs: Callable[[], dict[str, Tensor]], windows: Callable[[], Windows]
) -> tuple[nn.Module, Conversion | None, dict[str, float | int | None]]:
    """`structured` and then distilled from the dense model, once for all stages and tasks that begin with it."""
    key = case.family, case.share, case.fitted
    model, done, metrics = structured(bench, case, inputs, made=key in bench.distilled)
    if key not in bench.distilled:
        metrics |= distil(bench, bench.dense(), model, windows())
        bench.distilled[key] = Distilled(metrics, {n: t.cpu() for n, t in model.state_dict().items()})
    model.load_state_dict(bench.distilled[key].weights)
    return model, done, dict(bench.distilled[key].metrics)


def run(bench: Bench, case: Case, inputs: Callable[[], dict[str, Tensor]], windows: Callable[[], Windows]) -> Any:
    """The metrics of a case, and which structures were used."""
    if case.family and (case.stage == "recover" or (case.stage == "tasks" and bench.options.distilled)):
        model, done, metrics = recovered(bench, case, inputs, windows)
    else:
        model, done, metrics = structured(bench, case, inputs, made=case.stage == "speed")
    used = sorted({f"{s.spec}@{s.out_features}x{s.in_features}" for s in done or []})
    if case.stage == "tasks":
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "model"
            sl.save(model, folder)
            model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
            bench.tokenizer.save_pretrained(folder)
            data = Path(bench.options.data) / "glue"
            tuning = finetune.Tuning(lr=float(case.rate or 0), warmup_steps=bench.options.warmup)
            found = finetune.finetune(folder, str(case.task), data, "", tuning, device=bench.options.device)
        return {**metrics, **found["metrics"], "score": found["metrics"][found["config"]["main_metric"]]}, used
    metrics["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if case.stage == "speed":
        return {**metrics, **speed(bench, model)}, used
    return {**metrics, **bench.measure(model)}, used


def main() -> None:
    options = parsed()
    folder = Path(options.model)
    bench = Bench(folder, options, load_tokenizer(folder), is_encoder(folder))
    out = Path(options.out)
    found: list[Any] = list(records.read(out)) if out.exists() else []
    cache: dict[str, Any] = {}

    def windows() -> Windows:
        if "windows" not in cache:
            cache["windows"] = bench.text("train", options.train_tokens)
        return cache["windows"]  # type: ignore[no-any-return]

    def inputs() -> dict[str, Tensor]:
        if "inputs" not in cache:
            model = bench.dense()
            names = [s.name for s in sl.to_structured_(model, {RULES[folder.name]: sl.LowRank(rank=1)}, dry_run=True)]
            parts = bench.text("train", options.fit_tokens)
            cache["inputs"] = record_inputs(model, names, bench.batches(parts, 1, passes=1))
        return cache["inputs"]  # type: ignore[no-any-return]

    for case in cases(options):
        if case.name in {record["name"] for record in found}:
            continue
        torch.manual_seed(options.seed)
        metrics, used, error = {}, [], None
        try:
            metrics, used = run(bench, case, inputs, windows)
        except ValueError as refusal:  # a structure that cannot be fitted to inputs
            error = str(refusal).splitlines()[-1].strip()
        settings = {**vars(options), "structures": used, "share": case.share, "family": case.family}
        record = {
            "kind": "eval", "name": case.name,
            **provenance(" ".join(["python", *sys.argv]), options.seed, bench.device),
            "config": {**settings, "stage": case.stage, "fitted": case.fitted, "task": case.task, "rate": case.rate},
            "metrics": metrics, "status": "failed" if error else "ok", "error": error,
        }  # fmt: skip
        found.append(record)
        records.write(out, found)
        told = {name: round(value, 4) for name, value in metrics.items() if value is not None}
        print(f"{case.name}: {error or told}", flush=True)
        gc.collect()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", help="file of records, made or continued")
    add("--model", required=True, help="models/minilm or models/smollm2, as real_weights.py writes them")
    add("--data", required=True, help="folder with glue/, blimp/ and text/")
    add("--stages", default="project,recover")
    add("--structures", default=",".join(FAMILIES))
    add("--shares", default="0.75,0.5,0.25", help="of the parameters of the swapped layers")
    add("--tasks", default=",".join(TASKS))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--pairs", type=int, default=1500, help="of STS-B, or of every paradigm of BLiMP; default: 1500 (all)")
    add("--test-bytes", type=int, default=10**9, help="characters of the test text; default: all")
    add("--context", type=int, default=1024, help="tokens of a window of text")
    add("--fit-tokens", type=int, default=8192, help="inputs that layers are fitted to")
    add("--fit", default="no", choices=("no", "yes", "both"), help="layers to inputs; default: no, to weights alone")
    add("--train-tokens", type=int, default=4_000_000, help="recover: of the training text")
    add("--steps", type=int, default=400, help="recover: of distillation")
    add("--batch", type=int, default=32, help="recover: windows of a step")
    add("--lr", type=float, default=3e-4, help="recover: that of a dense layer")
    add("--distilled", action="store_true", help="tasks: distil before")
    add("--match", default="sentences", choices=("sentences", "tokens"), help="what distillation of an encoder matches")
    add("--warmup", type=float, default=0.0, help="tasks: share of the steps over which the rate rises")
    add("--task-lrs", default="5e-5", help="tasks: those of a dense layer, each tried")
    add("--speed-shape", type=int, nargs=2, default=[32, 128], help="sequences and tokens of the timed pass")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
