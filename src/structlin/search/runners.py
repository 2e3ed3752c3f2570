"""Who trains: this process, one candidate after the other, or the machines of a Ray cluster, as many as have room.

Both take jobs and give back events in the order in which they happen: what `training.train` yields, then ``end``, or
``died`` where the process of a run is gone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol

from ..options import lacks
from ..train.config import OptionError
from .training import Job, outcome

Event = dict[str, Any]


class Runner(Protocol):
    """What a study needs of either."""

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job."""
        ...

    def event(self) -> tuple[int, Event]:
        """Wait for the next event of any job: its number and what happened."""
        ...

    def stop(self, number: int) -> None:
        """Drop a job, ended or not; no event of it follows."""
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...


class InProcess:
    """One job at a time, here."""

    slots = 1

    def __init__(self) -> None:
        self._runs: dict[int, Iterator[Event]] = {}

    def start(self, job: Job) -> None:
        """Begin a job; it computes in `event`."""
        assert not self._runs
        self._runs[job.number] = outcome(job)

    def event(self) -> tuple[int, Event]:
        """Compute up to the next event."""
        ((number, run),) = self._runs.items()
        return number, next(run, {"end": True})

    def stop(self, number: int) -> None:
        """Drop the job."""
        self._runs.pop(number)

    def close(self) -> None:
        """Drop what there is."""
        self._runs.clear()


class OnRay:
    """Jobs as tasks of Ray, each with a share of a GPU or of the CPUs.

    Args:
        address: "local" to start Ray on this machine, or the address of a cluster, as "auto" or "ray://HOST:10001".
        device: "cpu" or "cuda"; on a GPU Ray shows a job its own.
        share: CPU cores or GPUs of a job.

    Raises:
        OptionError: where Ray is not installed, the cluster is not there, or has no room for one job.
    """

    def __init__(self, address: str, device: str, share: float) -> None:
        if missing := lacks(("ray",), "ray"):
            raise OptionError("--ray", f"{missing}; or leave the option out")
        ray: Any = import_module("ray")
        if device not in ("cpu", "cuda"):
            raise OptionError("--ray", f"chooses the GPU of each job itself; allowed: --device cpu, cuda, not {device}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "ignore_reinit_error": True}
        try:
            if address == "local":
                ray.init(include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OptionError("--ray", f"{address}: {' '.join(str(error).split())}; allowed: local, or the address of "
                              "a running cluster") from None  # fmt: skip
        self._ray, self._share, self._kind = ray, share, "GPU" if device == "cuda" else "CPU"
        self._module: Any = import_module("ray.util.queue")
        self._queue = self._module.Queue(actor_options={"num_cpus": 0})
        self._tasks: dict[int, Any] = {}
        self._pending: deque[tuple[int, Event]] = deque()
        wanted: dict[str, float] = {"num_gpus": share, "num_cpus": 0} if device == "cuda" else {"num_cpus": share}
        self._task = ray.remote(max_retries=0, **wanted)(_work)
        if (there := self._there()) < share:
            self.close()
            raise OptionError("--ray", f"{address} has {there:g} {self._kind}s; a job needs {share:g}")

    @property
    def slots(self) -> int:
        """As many jobs as the cluster has shares, which may grow and shrink; one waits where it has none."""
        return max(1, int(self._there() / self._share + 1e-9))

    def start(self, job: Job) -> None:
        """Hand a job to Ray."""
        self._tasks[job.number] = self._task.remote(job, self._queue)

    def event(self) -> tuple[int, Event]:
        """Wait for the next event of any job."""
        while not self._pending:
            self._drain(0.2)
            if self._pending:
                break
            ended, _ = self._ray.wait(list(self._tasks.values()), timeout=0)
            if ended:
                self._drain(0.0)  # a job ends after its last event
                numbers = {task: number for number, task in self._tasks.items()}
                self._pending += [(numbers[task], self._end(task)) for task in ended]
        return self._pending.popleft()

    def stop(self, number: int) -> None:
        """Cancel a job."""
        self._ray.cancel(self._tasks.pop(number))
        self._pending = deque(event for event in self._pending if event[0] != number)

    def close(self) -> None:
        """Leave Ray, and end it where it was started here."""
        self._ray.shutdown()

    def _there(self) -> float:
        """GPUs or CPU cores of the cluster."""
        return float(self._ray.cluster_resources().get(self._kind, 0))

    def _drain(self, timeout: float) -> None:
        try:
            while True:
                wait = timeout if not self._pending else 0.0
                number, event = self._queue.get(block=wait > 0, timeout=wait or None)
                if number in self._tasks:
                    self._pending.append((number, event))
        except self._module.Empty:
            return

    def _end(self, task: Any) -> Event:
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return {"died": type(error).__name__}
        return {"end": True}


def _work(job: Job, queue: Any) -> None:
    for event in outcome(job):
        queue.put((job.number, event))
