"""Workers of this machine that die, and workers whose main process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from writesae_lens.sweep import engines, work

pytestmark = pytest.mark.slow
PLACE = "WRITESAE_TEST_PLACE"
DEADLY = (0, 0)
JOB = work.Job("no model", {}, "", None, {}, "", None, 64, {}, None, False, 0, "cpu")


def note_and_do(step):
    """What the workers of these tests do: note the cell, and die at one of them."""
    with Path(os.environ[PLACE]).open("a") as file:
        file.write(f"{step.cell[1]} {os.getpid()}\n")
    if step.cell == DEADLY:
        time.sleep(0.5)  # meanwhile the other worker is at something
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 if step.cell[1] == 9 else 0.2)
    return []


def begun(path):
    return [[int(n) for n in line.split()] for line in path.read_text().splitlines()]


def test_a_step_that_always_kills_its_worker_fails_and_no_other_does(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACE, str(tmp_path / "begun"))
    cells = [DEADLY, *((0, head) for head in range(1, 6))]
    with mock.patch.object(engines, "_in_worker", note_and_do):
        made = engines.Processes(JOB, 2, 1)
        for cell in cells:
            made.submit(work.Test(cell))
        outcomes = {step.cell: outcome for step, outcome in made.outcomes()}
        made.close()
    assert "died 3 times" in str(outcomes.pop(DEADLY))
    assert outcomes == {cell: [] for cell in cells[1:]}
    heads = [head for head, _ in begun(tmp_path / "begun")]
    assert sorted(heads) == [0, 0, 0, 1, 2, 3, 4, 5]  # the others once each


def in_a_main_process():
    """In a process of its own, which the test kills."""
    with mock.patch.object(engines, "_in_worker", note_and_do):
        made = engines.Processes(JOB, 1, 1)
        made.submit(work.Test((0, 9)))
        list(made.outcomes())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as POSIX does")
def test_no_worker_outlives_a_killed_main_process(tmp_path):
    path = tmp_path / "begun"
    script = tmp_path / "main.py"
    script.write_text(
        f"from {__name__} import in_a_main_process\nif __name__ == '__main__':\n    in_a_main_process()\n"
    )
    environment = os.environ | {PLACE: str(path), "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    main = subprocess.Popen([sys.executable, script], env=environment)
    try:
        until = time.monotonic() + 60
        while not path.is_file() and time.monotonic() < until:
            time.sleep(0.1)
        (_, worker) = begun(path)[0]
        assert psutil.pid_exists(worker)
    finally:
        main.kill()
        main.wait()
    for _ in range(100):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker still runs")
