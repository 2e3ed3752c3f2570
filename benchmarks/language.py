"""Language-model runs of a plan, side by side, one process on each GPU, and a small record of each.

    python benchmarks/language.py dyad:1 monarch:1 --data DATA --gpus 4 --limit 560
    python benchmarks/language.py mixtures:1 --data DATA --gpus 2 --share 3
    python benchmarks/language.py time768:3 --dry-run

DATA (or STRUCTLIN_DATA) is a folder with text/train.jsonl, text/valid.jsonl and, if there are, text/text_extra.jsonl,
blimp/blimp.jsonl, glue/TASK.jsonl and tokenizer/bpe16k.json, each possibly with .xz. The text is tokenised once, before
the queue. A run is ``structlin train`` in a process of its own, then ``structlin eval`` and ``structlin finetune`` for
its parts; of several plans the first comes first, and in it the longest. A stage of a plan is planned when the
trainings of the plan's stages before it, as far as they were given too, have ended. What ends without a result, as when
a shared GPU's memory is full, is tried once more. Nothing starts that is not expected to end within --limit, and what
is not done by then is ended. Records are written to results/language-PLAN.json after every part, so the same command
goes on with what is missing. Times in records are those of training steps; ``total_seconds`` has start, compilation,
validation and writing too. With --share several runs are on a GPU at once, for losses alone: their records say so, and
no plan takes a speed from them. With --turns several are there too, but one trains while the others start and compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from language_plans import PLANS, STAGES, STEP, Run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from structlin import recipes  # noqa: E402
from structlin.once import ALONE  # noqa: E402
from structlin.report import records as store  # noqa: E402
from structlin.report.records import Record  # noqa: E402
from structlin.train.settings import ELSEWHERE, option, override  # noqa: E402
from structlin.train.tokens import prepare  # noqa: E402

START = {"train": 65.0, "eval": 100.0, "glue": 70.0}  # seconds beside the training steps
BOS = "<|endoftext|>"
POINTS = 60  # of a curve in a record
HERE = ("data", "valid", "tokenizer", "name", *ELSEWHERE)  # fields that say where something lies on this machine
SHOTS = ("boolq", "cola", "mnli", "mrpc", "qnli", "rte", "sst2", "subj")
GLUE_STEPS = 800


@dataclass(frozen=True)
class Job:
    """One process: a part of a run, "train", "eval" or "glue:TASK".

    ``start`` is what it needs in seconds beside the training steps, None for what that is thought to be.
    """

    run: Run
    part: str
    start: float | None = None

    @property
    def seconds(self) -> float:
        """What it is expected to take alone."""
        return self.beside + self.training

    @property
    def beside(self) -> float:
        """Of that, what is not training steps."""
        start = START[self.part.partition(":")[0]] if self.start is None else self.start
        return start * max(1.0, recipes.find(self.run.recipe).depth / 18)

    @property
    def training(self) -> float:
        """Seconds of training steps."""
        return 1.05 * self.run.fields["steps"] * STEP / self.run.speed if self.part == "train" else 0.0

    @property
    def result(self) -> str:
        """Name of the file that is there when it is done."""
        return "record.json" if self.part == "train" else f"{self.part.replace(':', '-')}.json"


class Place:
    """Where runs lie, what their data is, and how a job is started."""

    def __init__(
        self, folder: Path, data: Path | None, beside: float | None = None, share: int = 1, turns: int = 1
    ) -> None:
        self.folder, self.data, self.beside = folder, data, beside  # beside: the ``start`` of training jobs
        self.share, self.turns = share, turns  # jobs on a GPU that train at once, or of which one does

    @property
    def crowd(self) -> int:
        """Jobs on a GPU at once."""
        return self.share * self.turns

    def end(self, job: Job, others: Sequence[tuple[Job, float]], now: float) -> float:
        """When ``job`` is expected to end, started ``now`` on a GPU with ``others`` that began when they say.

        Training steps share the GPU's time, or wait for those of the others.
        """
        if self.turns == 1 or not job.training:
            return now + job.beside + self.share * job.training
        free = 0.0
        for each, begun in [*((other, begun) for other, begun in others if other.training), (job, now)]:
            free = max(free, begun + each.beside) + each.training
        return free

    def file(self, kind: str, name: str) -> Path | None:
        assert self.data is not None
        return next((p for end in ("", ".xz") if (p := self.data / kind / f"{name}{end}").exists()), None)

    def fields(self) -> dict[str, list[str] | str]:
        """The text as fields of a recipe.

        Raises:
            ValueError: for a folder without text.
        """
        train, valid = self.file("text", "train.jsonl"), self.file("text", "valid.jsonl")
        if train is None or valid is None:
            raise ValueError(f"--data: {self.data} is given; allowed: a folder with text/train.jsonl and "
                             "text/valid.jsonl, each possibly with .xz")  # fmt: skip
        extra, tokenizer = self.file("text", "text_extra.jsonl"), self.file("tokenizer", "bpe16k.json")
        where: dict[str, list[str] | str] = {"data": [str(p) for p in (train, extra) if p], "valid": [str(valid)]}
        where |= {"cache": str(self.folder / "cache")} | ({"tokenizer": str(tokenizer)} if tokenizer else {})
        return where

    def command(self, job: Job) -> list[str]:
        """What runs ``job``."""
        here, python = self.folder / job.run.name, [sys.executable, "-m", "structlin"]
        if job.part == "train":
            fields = {**job.run.fields, **self.fields(), "name": job.run.name}
            given = [part for n, v in fields.items() for part in (option(n), *(v if isinstance(v, list) else [str(v)]))]
            return [*python, "train", job.run.recipe, "--out", str(here), *given]
        device = ["--device", "cpu"] if job.run.fields.get("device") == "cpu" else []
        common = [str(here / "model"), "--bos", BOS, "--out", str(here / job.result), *device]
        if job.part == "eval":
            assert self.data is not None
            tasks = [name for name in SHOTS if self.file("glue", f"{name}.jsonl")]
            shots = ["--kshot-tasks", ",".join(tasks), "--limit", "200"] if tasks else []
            names = "blimp,kshot" if tasks else "blimp"
            data = [f"blimp={self.file('blimp', 'blimp.jsonl')}", *([f"kshot={self.data / 'glue'}"] if tasks else [])]
            size = [] if device else ["--batch-tokens", "32768"]
            return [*python, "eval", *common, "--tasks", names, "--data", *data, *shots, *size]
        task = job.part.partition(":")[2]
        steps = 4 if device else GLUE_STEPS
        length = ["--steps", str(steps), "--warmup-steps", str(steps // 10)]
        return [*python, "finetune", *common, "--task", task, "--data", f"{self.data}/glue", *length]

    def start(self, job: Job, gpu: int, gpus: int) -> subprocess.Popen[bytes]:
        """Start ``job`` on one GPU of those that CUDA_VISIBLE_DEVICES allows; its output goes to a file beside its
        result."""
        here = self.folder / job.run.name
        here.mkdir(parents=True, exist_ok=True)
        caches = {f"{name}_CACHE_DIR": str(self.folder / "compiled" / name) for name in ("TORCHINDUCTOR", "TRITON")}
        threads = str(max(1, (os.cpu_count() or 1) // (gpus * self.crowd)))
        device = visible()[gpu] if visible() else str(gpu)
        env = {**os.environ, **caches, "CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": threads,
               "STRUCTLIN_CACHE_DIR": str(self.folder / "choices"), "TOKENIZERS_PARALLELISM": "false",
               "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        env.pop(ALONE, None)
        if self.turns > 1:
            env[ALONE] = os.environ.get(ALONE) or str(self.folder.resolve() / f"gpu{gpu}.lock")
        with open(here / f"{job.part.replace(':', '-')}.log", "wb") as log:
            return subprocess.Popen(self.command(job), stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0)

    def missing(self, run: Run, kept: Record | None) -> list[Job]:
        """The jobs of ``run`` that neither its folder nor its record has."""
        wanted = [Job(run, "train", self.beside), *(Job(run, part) for part in run.parts)]
        names = {job.part for job in wanted}
        if kept and is_of(kept, run) and (kept["status"] == "failed" or names <= set(kept["config"]["parts"])):
            return []
        here = self.folder / run.name
        done = [job for job in wanted if (here / job.result).exists()]
        if done and store.read(here / "record.json")[0]["status"] == "failed":
            return []
        return [job for job in wanted if job not in done]

    def record(self, run: Run, plan: str, command: str) -> Record | None:
        """One small record of all parts that are done."""
        here = self.folder / run.name
        if not (here / "record.json").exists():
            return None
        (found,) = store.read(here / "record.json")
        done = [job for job in (Job(run, part) for part in ("train", *run.parts)) if (here / job.result).exists()]
        times = self.times(run)
        metrics = dict(found["metrics"]) | {"total_seconds": times.get("train")}
        for job in done[1:]:
            for part in store.read(here / job.result):
                metrics |= {f"{part['name']}/{n}": v for n, v in part["metrics"].items() if _is_kept(n)}
        config = {name: value for name, value in found["config"].items() if name not in HERE and name != "text"}
        text = found["config"]["text"]
        config["text"] = {part: text[part] for part in ("train", "valid")} | {"tokenizer": text["tokenizer"]}
        config |= {"plan": plan, "recipe": run.recipe, "given": dict(run.fields), "parts": [job.part for job in done]}
        config |= {"share": self.share} | ({"turns": self.turns} if self.turns > 1 else {})
        series = {name: thinned(values) for name, values in found.get("series", {}).items()}
        return {**found, "command": command, "config": config, "metrics": metrics, "series": series}

    def times(self, run: Run) -> dict[str, float]:
        """Part -> seconds that it took, start and all."""
        path = self.folder / run.name / "times.json"
        found: dict[str, float] = json.loads(path.read_bytes()) if path.exists() else {}
        return found

    def note(self, job: Job, seconds: float) -> None:
        """Keep what `times` reads."""
        values = {**self.times(job.run), job.part: seconds}
        store.write_bytes(self.folder / job.run.name / "times.json", json.dumps(values).encode())

    def tidy(self, run: Run) -> None:
        """Remove what no part needs any more; weights take gigabytes."""
        here = self.folder / run.name
        shutil.rmtree(here / "checkpoints", ignore_errors=True)
        if not self.missing(run, None):
            shutil.rmtree(here / "model", ignore_errors=True)


def visible() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, none where it is not set."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """At most ``points`` of the values, evenly spread, with the first and the last."""
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def _is_kept(name: str) -> bool:
    return not name.startswith("term/") and not (name.startswith(("paradigm/", "field/")) and name.endswith("_stderr"))


def work(
    jobs: Sequence[Job],
    place: Place,
    gpus: int,
    limit: float,
    report: Callable[[Job, float, list[Job], list[Job]], list[Job]],
) -> list[Job]:
    """Run ``jobs`` in their order on ``gpus`` devices until ``limit``, a time of the clock; those that are not done.

    A device has ``place.crowd`` jobs at once; none starts that `Place.end` does not expect to end in time.
    ``report(job, seconds, waiting, running)`` is called after each that ended by itself, whatever came out, and returns
    the jobs that wait from then on.
    """  # fmt: skip
    waiting = list(jobs)
    active: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    try:
        while True:
            for slot in sorted(set(range(gpus * place.crowd)) - active.keys()):
                busy = {job.run.name for job, _, _ in active.values() if job.part == "train"}
                gpu = slot % gpus
                others = [(job, begun) for at, (job, _, begun) in active.items() if at % gpus == gpu]
                for job in waiting:
                    ready = job.part == "train" or (place.folder / job.run.name / "model").exists()
                    now = time.monotonic()
                    if ready and job.run.name not in busy and place.end(job, others, now) <= limit:
                        waiting.remove(job)
                        active[slot] = job, place.start(job, gpu, gpus), time.monotonic()
                        print(f"gpu {gpu}: {job.run.name} {job.part}, about {job.seconds:.0f} s", flush=True)
                        break
            if not active or time.monotonic() > limit:
                return waiting + [job for job, _, _ in active.values()]
            time.sleep(0.1)
            for slot, (job, process, begun) in list(active.items()):
                if process.poll() is not None:
                    del active[slot]
                    waiting = report(job, time.monotonic() - begun, waiting, [job for job, _, _ in active.values()])
    finally:
        for _, process, _ in active.values():
            with suppress(ProcessLookupError):  # it ended by itself just now
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def show(jobs: Sequence[Job], gpus: int) -> str:
    """What would run, and what it costs."""
    lines = [f"{'run':34} {'part':10} {'steps':>6} {'M tokens':>8} {'GPU s':>6}"]
    for job in jobs:
        steps = job.run.fields["steps"]
        sizes = f"{steps:>6} {steps * STEP / 1e6:>8.1f}" if job.part == "train" else " " * 15
        lines.append(f"{job.run.name:34} {job.part:10} {sizes} {job.seconds:>6.0f}")
    total = sum(job.seconds for job in jobs)
    longest = max((job.seconds for job in jobs), default=0.0)
    least = max(longest, total / gpus)
    return "\n".join([*lines, f"{len(jobs)} jobs, {total:.0f} GPU seconds, at least {least:.0f} s on {gpus} GPUs"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages of plans; 0 when all of them are in the records, 1 when something is left, 2 for bad options."""
    options = parse(arguments)
    begun = time.monotonic()
    out, folder, data = Path(options.out), Path(options.folder), options.data or os.environ.get("STRUCTLIN_DATA")
    place = Place(folder, Path(data) if data else None, options.start, options.share, options.turns)
    try:
        stages = [_stage(text) for text in options.plans]
        books = {plan: Book(out / f"language-{plan}.json") for plan, _ in stages}
        agenda = Agenda(stages, books, place, options.only)
        jobs = agenda.due([])
        if options.dry_run:
            print(show(jobs, options.gpus))
            print("\n".join(f"then {plan}:{stage}, which follows from them" for plan, stage in agenda.later))
            return 0
        if 0 < len(visible()) < options.gpus:
            raise ValueError(f"--gpus: {options.gpus} is given; allowed: up to {len(visible())}, as "
                             f"CUDA_VISIBLE_DEVICES is {','.join(visible())}")  # fmt: skip
        if not data:
            raise ValueError("--data is not given; allowed: a folder, here or in STRUCTLIN_DATA")
        if not agenda.stage_of:
            raise ValueError(f"--only: {' '.join(options.only)} is given; allowed: globs that match names of --dry-run")
        recipe = recipes.find(next(iter(agenda.stage_of)).recipe)
        prepared = prepare(override(recipe, place.fields() | {"context": "8"}))
    except ValueError as error:
        print(f"language.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(prepared.train):,} tokens to train on, ready after {time.monotonic() - begun:.0f} s", flush=True)
    command = f"python benchmarks/language.py {' '.join(options.plans)} --gpus {options.gpus}"
    for name, value in (("share", options.share), ("turns", options.turns)):
        command += f" --{name} {value}" if value > 1 else ""
    repeated: set[Job] = set()

    def report(job: Job, seconds: float, waiting: list[Job], running: list[Job]) -> list[Job]:
        place.note(job, seconds)
        if done := (folder / job.run.name / job.result).exists():
            place.tidy(job.run)
            agenda.save(job.run, command)
        book = agenda.book(job.run)
        print(f"{job.run.name} {job.part}: {seconds:.0f} s; "
              f"{said(folder / job.run.name, job, book.kept.get(job.run.name))}", flush=True)  # fmt: skip
        if not done and job not in repeated:
            repeated.add(job)
            waiting = [*waiting, job]
        try:
            return sorted([*waiting, *agenda.due([*waiting, *running])], key=agenda.order)
        except ValueError as error:
            print(f"language.py: error: {error}", file=sys.stderr, flush=True)
            return waiting

    for run in agenda.stage_of:  # what an earlier call left without a record
        if not is_of(agenda.book(run).kept.get(run.name), run):
            agenda.save(run, command)
    left = work(jobs, place, options.gpus, begun + options.limit, report)
    unplanned = [f"{plan}:{stage}" for plan, stage in agenda.later]
    print(f"{len(left)} jobs left after {time.monotonic() - begun:.0f} s: "
          + ", ".join([*(f"{job.run.name} {job.part}" for job in left), *unplanned]), flush=True)  # fmt: skip
    return 1 if left or unplanned else 0


