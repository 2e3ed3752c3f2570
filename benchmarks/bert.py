"""BERT with Monarch beside dense: masked-LM loss, speed of a step, and GLUE. Writes records, and a picture of them.

    PYTHONPATH=src python benchmarks/bert.py --data DATA --gpus 4 --limit 470
    PYTHONPATH=src python benchmarks/bert.py --data DATA --folder runs/bert-smoke --smoke

DATA (or STRUCTLIN_DATA) has text/, glue/ and tokenizer/bpe16k.json as benchmarks/language.py takes them; the tokenizer
gets the special tokens of BERT. BERT-base is pretrained dense, with Monarch in all linear layers of its blocks
(scratch) and with Monarch for 70% of the updates and dense weights afterwards (reverse); the dense one is also
projected to Monarch by ``structlin convert`` (projected). All four are then tuned on each task, in float32 with TF32
products. Two seeds of everything. Runs named *-speed are a few updates of BERT-base and BERT-large, for their speed.
One model is pretrained on a GPU at a time, or three are tuned. Nothing starts that is not expected to end within
--limit, and what is not done by then is ended. The same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from language import HERE, ROOT, Book, thinned, visible
from language_plans import MONARCHS

from structlin import recipes
from structlin.once import ALONE
from structlin.report import records as store
from structlin.report.records import Record
from structlin.train.recipe import Recipe
from structlin.train.settings import option, override
from structlin.train.tokens import prepare

SPEC = MONARCHS["monarch4"]
STRUCTURED = {"structure": SPEC, "layers": "all"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "scratch": STRUCTURED,
    "reverse": {**STRUCTURED, "method": "sparsify_reverse", "switch": 0.7, "moments": "carry"},
}
TASKS = {"sst2": 800, "mrpc": 400, "cola": 800, "rte": 400}  # updates of 32 examples
STEPS, BATCH, CONTEXT, SPEED = 5000, 128, 128, 600e3  # tokens a second to plan with
SPEEDS = {"base": (BATCH, SPEED), "large": (512, 200e3)}  # windows and tokens a second of the runs for speed
FEW = 60  # their updates
START, TUNING = 70.0, 150.0  # seconds to start a run, and to tune a model on all tasks
SHARE = 3  # models that are tuned on one GPU at a time


@dataclass(frozen=True)
class Job:
    """One process: a pretraining run, or the tuning of a model after it; ``fields`` are those of the recipe."""

    name: str
    seconds: float
    recipe: str = ""
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    after: str = ""  # the run whose model it reads

    @property
    def load(self) -> float:
        """Share of a GPU."""
        return 1.0 if self.recipe else 1.0 / SHARE


def plan(smoke: bool, steps: int) -> list[Job]:
    """All jobs, in the order in which they start."""
    seeds = (0,) if smoke else (0, 1)
    jobs = []
    for seed in seeds:
        for variant, own in VARIANTS.items():
            common = {"steps": steps, "batch": BATCH, "micro_batch": BATCH, "valid_windows": 2048, "seed": seed,
                      "log_every": max(5, steps // 50), "valid_every": max(1, steps // 10),
                      "checkpoint_every": steps}  # fmt: skip
            small = {"batch": 8, "micro_batch": 8, "valid_windows": 16, "log_every": 3, "device": "cpu"}
            fields = {**common, **(small if smoke else {}), **own}
            seconds = START + 1.05 * steps * BATCH * CONTEXT / SPEED
            name = f"{variant}-s{seed}"
            jobs.append(Job(name, seconds, "tiny_bert" if smoke else "bert_base", fields))
    jobs.sort(key=lambda job: not job.name.startswith("dense"))
    for size, (batch, fast) in () if smoke else SPEEDS.items():
        for variant in ("dense", "scratch"):
            fields = {"steps": FEW, "batch": batch, "log_every": 10, "valid_every": FEW, "checkpoint_every": FEW,
                      "valid_windows": 256, **VARIANTS[variant]}  # fmt: skip
            seconds = START + FEW * batch * CONTEXT / fast
            jobs.append(Job(f"{size}-{variant}-speed", seconds, f"bert_{size}", fields))
    for seed in seeds:
        for variant in (*VARIANTS, "projected"):
            source = "dense" if variant == "projected" else variant
            jobs.append(Job(f"tune-{variant}-s{seed}", TUNING, after=f"{source}-s{seed}"))
    return jobs


class Place:
    """Where runs and data lie, and how a job is started."""

    def __init__(self, folder: Path, data: Path, smoke: bool) -> None:
        self.folder, self.data, self.smoke = folder, data, smoke

    def file(self, kind: str, name: str) -> Path:
        """A file of the data, packed or not; ValueError where it is missing."""
        for path in (self.data / kind / name, self.data / kind / f"{name}.xz"):
            if path.exists():
                return path
        raise ValueError(f"--data: {self.data} has no {kind}/{name}, which may end in .xz")

    def tokenizer(self) -> Path:
        """The tokenizer of the data with the special tokens of BERT, made once."""
        from tokenizers import Tokenizer

        from structlin.train.masked import SPECIAL

        made = self.folder / "tokenizer.json"
        if not made.exists():
            path = self.file("tokenizer", "bpe16k.json")
            text = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()
            codec: Any = Tokenizer.from_str(text)
            codec.add_special_tokens(list(SPECIAL.values()))
            made.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(made, codec.to_str().encode())
        return made

    def text(self) -> dict[str, list[str] | str]:
        """The text as fields of a recipe; a smoke run has the validation text alone."""
        train = [self.file("text", "valid.jsonl" if self.smoke else "train.jsonl")]
        with suppress(ValueError):
            train += [] if self.smoke else [self.file("text", "text_extra.jsonl")]
        found: dict[str, list[str] | str] = {"data": [str(path) for path in train]}
        found |= {} if self.smoke else {"valid": [str(self.file("text", "valid.jsonl"))]}
        return {**found, "cache": str(self.folder / "cache"), "tokenizer": str(self.tokenizer())}

    def result(self, job: Job) -> Path:
        """The file that is there when ``job`` is done."""
        return self.folder / job.name / "record.json"

    def command(self, job: Job) -> list[str]:
        """What runs ``job``."""
        if not job.recipe:
            smoke = ["--smoke"] if self.smoke else []
            return [sys.executable, __file__, "--tune", job.name, "--data", str(self.data), "--folder",
                    str(self.folder), *smoke]  # fmt: skip
        fields = {**job.fields, **self.text(), "name": job.name}
        given = [part for n, v in fields.items() for part in (option(n), *(v if isinstance(v, list) else [str(v)]))]
        return [sys.executable, "-m", "structlin", "train", job.recipe, "--out", str(self.folder / job.name), *given]

    def start(self, job: Job, gpu: int, gpus: int) -> subprocess.Popen[bytes]:
        """Start ``job`` on one GPU, its output going to a file beside its result."""
        here = self.folder / job.name
        here.mkdir(parents=True, exist_ok=True)
        caches = {f"{name}_CACHE_DIR": str(self.folder / "compiled" / name) for name in ("TORCHINDUCTOR", "TRITON")}
        device = (visible() or list(map(str, range(gpus))))[gpu]
        env = {**os.environ, **caches, "CUDA_VISIBLE_DEVICES": device, "TOKENIZERS_PARALLELISM": "false",
               "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus // SHARE)),
               "STRUCTLIN_CACHE_DIR": str(self.folder / "choices"),
               "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        if not job.name.endswith("-speed"):
            env.pop(ALONE, None)  # what trains for minutes would stop all others for as long
        with open(here / "log.txt", "wb") as log:
            return subprocess.Popen(self.command(job), stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0)


def tune(place: Place, name: str) -> None:
    """Tune one model on all tasks, in this process, and write its records; project it first if that is its variant."""
    import torch

    from structlin.evaluate.finetune import Tuning, finetune
    from structlin.hf import convert
    from structlin.spec import parse

    torch.set_float32_matmul_precision("high")
    variant, _, seed = name.removeprefix("tune-").rpartition("-s")
    source = place.folder / f"{'dense' if variant == 'projected' else variant}-s{seed}"
    model, device = source / "model", "cpu" if place.smoke else "cuda"
    if variant == "projected":
        model = place.folder / name / "model"
        if not model.exists():
            convert(source / "model", model, {"bert.encoder.layer.*": parse(SPEC)}, "project")
    recipe = Recipe.from_dict(json.loads((source / "run.json").read_bytes())["recipe"])
    loss = masked_loss(recipe, model, device)
    found = []
    for task, steps in TASKS.items():
        steps = 2 if place.smoke else steps
        tuning = Tuning(lr=5e-5, steps=steps, batch=32, warmup_steps=steps // 10, seed=int(seed))
        data = place.file("glue", f"{task}.jsonl").parent
        record = finetune(model, task, data, "python benchmarks/bert.py", tuning, device=device)
        config = {**record["config"], "model": variant, "products": "TF32", "pretraining_steps": recipe.steps}
        record["metrics"]["pretrained_valid_loss"] = loss
        found.append({**record, "name": f"{record['name']} {variant}-s{seed}", "config": config})
        print(found[-1]["name"], record["metrics"], flush=True)
    store.write(place.folder / name / "record.json", found)  # type: ignore[arg-type]


def masked_loss(recipe: Recipe, model: Path, device: str) -> float:
    """The loss of the model in a folder on the validation batch of a recipe, in nats per hidden token."""
    import torch
    from transformers import AutoModelForMaskedLM

    from structlin.train import loop, masked

    batch = loop.batches(recipe, prepare(recipe))[1]
    found = AutoModelForMaskedLM.from_pretrained(model).to(device).eval()
    with torch.no_grad():
        pieces = [masked.loss(found, piece.to(device)).item() * len(piece) for piece in batch.split(256)]
    return sum(pieces) / len(batch)


def missing(jobs: Sequence[Job], place: Place, book: Book) -> list[Job]:
    """Jobs without records of so many updates; runs whose models are gone are done again where tuning needs them."""
    steps = next((job.fields["steps"] for job in jobs if job.recipe), None)

    def is_done(job: Job) -> bool:
        if job.recipe:
            record = book.kept.get(job.name)
            return record is not None and record["config"]["steps"] == job.fields["steps"]
        tuned = [book.kept.get(f"finetune/{task} {job.name.removeprefix('tune-')}") for task in TASKS]
        return all(record is not None and record["config"]["pretraining_steps"] == steps for record in tuned)

    found = [job for job in jobs if not is_done(job)]
    needed = {job.after for job in found if not (place.folder / job.after / "record.json").exists()}
    return [job for job in jobs if job in found or job.name in needed]


def work(jobs: Sequence[Job], place: Place, gpus: int, limit: float, keep: Any) -> list[Job]:
    """Run ``jobs`` until ``limit``, a time of the clock; those that are not done."""
    waiting = list(jobs)
    active: list[tuple[Job, int, subprocess.Popen[bytes], float]] = []
    left = []
    try:
        while waiting or active:
            for gpu in range(gpus):
                for job in list(waiting):
                    used = sum(other.load for other, there, _, _ in active if there == gpu)
                    ready = not job.after or (place.folder / job.after / "record.json").exists()
                    if ready and used + job.load <= 1.01 and time.monotonic() + job.seconds <= limit:
                        waiting.remove(job)
                        active.append((job, gpu, place.start(job, gpu, gpus), time.monotonic()))
                        print(f"gpu {gpu}: {job.name}, about {job.seconds:.0f} s", flush=True)
            if not active or time.monotonic() > limit:
                break
            time.sleep(0.1)
            for entry in list(active):
                job, _, process, begun = entry
                if process.poll() is not None:
                    active.remove(entry)
                    done = place.result(job).exists()
                    print(f"{job.name}: {time.monotonic() - begun:.0f} s" + ("" if done else ", no result"), flush=True)
                    if done:
                        keep(job)
                    else:
                        left.append(job)
                        print("  " + "\n  ".join((place.folder / job.name / "log.txt").read_text().splitlines()[-5:]))
        return [*waiting, *left, *(job for job, _, _, _ in active)]
    finally:
        for _, _, process, _ in active:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def small(record: Record, command: str) -> Record:
    """A record without what says where something lies on this machine, its curves thinned."""
    here = HERE if record["kind"] == "train" else ()
    config = {name: value for name, value in record["config"].items() if name not in here}
    if "text" in config:
        config["text"] = {part: config["text"][part] for part in ("train", "valid")}
    series = {name: thinned(values) for name, values in record.get("series", {}).items()}
    return {**record, "command": command, "config": config, "series": series}


def picture(records: Sequence[Record], path: Path) -> None:
    """Validation loss over updates, and the main metric of each task, by variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    variants = [*VARIANTS, "projected"]
    for record in records:
        variant = record["name"].rpartition("-s")[0]
        if record["kind"] == "train" and variant in VARIANTS:
            first = record["seed"] == 0
            left.plot(record["series"]["valid_step"], record["series"]["valid_loss"],
                      color=f"C{variants.index(variant)}", label=variant if first else None)  # fmt: skip
        elif record["kind"] == "eval":
            task, _, tuned = record["name"].removeprefix("finetune/").partition(" ")
            index = variants.index(tuned.rpartition("-s")[0])
            value = record["metrics"][record["config"]["main_metric"]]
            right.plot(list(TASKS).index(task) + 0.15 * (index - 1.5), value, "o", color=f"C{index}")
    left.set(xlabel="updates", ylabel="validation loss, nats per hidden token")
    left.legend()
    right.set(xticks=range(len(TASKS)), xticklabels=list(TASKS), ylabel="main metric, one point for each seed")
    for index, variant in enumerate(variants):
        right.plot([], [], "o", color=f"C{index}", label=variant)
    right.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 0 when all is in the records, 1 when something is left, 2 for bad options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default=os.environ.get("STRUCTLIN_DATA"), help="default: STRUCTLIN_DATA")
    add("--folder", default="runs/bert", help="for runs, tokens and compiled code")
    add("--out", help="records, added to; default: results/bert-h200.json, or FOLDER/bert.json with --smoke")
    add("--gpus", type=int, default=1)
    add("--limit", type=float, default=470.0, help="seconds after which nothing runs any more")
    add("--only", nargs="+", default=["*"], help="globs over names of runs")
    add("--steps", type=int, default=STEPS, help="updates of BERT-base")
    add("--smoke", action="store_true", help="tiny models on a CPU")
    add("--tune", metavar="NAME", help="for the processes that this one starts")
    options = parser.parse_args(arguments)
    begun, folder = time.monotonic(), Path(options.folder)
    if not options.data:
        print("bert.py: error: --data is not given; allowed: a folder, here or in STRUCTLIN_DATA", file=sys.stderr)
        return 2
    place = Place(folder, Path(options.data), options.smoke)
    try:
        if options.tune:
            tune(place, options.tune)
            return 0
        place.text()
    except ValueError as error:
        print(f"bert.py: error: {error}", file=sys.stderr)
        return 2
    out = Path(options.out or (folder / "bert.json" if options.smoke else "results/bert-h200.json"))
    book, command = Book(out), f"python benchmarks/bert.py --gpus {options.gpus}"
    planned = plan(options.smoke, 12 if options.smoke else options.steps)
    jobs = [job for job in planned if any(fnmatchcase(job.name, glob) for glob in options.only)]

    def keep(job: Job) -> None:
        for record in store.read(place.result(job)):
            book.put(small(record, command))

    for job in jobs:
        if place.result(job).exists():
            keep(job)
    waiting = missing(jobs, place, book)
    if waiting:  # the text is tokenised before several need it
        recipe = override(recipes.find(jobs[0].recipe), place.text())
        print(f"{len(prepare(recipe).train):,} tokens, ready after {time.monotonic() - begun:.0f} s", flush=True)
    left = work(waiting, place, options.gpus, begun + options.limit, keep)
    names = ", ".join(job.name for job in left)
    print(f"{len(left)} of {len(jobs)} jobs left after {time.monotonic() - begun:.0f} s: {names}", flush=True)
    with suppress(ImportError):
        picture(list(book.kept.values()), out.with_suffix(".png"))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
