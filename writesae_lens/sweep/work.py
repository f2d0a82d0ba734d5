"""What a worker of a sweep does: train the SAEs of some cells from one forward pass, or test one cell.

Both are plain functions of picklable arguments, so that any engine can run them anywhere. Each looks first
for what is finished, so a step that is run again, after its worker died, does only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from sae_lens import SAE, TrainingSAEConfig
from safetensors import SafetensorError

from hooked_models import HookedRecurrent
from hooked_models.errors import one_line
from hooked_models.files.whole_files import write_whole
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import Experiment, find_experiment
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.passages import Passages, as_passages
from writesae_lens.experiments.result import SUMMARY, ExperimentResult, Progress
from writesae_lens.locks import locked
from writesae_lens.report.page import PAGE, make_report
from writesae_lens.saelens.runner import sized, train_cells
from writesae_lens.sweep.store import ROW, TIMES, CellKey, Store, name_of

# Characters of the training text that untrained baselines are made from: some 100,000 writes.
_BASELINE_CHARACTERS = 400_000


@dataclasses.dataclass(frozen=True)
class Job:
    """What a sweep does at every cell.

    Args:
        model_name, model_kwargs: for `HookedRecurrent.boot_transformers`.
        out: folder or address of the files.
        sae: config of the SAEs, whose sizes become each cell's (None: the recommended recipe).
        training: arguments of `train_cells` beside the model, cells, folders and SAEs.
        test_text, text_name: the text for the experiments and what results name it.
        context_size: tokens of its passages.
        experiments: options of each experiment by its name.
        max_passages: that an experiment reads, at most; None: as many as its command does.
        reports: whether each cell gets a report page.
        seed: of training and experiments.
        device: of model and SAEs.
    """

    model_name: str
    model_kwargs: Mapping[str, Any]
    out: str
    sae: TrainingSAEConfig | None
    training: Mapping[str, Any]
    test_text: str
    text_name: str | None
    context_size: int
    experiments: Mapping[str, Mapping[str, Any]]
    max_passages: int | None
    reports: bool
    seed: int
    device: str


@dataclasses.dataclass(frozen=True)
class Train:
    """A step: train the SAEs of these cells from the same forward passes."""

    cells: tuple[CellKey, ...]


@dataclasses.dataclass(frozen=True)
class Test:
    """A step: run every experiment on a cell's SAE."""

    cell: CellKey

    @property
    def cells(self) -> tuple[CellKey, ...]:
        return (self.cell,)


Step = Train | Test


class Held(Exception):
    """Another run is writing some of a step's cells (this error's arguments); the others are done."""


def run_step(job: Job, step: Step, device: str, threads: int | None) -> list[dict[str, Any]]:
    """Run a step on a worker.

    Args:
        job: of the sweep.
        step: to run.
        device: of this worker.
        threads: for torch, on the CPU (None: as many as it takes by itself).

    Returns:
        what failed, a row each: layer, head, step, reason. Other steps of the sweep go on.

    Raises:
        OSError: of the disk: the step is worth another try, on another machine.
        Held: another run is writing some of the cells.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResultWarning)  # they stand in each result, and on its page
        model = _model(job.model_name, tuple(job.model_kwargs.items()), device)
        if isinstance(step, Test):
            return _test(job, step, model, device)
        _train(job, step, model, device)
        return []


@functools.lru_cache(maxsize=1)
def _model(name: str, kwargs: tuple[tuple[str, Any], ...], device: str) -> HookedRecurrent:
    """The model, loaded once a worker."""
    return HookedRecurrent.boot_transformers(name, device=device, **dict(kwargs))


@functools.lru_cache(maxsize=1)
def _passages(model: HookedRecurrent, text: str, name: str | None, size: int, bos: bool) -> Passages:
    """The text's passages, cut once a worker."""
    return as_passages(model, text, size, bos, name)