class Agenda:
    """The stages of plans that were given, each planned when all trainings of its plan so far have ended.

    ``later`` are those that are not planned yet, ``stage_of`` has the place of its stage in the command for every run.
    """

    def __init__(
        self, stages: Sequence[tuple[str, int]], books: Mapping[str, Book], place: Place, only: Sequence[str]
    ) -> None:
        self.given, self.later, self.books, self.place, self.only = list(stages), list(stages), books, place, only
        self.stage_of: dict[Run, int] = {}

    def book(self, run: Run) -> Book:
        """Where the record of ``run`` goes."""
        return self.books[self.given[self.stage_of[run]][0]]

    def order(self, job: Job) -> tuple[int, int, bool, float]:
        """What sorts jobs: by stage as given, then priority; of the same, trainings first."""
        return self.stage_of[job.run], job.run.priority, job.part != "train", -job.seconds

    def due(self, unfinished: Sequence[Job]) -> list[Job]:
        """The missing jobs of the stages that can be planned beside ``unfinished`` ones, in their order.

        Raises:
            ValueError: for a stage that follows from what is not in the records; it is not planned any more.
        """
        busy = {self.given[self.stage_of[job.run]][0] for job in unfinished if job.part == "train"}
        found: list[Job] = []
        while stage := next((stage for stage in self.later if stage[0] not in busy), None):
            self.later.remove(stage)
            kept = self.books[stage[0]].kept
            for run in PLANS[stage[0]](stage[1], list(kept.values())):
                if _is_chosen(run, self.only):
                    override(recipes.find(run.recipe), {name: str(value) for name, value in run.fields.items()})
                    self.stage_of[run] = self.given.index(stage)
                    jobs = self.place.missing(run, kept.get(run.name))
                    busy |= {stage[0] for job in jobs if job.part == "train"}
                    found += jobs
        return sorted(found, key=self.order)

    def save(self, run: Run, command: str) -> None:
        """Write the record of ``run`` if there is one."""
        if (record := self.place.record(run, self.given[self.stage_of[run]][0], command)) is not None:
            self.book(run).put(record)


