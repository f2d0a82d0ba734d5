"""A sweep: one SAE and the same experiments for every cell of a model, on one machine or a cluster."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens.cells import listed_cells, parse_cells
from writesae_lens.errors import INTERRUPTIONS, WriteSAEError
from writesae_lens.experiments.options import Count, Positive, Seed, check
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.saelens.runner import RUNNER_DEFAULTS, sized, train_cells
from writesae_lens.saes.config import RECOMMENDED_SCHEDULE, WriteSAETrainingConfig
from writesae_lens.sweep.engines import Engine, InOrder, Processes, Ray
from writesae_lens.sweep.plan import Group, Needs, describe, free_bytes, plan_groups
from writesae_lens.sweep.store import SWEEP, CellKey, Store
from writesae_lens.sweep.work import Held, Job, Step, Test, Train, check_experiment, failure

EngineName = Literal["local", "ray"]
DEFAULT_EXPERIMENTS = ("replace",)
# Options of the experiments of a sweep, where they differ from the experiments' own defaults: writes are read
# by later tokens too, and all cells of a model are to be tested in about the time of their training.
OPTIONS: dict[str, dict[str, Any]] = {"replace": {"horizon": 32, "max_firings": 256}}
# The share of a text, from its end, that experiments read and SAEs are not trained on.
TEST_SHARE = 0.1
# Arguments of `train_cells` that a sweep has others for, or no use.
SET_BY_THE_SWEEP = {"model", "cells", "output_path", "sae", "text", "options", "hook_name", "checkpoint_path"}
SET_BY_THE_SWEEP |= {"n_checkpoints", "resume_from_checkpoint", "from_pretrained_path", "llm_device"}
# What a folder's note of its trainings leaves out: where they run and what they log, what stands beside it;
# and of an SAE's configuration its device and what is each cell's own.
_OF_NO_EFFECT = {"device", "act_store_device", "logger", "verbose", "wandb_run_per_cell"}
_OF_NO_EFFECT |= {"model_name", "text", "training_tokens", "seed"}
_NOT_OF_THE_RECIPE = {"d_k", "d_v", "d_in", "device", "metadata"}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep has in its folder.

    Args:
        out: the folder or address.
        cells: the table, a row a finished cell (cells.csv).
        failed: steps of the cells and experiments asked for that failed: layer, head, step, reason.
            failed.csv has those of other calls too.
    """

    out: str
    cells: pd.DataFrame
    failed: pd.DataFrame