def _train(job: Job, step: Train, model: HookedRecurrent, device: str) -> None:
    """Train the SAEs of the step's cells that are not there yet."""
    store = Store(job.out)
    missing = [cell for cell in step.cells if not store.has_sae(cell)]
    if not missing:
        return
    start = time.perf_counter()
    of_device = {"device": device, "llm_device": device} if device != job.device else {}
    try:
        with store.open(*map(name_of, missing)) as folders, ExitStack() as locks:
            held = _lock(locks, missing, folders)
            free = {
                cell: folder
                for cell, folder in zip(missing, folders, strict=True)
                if not (cell in held or store.has_sae(cell))  # another run may have just trained it
            }
            if free:
                train_cells(
                    model,
                    list(free),
                    list(free.values()),
                    sae=None if job.sae is None else functools.partial(sized, job.sae),
                    **{**job.training, **of_device},
                )
    except SafetensorError as error:  # what safetensors makes of an error of the disk while it writes
        raise OSError(f"the SAE could not be saved: {one_line(error)}") from error
    for cell in free:
        seconds = (time.perf_counter() - start) / len(free)
        times = {"training_seconds": seconds, "training_device": _kind(device)}
        store.write_json(f"results/{name_of(cell)}/{TIMES}", times)
    if held:
        raise Held(*held)


def _lock(locks: ExitStack, cells: Sequence[CellKey], folders: Sequence[Path]) -> list[CellKey]:
    """Lock the cells' folders; returns the cells whose folder another run has."""
    held = []
    for cell, folder in zip(cells, folders, strict=True):
        try:
            locks.enter_context(locked(folder))
        except WriteSAEError:
            held.append(cell)
    return held


def _test(job: Job, step: Test, model: HookedRecurrent, device: str) -> list[dict[str, Any]]:
    """Run the experiments that a cell has no results of, then its report; write the cell's row."""
    store, (layer, head) = Store(job.out), step.cell
    cell, name = model.cell(layer, head), name_of(step.cell)
    facts = {
        "layer": layer,
        "head": head,
        "architecture": cell.architecture,
        "d_k": cell.d_k,
        "d_v": cell.d_v,
    }
    figures: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []

    def attempt(what: str, run: Callable[[], None]) -> None:
        try:
            run()
        except OSError:  # of the disk: not for this cell alone
            raise
        except Exception as error:  # whatever it is, the other experiments and cells go on
            failed.append(failure(step.cell, what, error))

    with (
        store.open(f"results/{name}", f"reports/{name}", read_only=name) as (results, page, folder),
        ExitStack() as locks,
    ):
        if held := _lock(locks, [step.cell], [results]):
            raise Held(*held)
        sae, times = _load(folder, device, f"{store}/{name}"), _Times(results / TIMES)
        for each, options in job.experiments.items():
            experiment = find_experiment(each)

            def run(experiment: Experiment = experiment, options: Mapping[str, Any] = options) -> None:
                result = _run(job, experiment, options, model, sae, results / experiment.name, times)
                figures.update(_columns(experiment, result))

            attempt(experiment.name, run)
            times.seconds.setdefault(f"{experiment.name}_seconds", None)
        if job.reports and not failed and not (page / PAGE).is_file():
            attempt("report", lambda: _report(job, model, sae, folder, results, page, times))
        if (page / PAGE).is_file():
            times.seconds.setdefault("report_seconds", None)  # it may have been made by another command
    if not failed:
        earlier = store.read_json(f"results/{name}/{ROW}") or {}  # with other experiments
        row = facts | earlier | times.seconds | figures
        store.write_json(f"results/{name}/{ROW}", row | {"device": _kinds(times.training_device, device)})
    return failed


def _load(folder: Path, device: str, place: str) -> Any:
    """The SAE in a folder.

    Raises:
        WriteSAEError: it is damaged.
    """
    try:
        return SAE.load_from_disk(folder, device=device)
    except FileNotFoundError as error:
        reason = error
    except (OSError, MemoryError, torch.OutOfMemoryError):  # of the machine, not of the files
        raise
    except Exception as error:
        reason = error
    raise WriteSAEError(
        f"the SAE is damaged: remove {place}, and the same command trains it anew ({one_line(reason)[:100]})"
    ) from reason


def _kind(device: str) -> str:
    """``cuda`` of ``cuda:3``."""
    return device.partition(":")[0]


