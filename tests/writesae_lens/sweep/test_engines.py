"""Every engine gives the rows of steps in order, also when workers are killed or a node leaves."""

import threading
import time

import pandas as pd
import psutil
import pytest

from tests.writesae_lens.sweep import notes
from writesae_lens.sweep import sweep

pytestmark = pytest.mark.slow
CELLS = [(0, 1), (1, 1), (3, 0)]
SMALL = {
    "training_tokens": 8_000,
    "context_size": 64,
    "n_batches_in_buffer": 8,
    "experiments": {"replace": {"horizon": 4, "max_firings": 24}},
    "max_passages": 4,
    "verbose": False,
}


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    return without_seconds(sweep("tiny-gdn", CELLS, tmp_path_factory.mktemp("in order"), **SMALL).cells)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Of the notes that the workers take."""
    # Ray lets a process that has started one local cluster into no other without the same token.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with notes.noted(tmp_path / "notes"):
        yield tmp_path / "notes"


def without_seconds(table):
    return table.drop(columns=[name for name in table if name.endswith("seconds")])


class Meanwhile:
    """Calls functions, once each and in a thread, when a worker has been in a step of theirs for a moment."""

    def __init__(self, path, *calls):
        self.notes, self._stop = [], threading.Event()
        self._path, self._calls = path, list(calls)
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _wait(self):  # until the end: nodes of Ray that a thread has started end with it
        while not self._stop.wait(0.1):
            if not self._calls:
                continue
            which, call = self._calls[0]
            for note in unended(notes.read(self._path)):
                if which(note) and time.time() > note["time"] + 0.5 and psutil.pid_exists(note["pid"]):
                    self.notes.append(note)
                    self._calls.pop(0)
                    call(note)
                    break


def unended(written):
    """Notes of what began and has not ended."""
    ended = [(note["pid"], note["what"], note["cells"]) for note in written if note["event"] == "end"]
    begun = [note for note in written if note["event"] == "begin"]
    return [note for note in begun if (note["pid"], note["what"], note["cells"]) not in ended]


def assert_each_ended_once(path):
    """Every training and test ended once, and nothing began that had ended; returns what did not end."""
    written, done = notes.read(path), set()
    for note in written:
        of_cells = {(note["what"], cell) for cell in note["cells"]}
        assert not of_cells & done, f"{note} after it was finished"
        done |= of_cells if note["event"] == "end" else set()
    assert done == {(what, f"L{layer}H{head}") for what in ("training", "replace") for layer, head in CELLS}
    return unended(written)


def kill(note):
    psutil.Process(note["pid"]).kill()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_worker_is_killed_in_a_training_and_one_in_a_test(engine, in_order, path, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    kills = [(lambda note, what=what: note["what"] == what, kill) for what in ("training", "replace")]
    with Meanwhile(path, *kills) as killed:
        done = sweep("tiny-gdn", CELLS, tmp_path / "out", engine=engine, workers=2, threads=1, **SMALL)
    pd.testing.assert_frame_equal(without_seconds(done.cells), in_order)
    assert not len(done.failed)
    assert len(killed.notes) == 2, "no worker was killed: the test shows nothing"
    assert assert_each_ended_once(path) == killed.notes


@pytest.fixture
def cluster(path, monkeypatch):
    """A Ray cluster with a worker node of one CPU; sweeps use it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # A node sets a handler of signals, which only the main thread may.
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda _: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_node_leaves_and_another_joins(in_order, path, cluster, tmp_path):
    """The node that trains is killed, and what is left is done on one that joins."""
    (leaving,) = cluster.worker_nodes

    def leave(note):
        cluster.remove_node(leaving, allow_graceful=False)
        cluster.add_node(num_cpus=1)

    with Meanwhile(path, (lambda note: note["node"] == leaving.node_id, leave)) as left:
        done = sweep("tiny-gdn", CELLS, tmp_path / "out", engine="ray", workers=3, **SMALL)
    pd.testing.assert_frame_equal(without_seconds(done.cells), in_order)
    assert not len(done.failed)
    assert len(left.notes) == 1, "no node left: the test shows nothing"
    assert assert_each_ended_once(path) == left.notes
    assert len({note["node"] for note in notes.read(path)}) == 2


def test_the_disk_of_a_node_is_full(in_order, path, cluster, tmp_path):
    """What fails there is done on the other node."""
    (full,) = cluster.worker_nodes
    cluster.add_node(num_cpus=1)
    notes.fill_disk(path, full.node_id)
    done = sweep("tiny-gdn", CELLS, tmp_path / "out", engine="ray", workers=3, **SMALL)
    pd.testing.assert_frame_equal(without_seconds(done.cells), in_order)
    assert not len(done.failed)
    failed = assert_each_ended_once(path)
    assert failed, "nothing failed: the test shows nothing"
    assert {note["node"] for note in failed} == {full.node_id}
    steps = [(note["what"], *note["cells"]) for note in failed]
    assert len(set(steps)) == len(steps), "a step failed there twice"
