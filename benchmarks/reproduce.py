"""Records of GPUs made anew or gone on with: many scripts on one machine, its GPUs full, within a time.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py mlps dyad time768 --gpus 2 --limit 1700 --data DATA --images IMAGES --mri MRI

Without names it runs all of `TASKS`, in their order. DATA, IMAGES and MRI are folders as benchmarks/language.py,
benchmarks/vision.py and docs/mri.md describe them; --models has what benchmarks/real_weights.py wrote. A task is one
command, in a folder of its own with the records so far, so that it goes on with what is missing. What it adds is merged
into results/ every few seconds. What times something has a GPU for itself, or shares it and times in turns
(`structlin.once.alone`): all else on that GPU is stopped meanwhile. A task starts after those that it follows from; one
that fails, as where a shared GPU's memory is full, is started once more. One that counts its time itself starts where
two minutes are left, others where they are expected to end in time. What runs at the end is ended.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from turns import LOCKS, Turns, processes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from structlin.once import ALONE  # noqa: E402
from structlin.report import records  # noqa: E402
from structlin.report.records import Record  # noqa: E402

FOLDERS = {"DATA": "data", "IMAGES": "images", "MRI": "mri", "models": "models"}
"""What commands call folders that lie elsewhere, and the options that say where."""
EVERY = 3.0  # seconds between two looks at what was written
QUARTER, SIXTH = 0.25, 0.16  # of a GPU; the latter for small operations that wait for their launches
TWELFTH = 0.08  # for what times in turns and compiles else
TIMES = ("train_seconds", "step_seconds", "examples_per_second", "tokens_per_second", "utilisation", "training_s")
LEAST = 120.0  # seconds that a task with a limit of its own is worth starting for


@dataclass(frozen=True)
class Task:
    """One command, with ``{limit}`` for the seconds that it has.

    ``seconds`` is what it is expected to take, ``part`` how much of a GPU it gets, and ``after`` names the tasks whose
    records it reads. ``turns`` says that it times, and waits for its turn with that; ``timeless``, that its records
    keep no times, as others run beside it or stop it.
    """

    name: str
    command: str
    seconds: float
    part: float = 1.0
    after: tuple[str, ...] = ()
    turns: bool = False
    timeless: bool = False

    @property
    def least(self) -> float:
        """Seconds that have to be left for it to start."""
        return min(self.seconds, LEAST) if "{limit}" in self.command else self.seconds


def language(name: str, plan: str, seconds: float, share: int = 1, after: tuple[str, ...] = ()) -> Task:
    """Runs of plans of benchmarks/language.py, those that time nothing ``share`` at once and not alone on their GPU."""
    shared, part = (f" --share {share}", 0.6) if share > 1 else ("", 1.0)
    return Task(
        name, f"python benchmarks/language.py {plan}{shared} --data DATA --limit {{limit}}", seconds, part, after
    )


def step_time(recipe: str) -> Task:
    """Whole training steps of a model of DYAD's paper."""
    specs = ["dense", *(f"dyad:nblocks={n}:variant={variant}" for n in (4, 8) for variant in ("narrow", "it"))]
    command = f"python benchmarks/step_time.py results/step-time-{recipe}-h200.json --recipe {recipe} --steps 10"
    specs += [f"dyad:nblocks=4:variant={variant}" for variant in ("ot", "dt")]
    return Task(f"steps-{recipe}", f"{command} --structures {','.join(specs)}", 250, TWELFTH, turns=True)


def speed(model: str, shape: str = "") -> Task:
    """Steps of a pretrained model with structured layers."""
    command = f"python benchmarks/real_models.py results/{model}-speed-h200.json --model models/{model} --data DATA"
    return Task(
        f"speed-{model}", f"{command} --stages speed --structures monarch,low_rank --shares 0.5,0.25{shape}", 300,
        TWELFTH, turns=True,
    )  # fmt: skip


