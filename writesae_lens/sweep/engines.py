"""Where the steps of a sweep run: here one after another, in processes of this machine, or on a Ray cluster.

An engine gets steps and gives back each with what came of it, as they end; more may be added meanwhile. What
runs when is left to `concurrent.futures` and to Ray.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from writesae_lens.errors import WriteSAEError
from writesae_lens.sweep.work import Job, Step, Train, run_step

# How often a step is started again whose worker died, or on Ray whose disk failed.
_RETRIES = 2
_NO_BARS = "TQDM_DISABLE"
Outcome = list[dict[str, Any]] | Exception
"""What failed in a step, or the error that ended it."""


@runtime_checkable
class Engine(Protocol):
    """Runs steps."""

    def submit(self, step: Step) -> None:
        """Add a step."""
        ...

    def outcomes(self) -> Iterator[tuple[Step, Outcome]]:
        """Steps as they end, until none is left."""
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...


class InOrder:
    """Steps one after another in this process; a cell is tested before further ones are trained."""

    def __init__(self, job: Job, threads: int | None) -> None:
        self._job, self._threads = job, threads
        self._steps: list[Step] = []

    def submit(self, step: Step) -> None:
        self._steps.append(step)

    def outcomes(self) -> Iterator[tuple[Step, Outcome]]:
        while self._steps:
            step = min(self._steps, key=lambda step: (isinstance(step, Train), step.cells))
            self._steps.remove(step)
            try:
                yield step, run_step(self._job, step, self._job.device, self._threads)
            except Exception as error:
                yield step, error

    def close(self) -> None:
        self._steps.clear()


_of_worker: dict[str, Any] = {}


def _begin(device: str, job: Job, threads: int) -> None:
    """Start a worker process: the device that is its own, and the job."""
    _of_worker.update(device=device, job=job, threads=threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the main one has ended, however that was: a killed one ends no workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(step: Step) -> Outcome:
    return run_step(_of_worker["job"], step, _of_worker["device"], _of_worker["threads"])


class Processes:
    """Steps in worker processes of this machine, each with a device of its own where there are several GPUs.

    A worker that dies is replaced, and the step that it was at is started again, twice at most; then it has
    failed. Other workers go on. So that it is known which step a worker was at, each is a pool of one.
    """

    def __init__(self, job: Job, workers: int, threads: int) -> None:
        self._job, self._threads = job, threads
        self._context = multiprocessing.get_context("spawn")
        self._undo = contextlib.ExitStack()
        if _NO_BARS not in os.environ:  # for tqdm in the workers, whose bars would write over each other
            os.environ[_NO_BARS] = "1"
            self._undo.callback(os.environ.pop, _NO_BARS)
        with contextlib.suppress(ValueError):  # not in the main thread: whoever has that handles signals
            before = signal.signal(
                signal.SIGTERM, lambda *_: sys.exit(143)
            )  # so that `close` ends the workers
            self._undo.callback(signal.signal, signal.SIGTERM, before)
        self._workers = [self._new_worker(n) for n in range(workers)]
        self._waiting: deque[Step] = deque()
        self._running: dict[Future[Outcome], tuple[Step, int]] = {}
        self._deaths: Counter[Step] = Counter()

    def _new_worker(self, number: int) -> ProcessPoolExecutor:
        several = self._job.device == "cuda"
        device = f"cuda:{number % torch.cuda.device_count()}" if several else self._job.device
        return ProcessPoolExecutor(
            1, self._context, initializer=_begin, initargs=(device, self._job, self._threads)
        )

    def submit(self, step: Step) -> None:
        self._waiting.append(step)
        self._start()

    def _start(self) -> None:
        """Give steps that wait to workers that have none."""
        busy = {number for _, number in self._running.values()}
        for number in range(len(self._workers)):
            if number in busy or not self._waiting:
                continue
            try:
                future = self._workers[number].submit(_in_worker, self._waiting[0])
            except BrokenProcessPool:  # it died while it had no step
                self._replace(number)
                future = self._workers[number].submit(_in_worker, self._waiting[0])
            self._running[future] = (self._waiting.popleft(), number)

    def outcomes(self) -> Iterator[tuple[Step, Outcome]]:
        while self._running:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                (step, number), error = self._running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    self._replace(number)
                    self._deaths[step] += 1
                    if self._deaths[step] <= _RETRIES:
                        self._waiting.appendleft(step)
                        self._start()
                        continue
                    error = WriteSAEError(f"its worker died {self._deaths[step]} times; is memory short?")
                self._start()
                yield step, error if isinstance(error, Exception) else future.result()

    def _replace(self, number: int) -> None:
        """After a worker's death."""
        self._workers[number].shutdown(wait=True, cancel_futures=True)
        self._workers[number] = self._new_worker(number)

    def close(self) -> None:
        for _, number in self._running.values():  # stopped
            for process in list((self._workers[number]._processes or {}).values()):
                process.terminate()
        for worker in self._workers:
            worker.shutdown(wait=True, cancel_futures=True)
        self._undo.close()