def _kinds(training: str | None, tests: str) -> str:
    """The devices of a cell's training and tests: ``cpu``, or ``cuda, tests on cpu``."""
    return _kind(tests) if training in (None, _kind(tests)) else f"{training}, tests on {_kind(tests)}"


def failure(cell: CellKey, step: str, error: Exception) -> dict[str, Any]:
    """A row of failed.csv."""
    reason = f"{type(error).__name__}: {one_line(error)[:300]}"
    return {"layer": cell[0], "head": cell[1], "step": step, "reason": reason}


class _Times:
    """Seconds of the steps of a cell, and the device of its training, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.training_device: str | None = noted.pop("training_device", None)
        self.seconds: dict[str, float | None] = {"training_seconds": None} | noted

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[f"{step}_seconds"] = time.perf_counter() - start
        text = json.dumps({"training_device": self.training_device} | self.seconds, indent=2)
        write_whole(self._path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _run(
    job: Job,
    experiment: Experiment,
    options: Mapping[str, Any],
    model: HookedRecurrent,
    sae: Any,
    out: Path,
    times: _Times,
) -> ExperimentResult:
    """The result of an experiment, which is run unless it is there."""
    if (out / SUMMARY).is_file():
        return ExperimentResult.load(out)
    parameters = inspect.signature(experiment.function).parameters
    trained_on = job.training.get("text") if job.text_name is not None else None  # the default: shipped text
    if trained_on and "train_tokens" in parameters:  # what untrained baselines are made from
        options = {"train_tokens": "\n\n".join(trained_on)[:_BASELINE_CHARACTERS], **options}
    progress = out / "progress"
    out.mkdir(parents=True, exist_ok=True)
    with times.of(experiment.name):
        result = experiment.function(
            model,
            [sae] if "saes" in parameters else sae,
            _cut(job, model, sae, experiment),
            seed=job.seed,
            progress_folder=str(progress),
            verbose=False,
            **options,
        )
        result.save(out)
    Progress.clear(progress)
    return result


def _columns(experiment: Experiment, result: ExperimentResult) -> dict[str, Any]:
    """The figures of merit of a result, and of its untrained baselines, by their columns of the table."""
    return {
        f"{experiment.name}_{path.removeprefix('baselines.').replace('.', '_')}": value
        for path, value in result.figures_of_merit().items()
        if value is None or isinstance(value, (int, float))
    }


def _cut(job: Job, model: HookedRecurrent, sae: Any, experiment: Experiment) -> Passages:
    """As many of the text's last passages as the experiment reads."""
    size = experiment.context_size or job.context_size
    bos = bool(sae.cfg.metadata.prepend_bos)
    passages = _passages(model, job.test_text, job.text_name, size, bos)
    return passages[-(job.max_passages or experiment.max_passages) :]


def _report(
    job: Job, model: HookedRecurrent, sae: Any, training: Path, results: Path, page: Path, times: _Times
) -> None:
    """The cell's own page, from its results; what it needs beside them is run."""
    saved = [ExperimentResult.load(path.parent) for path in sorted(results.glob(f"*/{SUMMARY}"))]
    passages = _cut(job, model, sae, find_experiment("contexts"))
    with times.of("report"):
        make_report(page, model, sae, passages, saved, training, seed=job.seed, verbose=False)


def check_experiment(name: str) -> Experiment:
    """The declared experiment, if it is about one SAE.

    Raises:
        WriteSAEError: there is none, it compares several SAEs, or it is about a whole model.
    """
    experiment = find_experiment(name)
    parameters = list(inspect.signature(experiment.function, eval_str=True).parameters.values())
    subject = parameters[1]
    takes_one = subject.name in ("sae", "sae_or_cell")
    takes_list = subject.name == "saes" and "Mapping" not in str(subject.annotation)
    if not (takes_one or takes_list):
        raise WriteSAEError(
            f"a sweep runs experiments on one cell at a time, and {experiment.name!r} is about several SAEs "
            f"or a whole model: run writesae-lens {experiment.name} by itself"
        )
    return experiment
