"""What the workers of a sweep do, as they note it: every training and test of a cell that begins and ends.

Within `noted`, workers run a step by `run_noted_step`, which writes a line to a file before and after each
training and test that is really run. `fill_disk` names a node of Ray whose workers can write no large files.
"""

import json
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from writesae_lens.experiments.result import SUMMARY
from writesae_lens.sweep import engines, work
from writesae_lens.sweep.store import name_of

NOTES = "WRITESAE_TEST_NOTES"
_run_step, _in_worker, _on_node = work.run_step, engines._in_worker, engines._on_node


@contextmanager
def noted(path):
    """Let the workers of sweeps in this block take notes; their environment is that of this process."""
    with (
        mock.patch.dict(os.environ, {NOTES: str(path)}),
        mock.patch.object(engines, "_in_worker", _in_noted_worker),
        mock.patch.object(engines, "_on_node", _on_noted_node),
    ):
        yield


def read(path):
    """The notes so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def fill_disk(path, node):
    """Let workers of this node fail to write files of more than 100 KB, by a limit of the system."""
    Path(f"{path}.full").write_text(node)


def run_noted_step(job, step, device, threads):
    full = Path(f"{os.environ[NOTES]}.full")
    if full.is_file() and full.read_text() == _node():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    train, run = work.train_cells, work._run

    def training(model, cells, *args, **kwargs):
        with _noted("training", [name_of(cell) for cell in cells]):
            return train(model, cells, *args, **kwargs)

    def testing(job, experiment, options, model, sae, out, times):
        if (out / SUMMARY).is_file():
            return run(job, experiment, options, model, sae, out, times)
        with _noted(experiment.name, [out.parent.name]):
            return run(job, experiment, options, model, sae, out, times)

    with mock.patch.object(work, "train_cells", training), mock.patch.object(work, "_run", testing):
        return _run_step(job, step, device, threads)


def _in_noted_worker(step):
    with mock.patch.object(engines, "run_step", run_noted_step):
        return _in_worker(step)


def _on_noted_node(*arguments):
    with mock.patch.object(engines, "run_step", run_noted_step):
        return _on_node(*arguments)


@contextmanager
def _noted(what, cells):
    _note("begin", what, cells)
    yield
    _note("end", what, cells)


def _note(event, what, cells):
    about = {"event": event, "what": what, "cells": cells, "pid": os.getpid(), "node": _node()}
    with Path(os.environ[NOTES]).open("a") as file:  # a short line is written at once, whoever else writes
        file.write(json.dumps(about | {"time": time.time()}) + "\n")


def _node():
    """The node of Ray that this process is a worker of."""
    try:
        import ray
    except ImportError:
        return None
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