def sweep(
    model_name: str,
    cells: str | Sequence[Cell | CellKey] = "*:*",
    out: str | Path = "writesae-sweep",
    engine: EngineName = "local",
    workers: int = 1,
    threads: int | None = None,
    reports: bool = False,
    verbose: bool = True,
    **settings: Any,
) -> Sweep:
    """Train an SAE on every cell of a model and run the same experiments on each.

    Cells that fit into memory together are trained from the same forward passes. Each cell's row of the table
    is written when the cell is finished. The same call goes on where a stopped or failed one was: what is
    finished is not done again, and what failed is tried again. Further cells and experiments may be asked for
    in the same folder, on another device or engine too; everything else must stay.

    Args:
        model_name, cells, out: as in `plan_sweep`. Workers on other machines must reach ``out``.
        engine: ``local``: this machine. ``ray``: the cluster that the variable RAY_ADDRESS names, else one of
            this machine that is started for the sweep; needs Ray (``pip install 'writesae-lens[cluster]'``).
        workers: processes that share the steps, each with a model of its own. On a cluster: how many groups
            there are for; its resources decide how many run at once.
        threads: of a worker's CPU (None: this machine's cores, divided among the workers; on a cluster 1).
        reports: also write each cell's report page, in reports/.
        verbose: show a progress bar.
        **settings: what is done at every cell, as in `plan_sweep`: training_tokens, context_size, text,
            experiments, sae, memory, max_passages, device, seed, and further arguments of `train_cells`.

    Returns:
        the table, and what failed.

    Raises:
        WriteSAEError: no such experiment or engine; no text; a folder with another sweep in it; a cell that
            takes more memory than there is; Ctrl-C, with a message that says how to go on.
        HookedModelError: the model cannot be loaded, or has no such cells.
    """
    if Store(out).is_memory and (engine != "local" or workers != 1):
        raise WriteSAEError(f"{out} is in the memory of one process: give a folder, or workers=1")
    planned = plan_sweep(model_name, cells, out, workers=workers, **settings)
    # The text of the plan holds a model: the workers load their own, so let this one go.
    planned = dataclasses.replace(planned, job=dataclasses.replace(planned.job, reports=reports), about=str)
    job, store = planned.job, Store(planned.job.out)
    store.write_json(SWEEP, _settings(store, planned))
    made = _engine(engine, job, workers, threads)
    try:
        held = _run(store, job, planned, made, verbose)
    except INTERRUPTIONS as error:
        raise WriteSAEError(f"interrupted; the same call goes on where it stopped ({store})") from error
    finally:
        made.close()
    if held:
        named = ", ".join(f"{layer}:{head}" for layer, head in held[:8]) + ", ..." * (len(held) > 8)
        warnings.warn(
            f"another run is writing the cells {named}, which are left to it ({len(held)} in all); the same "
            "call, once it has ended, does what is missing",
            ResultWarning,
            stacklevel=2,
        )
    table, failed = store.write_tables()
    asked = [
        n
        for n, (layer, head, step) in enumerate(zip(failed.layer, failed["head"], failed.step))
        if (layer, head) in planned.cells and step in _steps(job)
    ]
    return Sweep(str(store), table, failed.iloc[asked].reset_index(drop=True))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep is going to do; its text says what that takes (``str``).

    Args:
        job: what is done at every cell.
        cells: all that are asked for.
        groups: of those that have no SAE yet, as they are trained together.
        architecture: of the cells.
        about: the text.
    """

    job: Job
    cells: list[CellKey]
    groups: list[Group]
    architecture: str
    about: Callable[[], str]

    def __str__(self) -> str:
        return self.about()


def plan_sweep(
    model_name: str,
    cells: str | Sequence[Cell | CellKey] = "*:*",
    out: str | Path = "writesae-sweep",
    training_tokens: int = zoo.TRAINING_TOKENS,
    context_size: int = 256,
    text: str | None = None,
    experiments: Sequence[str] | Mapping[str, Mapping[str, Any]] = DEFAULT_EXPERIMENTS,
    sae: TrainingSAEConfig | None = None,
    workers: int = 1,
    memory: float | None = None,
    max_passages: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Plan:
    """What `sweep` would do with the same settings, which it does not: ``print(plan_sweep(...))``.

    Args:
        model_name: a model that ships, a hub id, or a folder.
        cells: as in `parse_cells` (``"*:*"``), or (layer, head) pairs.
        out: folder of the SAEs (``L1H3``, in SAELens's format), results/, cells.csv, cells.parquet and, if a
            step fails, failed.csv; or an address that fsspec knows.
        training_tokens: writes that each SAE is trained on.
        context_size: tokens of a passage, in training and in tests.
        text: to train and test on: the last tenth of it is for the tests, unless the option ``dataset_path``
            names another text to train on. None: the shipped text, with shipped models.
        experiments: names, or options of each experiment by its name; those of one SAE (`check_experiment`).
        sae: config of the SAEs, whose sizes become each cell's (None: `WriteSAETrainingConfig.recommended`).
        workers: as in `sweep`.
        memory: GiB that the model and a training may take in a worker (None: the free memory, divided).
        max_passages: that each experiment reads, at most (None: as many as its command does).
        device: of models and SAEs; with ``cuda`` the workers of this machine share out its GPUs.
        seed: of training and experiments.
        **options: further arguments of `train_cells`.

    Raises:
        WriteSAEError, HookedModelError: as `sweep`.
    """
    check(Count, training_tokens=training_tokens, context_size=context_size, workers=workers)
    check(Count | None, max_passages=max_passages)
    check(Positive | None, memory=memory)
    check(Seed, seed=seed)
    check(Literal["write", "state"], site=options.get("site", "write"))
    _check_options(options)
    chosen = _experiments(experiments)
    kwargs = dict(options.get("model_from_pretrained_kwargs") or {})
    first = "cuda:0" if device == "cuda" else device
    model = HookedRecurrent.boot_transformers(model_name, device=first, **kwargs)
    wanted = parse_cells(model, cells) if isinstance(cells, str) else listed_cells(model, cells)
    store = Store(out)
    train_text, test_text, name = _texts(model_name, text, options.get("dataset_path"))
    _check_lengths(model, train_text, test_text, context_size)
    training = {
        "training_tokens": training_tokens,
        "context_size": context_size,
        "text": train_text,
        "seed": seed,
        "device": device,
        "model_name": model_name,
        **options,
    }
    if train_text is not None and not options.get("dataset_path"):
        training["dataset_path"] = zoo.TEXT_NAME if text is None else name
    job = Job(
        model_name, kwargs, str(store), sae, training, test_text, name, context_size, chosen, max_passages,
        False, seed, device,
    )  # fmt: skip
    make = WriteSAETrainingConfig.recommended if sae is None else None
    needs = Needs(
        (lambda cell: sized(sae, cell)) if make is None else (lambda cell: make(d_k=cell.d_k, d_v=cell.d_v)),
        options.get("site", "write"),
        context_size,
        {name: options[name] for name in RUNNER_DEFAULTS if name in options and name != "checkpoint_path"},
    )
    missing = [cell for cell in wanted if not store.has_sae((cell.layer, cell.head))]
    n_bytes = _bytes_of_a_training(model, device, memory, workers)
    groups = (
        plan_groups(missing, functools.partial(needs.n_bytes, model), n_bytes, workers) if missing else []
    )
    batch = (RECOMMENDED_SCHEDULE | dict(options.get("schedule") or {}) | options)["train_batch_size_tokens"]
    about = functools.partial(
        describe, model, groups, needs, training_tokens, batch, chosen, max_passages, workers
    )
    plan = Plan(job, [(c.layer, c.head) for c in wanted], groups, wanted[0].architecture, about)
    _settings(store, plan)  # refuses a folder of another sweep
    return plan


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that `train_cells` does not take, before anything is loaded."""
    fields = {f.name for f in dataclasses.fields(LanguageModelSAERunnerConfig) if f.init}
    known = (fields | set(inspect.signature(train_cells).parameters)) - SET_BY_THE_SWEEP
    if unknown := set(options) - known:
        raise WriteSAEError(f"sweep takes no {min(unknown)!r}: its options are those of train_cells")


def _experiments(
    experiments: Sequence[str] | Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Options of each experiment by its name."""
    if isinstance(experiments, str):
        raise WriteSAEError(f"experiments are a list of names, for example [{experiments!r}]")
    given = experiments if isinstance(experiments, Mapping) else {name: {} for name in experiments}
    chosen: dict[str, Mapping[str, Any]] = {}
    for name, options in given.items():
        experiment = check_experiment(name)
        unknown = set(options) - set(experiment.options)
        if unknown:
            raise WriteSAEError(
                f"{experiment.name} has no option {min(unknown)!r}: it has {', '.join(experiment.options)}"
            )
        chosen[experiment.name] = OPTIONS.get(experiment.name, {}) | dict(options)
    return chosen


def _texts(
    model_name: str, text: str | None, dataset_path: str | None
) -> tuple[list[str] | None, str, str | None]:
    """What SAEs are trained on (None: the data set that an option names), the text of the tests, its name."""
    if not isinstance(text, str | None):
        raise WriteSAEError(f"text is one string, got {type(text).__name__}: join documents with blank lines")
    if text is None:
        if model_name not in zoo.SHIPPED:
            raise WriteSAEError(f"{model_name} ships with no text: give --text, in Python text=...")
        return (None if dataset_path else zoo.documents("train")), zoo.text("test"), None
    if dataset_path:
        return None, text, "text"
    cut = text.rfind("\n", 0, round(len(text) * (1 - TEST_SHARE))) + 1 or round(len(text) * (1 - TEST_SHARE))
    return [text[:cut]], text[cut:], f"text, its last {TEST_SHARE:.0%}"


def _check_lengths(model: HookedRecurrent, train: list[str] | None, test: str, size: int) -> None:
    """Refuse texts without a single passage. Long ones are not counted: tokens have a few characters."""
    for what, text in (("train", "".join(train or ())), ("test", test)):
        if (what == "train" and train is None) or len(text) > 64 * size:
            continue
        n = len(model.to_tokens(text, prepend_bos=False, truncate=False)[0]) if text else 0
        if n < size:
            raise WriteSAEError(
                f"the text is too short to {what} on: that part of it has {n} tokens, while one passage has "
                f"{size}; give more text or a smaller context_size"
            )


def _bytes_of_a_training(model: HookedRecurrent, device: str, memory: float | None, workers: int) -> int:
    """Bytes that a worker's training may take beside its model."""
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters())
    if memory is not None:
        return int(memory * 2**30) - weights
    if device.startswith("cuda"):  # a worker a GPU; this process's model is there already
        return free_bytes(device)
    return (free_bytes(device) + weights) // workers - weights


def _settings(store: Store, planned: Plan) -> dict[str, Any]:
    """What the files of the folder depend on (sweep.json), with earlier experiments.

    Raises:
        WriteSAEError: of another sweep, or of the same one with other options of an experiment.
    """
    job = planned.job
    sae = WriteSAETrainingConfig.recommended(d_k=1, d_v=1) if job.sae is None else job.sae
    texts = [*(job.training["text"] or ()), job.test_text]
    about = {
        "model": job.model_name,
        "architecture": planned.architecture,
        "text": job.text_name or zoo.part_name("test"),
        "text_hash": hashlib.sha256("".join(texts).encode()).hexdigest()[:16],
        "sae": {
            name: value for name, value in _plain(sae.to_dict()).items() if name not in _NOT_OF_THE_RECIPE
        },
        "training_tokens": job.training["training_tokens"],
        "training": _plain(_noted(job.training)),
        "seed": job.seed,
    }
    tests = {
        name: _plain(dict(options)) | {"max_passages": job.max_passages}
        for name, options in job.experiments.items()
    }
    noted = store.read_json(SWEEP) or {}
    before = noted.pop("experiments", {})
    others = [name for name, value in about.items() if noted and noted.get(name) != value]
    others += [name for name, options in tests.items() if before.get(name, options) != options]
    if others:
        raise WriteSAEError(
            f"{store} holds a sweep with another {others[0]} (see {SWEEP}): go on with the same options, or "
            "give another folder"
        )
    return about | {"experiments": before | tests}


def _noted(training: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `train_cells` that an SAE depends on, where they are not the defaults of SAELens."""
    schedule = training.get("schedule")
    recipe = dict(RECOMMENDED_SCHEDULE if schedule is None else schedule)
    every = recipe | {name: value for name, value in training.items() if name != "schedule"}
    if schedule is None and "lr" in training:  # the last learning rate follows the first, by SAELens's rule
        every["lr_end"] = training.get("lr_end", training["lr"] / 10)
    fields = dataclasses.fields(LanguageModelSAERunnerConfig)
    defaults = {f.name: f.default for f in fields} | RUNNER_DEFAULTS | {"site": "write"}
    usual = {name for name, value in every.items() if name in defaults and defaults[name] == value}
    return {name: value for name, value in every.items() if name not in usual | _OF_NO_EFFECT}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; what it has not, as text."""
    return json.loads(json.dumps(dict(values), default=str, sort_keys=True))


def _engine(name: EngineName, job: Job, workers: int, threads: int | None) -> Engine:
    check(EngineName, engine=name)
    check(Count | None, threads=threads)
    if name == "ray":
        on_cluster = bool(os.environ.get("RAY_ADDRESS"))
        return Ray(job, workers, threads or (1 if on_cluster else _share(workers)))
    return InOrder(job, threads) if workers == 1 else Processes(job, workers, threads or _share(workers))


def _share(workers: int) -> int:
    """This machine's cores for each of the workers."""
    return max(1, len(os.sched_getaffinity(0)) // workers) if hasattr(os, "sched_getaffinity") else 1


def _steps(job: Job) -> set[str]:
    """What a row of failed.csv may say that failed, of what the call asks for."""
    return {"training", "tests", *job.experiments, *(["report"] if job.reports else [])}


def _run(store: Store, job: Job, planned: Plan, engine: Engine, verbose: bool) -> list[CellKey]:
    """Run every step that is not done, and keep the tables up to date.

    Returns:
        cells that are not done because another run was writing them.
    """
    rows = {(row["layer"], row["head"]): row for row in store.rows()}
    steps = [f"{name}_seconds" for name in job.experiments] + ["report_seconds"] * job.reports
    left = [
        cell for cell in planned.cells if any(step not in rows.get(cell, {}) for step in ["layer", *steps])
    ]
    to_train = [tuple((cell.layer, cell.head) for cell in group.cells) for group in planned.groups]
    untrained = {cell for cells in to_train for cell in cells}
    held: set[CellKey] = set()
    for cells in to_train:
        engine.submit(Train(cells))
    for cell in left:
        if cell not in untrained:
            engine.submit(Test(cell))
    total = len(untrained) + len(left)
    with tqdm(total=total, desc="cells trained and tested", unit="step", disable=not verbose) as bar:
        for step, outcome in engine.outcomes():
            left_out = outcome.args if isinstance(outcome, Held) else ()
            held = held.difference(step.cells) | {*left_out}
            failures = _failures(store, step, outcome)
            for cell in set(step.cells).difference(left_out):
                of_cell = [row for row in failures if (row["layer"], row["head"]) == cell]
                if of_cell or isinstance(step, Test):
                    store.note_failures(cell, of_cell, _steps(job))
            bar.update(len(step.cells))
            if failures or isinstance(step, Test):
                store.write_tables()
            if isinstance(step, Test):
                continue
            for cell in step.cells:
                if store.has_sae(cell):
                    engine.submit(Test(cell))
                else:
                    bar.update()
    return sorted(held)


def _failures(store: Store, step: Step, outcome: Any) -> list[dict[str, Any]]:
    """The rows of failed.csv of a step."""
    if isinstance(outcome, Held):
        return []
    if not isinstance(outcome, Exception):
        return outcome
    what = "training" if isinstance(step, Train) else "tests"
    lost = [cell for cell in step.cells if isinstance(step, Test) or not store.has_sae(cell)]
    return [failure(cell, what, outcome) for cell in lost]
