"""The search itself: which candidate next, and what is known so far, in a study of Optuna that outlives its processes.

The study holds everything: its configuration, the record of the dense model, and in each trial the record of what came
out. One process drives it. A trial that was running when that process, or a worker, was killed is put back into the
queue, so the same command goes on and loses nothing but the unfinished run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..report.records import Record
from ..train.config import OptionError
from .budget import Size, dense_budget, fit
from .config import METRICS, Config, changed
from .outcomes import Running, record_of
from .runners import Runner
from .training import POINTS, Job

JOURNAL = "study.journal"
ATTEMPTS = 3
"""Times that a trial is started before its worker's deaths count as its failure."""

DENSE = -1  # the number of the job that sets the budget
Say = Callable[[str], None]


class SearchError(RuntimeError):
    """A search that cannot go on."""


def open_storage(folder: Path, url: str | None) -> optuna.storages.BaseStorage:
    """The storage at ``url``, or the journal file of ``folder``, whose lock this process holds.

    A process that was killed while it wrote may have left half a line and a lock; both go.

    Raises:
        OptionError: for a database that cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is not None:
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # of SQLAlchemy, of the database's driver, or its absence
            raise OptionError("--storage", f"{url}: {type(error).__name__}: {str(error).splitlines()[0]}; allowed: the "
                              "URL of a database, as sqlite:///search.db") from None  # fmt: skip
    path = folder / JOURNAL
    path.with_name(JOURNAL + ".lock").unlink(missing_ok=True)
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(path, "r+b") as file:
                file.truncate(whole)
    backend = JournalFileBackend(str(path))
    try:
        return optuna.storages.JournalStorage(backend)
    except (ValueError, KeyError) as error:
        raise OptionError("--out", f"{path} is damaged ({error}); choose another folder") from None


class Study:
    """A search that can be run, and run again, to its end.

    Args:
        config: what is searched.
        storage: from `open_storage`.
        name: of the study there.
        command: for the records.

    Raises:
        OptionError: where the study there is another search, the data cannot be used, the task's model cannot have a
            candidate, or the budget does not pay for a step.
    """

    def __init__(self, config: Config, storage: optuna.storages.BaseStorage, name: str, command: str) -> None:
        self.config, self.command, self.task, self.space = config, command, config.load(), config.parsed()
        self._dense = self._dense_size()
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=POINTS // 4, reduction_factor=2)
        known = {summary.study_name for summary in optuna.get_all_study_summaries(storage)}
        if name not in known:
            optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * len(config.minimise))
        self.study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
        identity = {**config.to_dict(), "about": self.task.about}
        before = json.loads(self.study.user_attrs.get("config", "null"))
        if before is None:
            self.study.set_user_attr("config", json.dumps(identity))
        elif differing := changed(before, identity):
            raise OptionError("--out", f"holds a search with another {', '.join(differing)}; choose another folder")
        self.study.sampler = _sampler(config, len(self.study.get_trials(deepcopy=False)))
        self._running: dict[int, Running] = {}

    def run(self, runner: Runner, say: Say, watch: Callable[[], None] = lambda: None) -> list[Record]:
        """Train what is not trained yet and return all records, the dense model's first.

        Args:
            runner: who trains.
            say: called with lines of progress.
            watch: called after each record, as to write a report.

        Raises:
            SearchError: when the dense model fails or its process dies again and again.
        """
        self._recover(say)
        self._queue_grid()
        try:
            while self._fill(runner, say):
                number, event = runner.event()
                if self._take(runner, self._running[number], event, say):
                    watch()
        except BaseException:
            for running in self._running.values():
                self._put_back(running.trial, running.attempt - 1)
            raise
        finally:
            self._running.clear()
            runner.close()
        return self.records()

    def records(self) -> list[Record]:
        """The record of the dense model, if there is one yet, and those of all trials that ended, in their order."""
        dense = self.study.user_attrs.get("dense")
        trials = [trial.user_attrs["record"] for trial in self._ended()]
        return [json.loads(text) for text in ([dense] if dense else []) + trials]

    def _ended(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if "record" in trial.user_attrs]

    def _ended_as(self, number: int) -> str:
        """The record of a trial that ended, as it is stored."""
        text: str = self.study.get_trials(deepcopy=False)[number].user_attrs["record"]
        return text

    def _drawn(self) -> int:
        """Trials that ended, those that drew what an earlier one had trained included."""
        return sum({"record", "same_as"} & trial.user_attrs.keys() != set() for trial in self.study.get_trials(False))

    def _recover(self, say: Say) -> None:
        """Put trials that a dead process left running back into the queue."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            twin = trial.user_attrs.get("same_as")
            told = trial.user_attrs.get("record") if twin is None else self._ended_as(twin)
            if told is not None:  # all but the last line of its end was written
                self._tell(trial.number, json.loads(told))
                continue
            say(f"trial {trial.number} was interrupted; it is tried again")
            self._put_back(trial, trial.user_attrs.get("attempt", 1))

    def _put_back(self, trial: optuna.Trial | FrozenTrial | None, attempt: int) -> None:
        """End a trial without a record and queue its candidate again, as the ``attempt``-th try."""
        if trial is None:
            return
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        params = frozen.system_attrs.get("fixed_params") or frozen.params
        self.study.tell(trial.number, state=TrialState.FAIL)
        if params:
            self.study.enqueue_trial(params, user_attrs={"attempt": attempt})

    def _queue_grid(self) -> None:
        if self.config.sampler != "grid":
            return
        queued = {trial.system_attrs.get("fixed_params", {}).get("structure") for trial in self.study.get_trials(False)}
        for candidate in self.space.grid()[: self.config.trials]:
            if candidate not in queued:
                self.study.enqueue_trial({"structure": candidate})

    def _fill(self, runner: Runner, say: Say) -> bool:
        """Start what there is room for; whether anything runs."""
        while len(self._running) < runner.slots:
            dense = self.study.user_attrs.get("dense")
            if dense is None:
                if self._running:
                    break  # at equal seconds it sets the budget; elsewhere it is what all others are compared with
                self._start_dense(runner)
                continue
            if self._drawn() + len(self._running) >= self.config.trials or not self._start(runner, say):
                break
        return bool(self._running)

    def _dense_size(self) -> Size:
        """Of the dense model: the task's width and steps or, where a budget is given, what that pays."""
        config = self.config
        equal = "flops" if config.equal == "seconds" and config.budget is None else config.equal
        try:
            return fit(self.task, "dense", equal, config.grow, config.budget)
        except ValueError as error:
            raise OptionError("--budget", f"{config.budget:g} is given; {error}") from None

    def _start_dense(self, runner: Runner) -> None:
        job = self._job(DENSE, "dense", self._dense, self.config.budget or 0)
        self._begin(runner, Running(job, self._dense, None, 1))

    def _start(self, runner: Runner, say: Say) -> bool:
        """Start the next trial, if there is one.

        One whose candidate does not fit ends at once, as failed, and one whose candidate is known as that did.
        """
        waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if self.config.sampler == "grid" and not waiting:
            return False
        trial = self.study.ask()
        candidate = self._candidate(trial)
        attempt = trial.user_attrs.get("attempt", 0) + 1
        trial.set_user_attr("attempt", attempt)
        if twin := next((old for old in self._ended() if _name(old) == candidate), None):
            trial.set_user_attr("same_as", twin.number)
            self._tell(trial.number, json.loads(twin.user_attrs["record"]))
            say(f"trial {trial.number}, {candidate}: as trial {twin.number}")
            return True
        try:
            if attempt > ATTEMPTS:
                raise ValueError(f"its process died {ATTEMPTS} times; out of memory?")
            size = fit(self.task, candidate, self.config.equal, self.config.grow, self._budget())
        except ValueError as error:
            nothing = Size(0, 0, 0, 0)
            running = Running(self._job(trial.number, candidate, nothing, 0), nothing, trial, attempt)
            self._end(running, " ".join(str(error).split()), say)
            return True
        budget = self._budget() if self.config.equal == "seconds" else 0
        self._begin(runner, Running(self._job(trial.number, candidate, size, budget), size, trial, attempt))
        return True

    def _candidate(self, trial: optuna.Trial) -> str:
        if self.config.sampler == "grid":
            return str(trial.suggest_categorical("structure", self.space.grid()))
        return self.space.draw(trial)

    def _budget(self) -> float:
        """What every trial may spend: as given, or what the dense model takes."""
        if self.config.budget is not None:
            return self.config.budget
        if self.config.equal != "seconds":
            return dense_budget(self.task, self.config.equal)
        seconds = json.loads(self.study.user_attrs["dense"])["metrics"]["train_seconds"]
        assert isinstance(seconds, float)
        return seconds

    def _job(self, number: int, candidate: str, size: Size, seconds: float) -> Job:
        config = self.config
        return Job(
            number=number, candidate=candidate, task=config.task, preset=config.preset, data=config.data,
            task_steps=config.steps, seed=config.seed, width=size.width, steps=size.steps, seconds=seconds or None,
            lr=config.lr, device=config.device, threads=max(1, int(config.share)) if config.device == "cpu" else 1,
        )  # fmt: skip

    def _begin(self, runner: Runner, running: Running) -> None:
        self._running[running.job.number] = running
        runner.start(running.job)

    def _take(self, runner: Runner, running: Running, event: dict[str, Any], say: Say) -> bool:
        """Note what happened to a job; whether that ended it with a record."""
        if "device" in event:
            running.device = event["device"]
        elif "point" in event:
            running.points.append(event)
            if self._is_hopeless(running):
                runner.stop(running.job.number)
                self._end(running, None, say)
                return True
        else:
            runner.stop(running.job.number)
            if "died" not in event:
                self._end(running, event.get("error"), say)
                return True
            self._died(runner, running, say)
        return False

    def _is_hopeless(self, running: Running) -> bool:
        """Whether successive halving stops a run here."""
        point = running.points[-1]
        if running.trial is None or not self.config.halving:
            return False
        running.trial.report(point["valid_loss"], point["point"])
        return point["point"] < POINTS and running.trial.should_prune()

    def _died(self, runner: Runner, running: Running, say: Say) -> None:
        """Start a job again whose worker is gone; `_start` gives up after `ATTEMPTS` times."""
        del self._running[running.job.number]
        say(f"{running.job.candidate}: its process died; it is tried again")
        if running.trial is not None:
            self._put_back(running.trial, running.attempt)
        elif running.attempt < ATTEMPTS:
            self._begin(runner, Running(running.job, running.size, None, running.attempt + 1))
        else:
            raise SearchError(f"the process of the dense model, which sets the budget, died {ATTEMPTS} times")

    def _end(self, running: Running, error: str | None, say: Say) -> None:
        """Keep the record of a job that ended."""
        number = running.job.number
        self._running.pop(number, None)
        budget = None if running.trial is None and self.config.equal == "seconds" else self._budget()
        record = record_of(self.config, self.task, running, budget, self.command, error)
        text = json.dumps(record, allow_nan=False)
        if running.trial is None:
            if error is not None:
                raise SearchError(f"the dense model, which sets the budget, failed: {error}")
            self.study.set_user_attr("dense", text)
        else:
            running.trial.set_user_attr("record", text)
            self._tell(number, record)
        say(_line(number, record))

    def _tell(self, number: int, record: Record) -> None:
        values = [record["metrics"][METRICS[name]] for name in self.config.minimise]
        if record["status"] == "failed":
            self.study.tell(number, state=TrialState.FAIL)
        elif record["config"]["stopped"]:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, [float(value) for value in values if value is not None])


def _sampler(config: Config, drawn: int) -> optuna.samplers.BaseSampler:
    """The sampler of a search that has ``drawn`` trials already, which shift the seed so that none comes twice."""
    seed = config.seed + drawn
    if config.sampler in ("grid", "random"):
        return optuna.samplers.RandomSampler(seed=seed)
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.CmaEsSampler(seed=seed)


def _name(trial: FrozenTrial) -> str:
    name: str = json.loads(trial.user_attrs["record"])["name"]
    return name


def _line(number: int, record: Record) -> str:
    name = "dense model" if number == DENSE else f"trial {number}, {record['name']}"
    if record["status"] == "failed":
        return f"{name}: failed: {record['error']}"
    config, metrics = record["config"], record["metrics"]
    share = f", {metrics['budget_share']:.0%} of the budget" if metrics["budget_share"] is not None else ""
    stopped = "stopped early, " if config["stopped"] else ""
    return (
        f"{name}: {stopped}loss {record['series']['valid_loss'][-1]:.4f} at width {config['width']}, "
        f"{metrics['steps']} steps, {metrics['train_seconds']:.1f} s{share}"
    )
