"""Every engine gives the rows of steps in order, also when a worker is killed in the middle."""

import threading
import time

import pandas as pd
import psutil
import pytest

from writesae_lens.sweep import sweep

pytestmark = pytest.mark.slow
CELLS = [(0, 1), (1, 1), (3, 0), (3, 2)]
SMALL = {
    "training_tokens": 20_000,
    "context_size": 64,
    "n_batches_in_buffer": 8,
    "experiments": {"replace": {"horizon": 4, "max_firings": 64}},
    "max_passages": 4,
    "verbose": False,
}


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    return without_seconds(sweep("tiny-gdn", CELLS, tmp_path_factory.mktemp("in order"), **SMALL).cells)


def without_seconds(table):
    return table.drop(columns=[name for name in table if name.endswith("seconds")])


def is_worker(process):
    try:
        name = " ".join(process.cmdline())
        return "spawn_main" in name or name.startswith(("ray::Train", "ray::Test"))
    except psutil.Error:
        return False


@pytest.fixture
def killed():
    """Kills one worker when the first has worked for a while; the list holds it then."""
    found, stop = [], threading.Event()

    def kill():
        while not stop.wait(0.5):
            working = [
                p
                for p in psutil.Process().children(recursive=True)
                if is_worker(p) and p.cpu_times().user > 8 and time.time() - p.create_time() > 8
            ]
            if working:
                working[0].kill()
                found.append(working[0].pid)
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield found
    stop.set()
    thread.join()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_worker_is_killed(engine, in_order, killed, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    done = sweep("tiny-gdn", CELLS, tmp_path, engine=engine, workers=2, threads=1, **SMALL)
    assert killed, "no worker was killed: the test shows nothing"
    pd.testing.assert_frame_equal(without_seconds(done.cells), in_order)
    assert not len(done.failed)