class Book:
    """The records of a plan, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = {record["name"]: record for record in store.read(path)} if path.exists() else {}

    def put(self, record: Record) -> None:
        """Add ``record``, or replace the one of its name."""
        self.kept[record["name"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        store.write(self.path, list(self.kept.values()))


def is_of(record: Record | None, run: Run) -> bool:
    """Whether ``record`` is of ``run`` with the options that it has now."""
    return record is not None and record["config"].get("given") == dict(run.fields)


def _stage(text: str) -> tuple[str, int]:
    plan, _, stage = text.partition(":")
    if plan not in PLANS or not (stage or "1").isdecimal() or not 1 <= int(stage or 1) <= STAGES[plan]:
        allowed = ", ".join(f"{name}:1" + (f" to {count}" if count > 1 else "") for name, count in STAGES.items())
        raise ValueError(f"PLAN[:STAGE]: {text} is given; allowed: {allowed}")
    return plan, int(stage or 1)


def _is_chosen(run: Run, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(run.name, glob) for glob in globs)


def said(here: Path, job: Job, record: Mapping[str, Any] | None) -> str:
    """A line on what came out of a job."""
    if not (here / job.result).exists() or record is None:
        log = (here / f"{job.part.replace(':', '-')}.log").read_text(errors="replace").splitlines()
        return "no result: " + " | ".join(log[-6:])
    if record["status"] == "failed":
        return str(record["error"])
    metrics = record["metrics"]
    line = f"loss {metrics['valid_loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
    return line + (f", BLiMP {metrics['blimp/accuracy']:.4f}" if job.part == "eval" else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("plans", nargs="+", metavar="PLAN[:STAGE]", help=f"of {', '.join(PLANS)}; a later stage follows from records")
    add("--only", nargs="+", default=[], metavar="GLOB", help="runs whose names match")
    add("--out", default="results", help="folder of records, language-PLAN.json, added to")
    add("--folder", default="runs/language", help="for runs, tokens and compiled code")
    add("--data", help="folder of texts; default: STRUCTLIN_DATA")
    add("--gpus", type=int, default=1, help="GPUs to use, a process on each")
    crowd = parser.add_mutually_exclusive_group()
    crowd.add_argument("--share", type=int, default=1, help="runs on a GPU at once, where no time is measured")
    crowd.add_argument("--turns", type=int, default=1, help="runs on a GPU at once, of which one trains")
    add("--limit", type=float, default=570.0, help="seconds after which nothing runs any more")
    add("--start", type=float, help="seconds that a run needs beside its steps; 35 where its code is compiled already")
    add("--dry-run", action="store_true", help="print what would run and how long it takes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