TASKS: tuple[Task, ...] = (
    Task("mlps", "structlin bench --preset mlp --backends auto --out results/bench-mlp-h200.json", 200),
    language("dyad", "dyad:1 dyad:2 dyad:3", 1300, 3),
    language("dyad-models", "dyad_models:1 dyad_models:2 dyad_models:3", 1600, 3),
    language("monarch-speed", "monarch:1", 400),
    language("monarch-85M", "monarch:2", 600, 3, ("monarch-speed",)),
    language("methods", "methods:1", 450),
    *(
        language(f"time{width}", " ".join(f"time{width}:{stage}" for stage in (1, 2, 3, 4)) + " --turns 2", seconds)
        for width, seconds in ((768, 2600), (1024, 3000), (2048, 4000))
    ),
    *(language(f"mixtures-{n}", f"mixtures:{n}", 600, 1 if n == 2 else 3, (f"mixtures-{n - 1}",) * (n > 1))
      for n in (1, 2, 3)),
    *map(step_time, ("opt125m", "pythia160m", "opt350m")),
    speed("minilm"), speed("smollm2", " --speed-shape 16 1024"),
    *(
        Task(f"{model}-{flow}-s{seed}", "python benchmarks/operators.py --out results/operators-h200.json "
             f"--models {model} --flows {flow} --seeds {seed} --short-share 0.9 --limit {{limit}}", 250, SIXTH,
             timeless=True)
        for seed in (0, 1, 2) for flow in ("1e-3", "1e-4", "1e-5") for model in ("fno", "monarch_no", "unet")
    ),
    *(
        Task(f"mri-{method}-s{seed}", "python benchmarks/mri.py --data MRI --out results/mri-h200.json "
             f"--only '{method}-*-s{seed}' --limit {{limit}}", 300, SIXTH, timeless=True)
        for seed in (0, 1, 2) for method in ("monarch_sense", "unet", "unet_on_sense")
    ),
    Task("mri-picture", "python benchmarks/mri.py --data MRI --out results/mri-h200.json --only none --limit 0 "
         "--picture results/mri-h200.png", 30, SIXTH, ("mri-monarch_sense-s0", "mri-unet-s0")),
    *(
        Task(f"vision-{name}", f"python benchmarks/vision.py --data IMAGES --only '{name}_*' --limit {{limit}}",
             seconds, part, timeless=True)
        for name, seconds, part in (("vit", 1200, QUARTER), ("mixer", 1200, QUARTER), ("mnist", 400, SIXTH))
    ),
    *(
        Task(f"vision-steps-{name}", f"python benchmarks/vision.py --only 'step-{name}_*' --limit {{limit}}", seconds,
             TWELFTH, turns=True)
        for name, seconds in (("vit", 900), ("mixer", 900), ("mnist", 200))
    ),
    Task("attention", "python benchmarks/attention.py --out results/attention-h200.json --limit {limit}", 700, TWELFTH,
         turns=True),
    Task("attention-quality", "python benchmarks/attention.py --out results/attention-h200.json --quality DATA "
         "--limit {limit}", 500, 0.5, timeless=True),
    *(
        Task(f"sparsify-{name}", "python benchmarks/sparsify.py --out results/sparsify-h200.json "
             f"--only '{glob}' --limit {{limit}}", seconds, TWELFTH, turns=True)
        for name, glob, seconds in (
            ("layers", "layer *", 720), ("gpt2", "gpt2_*", 500), ("vit", "vit_*", 500), ("mixer", "mixer_*", 500)
        )
    ),
    Task("sparsify-quality", "python benchmarks/sparsify.py --parts quality --out results/sparsify-h200.json "
         "--limit {limit}", 900, QUARTER, timeless=True),
    Task("bert", "python benchmarks/bert.py --data DATA --out results/bert-h200.json --only '*-s?' --limit {limit}",
         1500, QUARTER, timeless=True),
    Task("bert-speed", "python benchmarks/bert.py --data DATA --out results/bert-h200.json --only '*-speed' "
         "--limit {limit}", 700, TWELFTH, turns=True),
    *(Task(preset, f"structlin bench --preset {preset} --out results/{file}-h200.json", seconds)
      for preset, file, seconds in (("h200", "bench", 500), ("blocks", "blocks", 200))),
    Task("routed", "python benchmarks/routed.py --out results/routed-h200.json", 200),
    Task("taxonomy", "python benchmarks/taxonomy.py results/taxonomy-h200.json --device cuda", 1500, 0.5),
    Task("mup", "python benchmarks/mup.py --out results/mup-h200.json --seeds 1 --exponents -11 -3 --minutes 5", 330),
)  # fmt: skip