class _DiskError(NamedTuple):
    """The error of the disk that ended a step, and the node of Ray that it ran on."""

    node: str
    error: OSError


def _on_node(job: Job, step: Step, device: str, threads: int) -> Outcome | _DiskError:
    """Run a step as a task of Ray."""
    try:
        return run_step(job, step, device, threads)
    except OSError as error:
        return _DiskError(import_ray().get_runtime_context().get_node_id(), error)


class Ray:
    """Steps as tasks of Ray: on the cluster of ``RAY_ADDRESS``, else on one that is started for the sweep.

    Ray starts a task again when its worker dies or its node leaves. A step that ends with an error of the
    disk is given to Ray again, for another node where there is one: the full one is always free first.
    Each task gets ``threads`` CPUs and, on GPUs, one of them. The job lies in Ray's object store.
    """

    def __init__(self, job: Job, workers: int, threads: int) -> None:
        ray = import_ray()
        self._ray, self._started = ray, not ray.is_initialized()
        on_gpu = job.device.startswith("cuda")
        if self._started:
            quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": "ERROR"}
            if os.environ.get("RAY_ADDRESS"):
                ray.init(**quiet)
            else:
                gpus = {"num_gpus": workers} if on_gpu else {}
                ray.init(address="local", num_cpus=workers * threads, **gpus, **quiet)
        self._job, self._threads = ray.put(job), threads
        self._device = "cuda" if on_gpu else job.device
        self._needs = {"CPU": threads, "GPU": int(on_gpu)}
        self._run: Any = ray.remote(num_cpus=threads, num_gpus=int(on_gpu), max_retries=3)(_on_node)
        self._pending: dict[Any, Step] = {}
        self._failed_on: defaultdict[Step, list[str]] = defaultdict(list)

    def submit(self, step: Step) -> None:
        task = self._run.options(name=str(step), scheduling_strategy=self._where(step))
        self._pending[task.remote(self._job, step, self._device, self._threads)] = step

    def _where(self, step: Step) -> Any:
        """Where a step is to run: anywhere, but on another node than those where the disk failed it."""
        failed_on = self._failed_on[step]
        if not failed_on:
            return "DEFAULT"
        others = [
            node["NodeID"]
            for node in self._ray.nodes()
            if node["Alive"]
            and node["NodeID"] not in failed_on
            and all(node["Resources"].get(name, 0) >= n for name, n in self._needs.items())
        ]
        if not others:
            return "DEFAULT"
        # Soft: should that node leave too, Ray takes any.
        strategies = self._ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(random.choice(others), soft=True)

    def outcomes(self) -> Iterator[tuple[Step, Outcome]]:
        while self._pending:
            (done,), _ = self._ray.wait(list(self._pending))
            step = self._pending.pop(done)
            try:
                outcome = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                outcome = error.cause
            except self._ray.exceptions.RayError as error:  # its worker died, or its node left, too often
                outcome = error
            if not isinstance(outcome, _DiskError):
                yield step, outcome
                continue
            self._failed_on[step].append(outcome.node)
            if len(self._failed_on[step]) > _RETRIES:
                yield step, outcome.error
            else:
                self.submit(step)

    def close(self) -> None:
        for task in self._pending:
            self._ray.cancel(task, force=True)
        if self._started:
            self._ray.shutdown()


def import_ray() -> Any:
    """Ray.

    Raises:
        WriteSAEError: it is not installed.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise WriteSAEError("--engine ray needs Ray: pip install 'writesae-lens[cluster]'") from error
    return ray