@dataclass
class Job:
    """A task that runs: where, since when, and the records that it began with, as far as they are not its own."""

    task: Task
    folder: Path
    gpu: int
    process: subprocess.Popen[bytes]
    begun: float = field(default_factory=time.monotonic)
    before: dict[str, dict[str, Record]] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)


def by_name(path: Path) -> dict[str, Record]:
    """The records of a file by name, none where it is missing."""
    return {record["name"]: record for record in records.read(path)} if path.exists() else {}


def prepare(folder: Path, out: Path, links: Mapping[str, Path]) -> None:
    """Make the folder of a task: this repository's sources, a copy of the records, and what ``links`` names."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "results").mkdir(parents=True)
    for path in out.glob("*.json"):
        shutil.copy(path, folder / "results")
    runs = folder.parent / "runs"  # one for all, for tokens and compiled code
    runs.mkdir(exist_ok=True)
    for name, to in {"src": ROOT / "src", "benchmarks": ROOT / "benchmarks", "runs": runs, **links}.items():
        (folder / name).symlink_to(to.resolve())


def lock(options: argparse.Namespace, gpu: int) -> Path:
    """What tasks take that time in turns on a GPU."""
    return Path(options.folder).resolve() / "runs" / f"gpu{gpu}.lock"


def start(task: Task, gpu: int, options: argparse.Namespace, limit: float) -> Job:
    """Start a task on one GPU."""
    folder = Path(options.folder) / task.name
    links = {name: Path(given) for name, option in FOLDERS.items() if (given := getattr(options, option))}
    prepare(folder, Path(options.out), links)
    words = shlex.split(task.command.format(limit=int(limit)))
    python = {"python": [sys.executable], "structlin": [sys.executable, "-m", "structlin"]}
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    # one that times has caches of its own, as others may be stopped while they hold a lock of theirs
    caches = folder.resolve() if task.turns else Path(options.folder).resolve() / "runs" / "language"
    env = {
        **os.environ, "CUDA_VISIBLE_DEVICES": devices[gpu] if devices else str(gpu), "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "compiled" / "TORCHINDUCTOR"),
        "TRITON_CACHE_DIR": str(caches / "compiled" / "TRITON"), "STRUCTLIN_CACHE_DIR": str(caches / "choices"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    if task.turns:
        env[ALONE] = str(lock(options, gpu))
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [*python[words[0]], *words[1:]],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    before = {path.name: by_name(path) for path in (folder / "results").glob("*.json")}
    return Job(task, folder, gpu, process, before=before)


def collect(job: Job, out: Path) -> None:
    """Merge what a task has added or made anew into the records, and copy its pictures beside them."""
    for path in sorted((job.folder / "results").glob("*.*")):
        changed = path.stat().st_mtime
        if path.suffix not in (".json", ".png") or job.seen.setdefault(path.name, 0.0) == changed:
            continue
        job.seen[path.name] = changed
        if path.suffix == ".png":
            shutil.copy(path, out)
            continue
        own, before = by_name(path), job.before.get(path.name, {})
        fresh = {name: record for name, record in own.items() if record != before.get(name)}
        if job.task.timeless:
            fresh = {name: without_times(record) for name, record in fresh.items()}
        if fresh:
            records.write(out / path.name, list({**by_name(out / path.name), **fresh}.values()))


def without_times(record: Record) -> Record:
    """The record of what shared a GPU."""
    metrics = {name: None if name in TIMES else value for name, value in record["metrics"].items()}
    series = {
        name: values for name, values in record.get("series", {}).items() if name not in ("seconds", "valid_seconds")
    }
    return {**record, "metrics": metrics, "series": series}


def ready(waiting: Sequence[Task], active: Sequence[Job], gpus: int, left: float) -> Iterator[tuple[Task, int]]:
    """Tasks that may start now, and where; the first that fits, as what starts changes what fits."""
    free = [1.0 - sum(job.task.part for job in active if job.gpu == gpu) for gpu in range(gpus)]
    unfinished = {task.name for task in waiting} | {job.task.name for job in active}
    for task in waiting:
        kinds = [{job.task.turns for job in active if job.gpu == gpu} for gpu in range(gpus)]
        fits = [
            gpu for gpu in range(gpus)
            if free[gpu] >= task.part - 1e-6 and (LOCKS.exists() or kinds[gpu] <= {task.turns})
        ]  # fmt: skip
        if fits and task.least <= left and not unfinished & set(task.after):
            yield task, max(fits, key=free.__getitem__)
            return


def work(tasks: Sequence[Task], options: argparse.Namespace) -> list[str]:
    """Run ``tasks``; the names of those that did not end."""
    end, out = time.monotonic() + options.limit, Path(options.out)
    waiting, active = list(tasks), list[Job]()
    cut: list[str] = []
    repeated: set[Task] = set()

    def sessions(gpu: int) -> list[int]:
        return [job.process.pid for job in list(active) if job.gpu == gpu]

    turns = ExitStack()
    (Path(options.folder) / "runs").mkdir(parents=True, exist_ok=True)
    if LOCKS.exists():
        for gpu in range(options.gpus):
            turns.enter_context(Turns(lock(options, gpu), lambda gpu=gpu: sessions(gpu)))  # type: ignore[misc]
    try:
        while True:
            while found := next(ready(waiting, active, options.gpus, end - time.monotonic()), None):
                task, gpu = found
                waiting.remove(task)
                active.append(start(task, gpu, options, end - time.monotonic() - EVERY))
                print(f"gpu {gpu}: {task.name}, about {task.seconds:.0f} s", flush=True)
            if not active or time.monotonic() > end:
                break
            time.sleep(min(EVERY, max(0.0, end - time.monotonic())))
            for job in list(active):
                code = job.process.poll()
                collect(job, out)
                if code is not None:
                    active.remove(job)
                    if code:
                        (cut.append(job.task.name) if job.task in repeated else waiting.append(job.task))
                        repeated.add(job.task)
                    last = job.folder.with_suffix(".log").read_text(errors="replace").splitlines()[-1:]
                    taken = time.monotonic() - job.begun
                    print(f"{job.task.name}: {taken:.0f} s, exit {code}; {' '.join(last)[:200]}", flush=True)
    finally:
        turns.close()
        for job in active:
            cut.append(job.task.name)
            for process in processes(job.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            job.process.wait()
            collect(job, out)
    return [*cut, *(task.name for task in waiting)]


def chosen(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, all for none.

    Raises:
        ValueError: for a name that is not there.
    """
    known = {task.name: task for task in TASKS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: no such task; allowed: those of --list")
    return [known[name] for name in names] if names else list(TASKS)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all tasks ended, 1 when some did not, 2 for bad options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="TASK", help="of --list, in the order that they are wanted; default: all")
    add("--list", action="store_true", help="show all tasks and what they are expected to take")
    for option in FOLDERS.values():
        add(f"--{option}", metavar="FOLDER")
    add("--out", default="results", help="folder of records, added to")
    add("--folder", default="runs/reproduce", help="for what tasks leave")
    add("--gpus", type=int, default=1)
    add("--limit", type=float, default=1e6, help="seconds after which nothing runs any more")
    options = parser.parse_args(arguments)
    try:
        tasks = chosen(options.names)
    except ValueError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for task in tasks:
            print(f"{task.name:20} {task.seconds:5.0f} s  {task.command}")
        return 0
    words = {word.partition("/")[0] for task in tasks for word in shlex.split(task.command)}
    missing = sorted(option for name, option in FOLDERS.items() if name in words and not getattr(options, option))
    if missing:
        print(f"reproduce.py: error: --{', --'.join(missing)}: needed by these tasks", file=sys.stderr)
        return 2
    left = work(tasks, options)
    print(f"{len(left)} of {len(tasks)} tasks did not end: {', '.join(left)}", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
