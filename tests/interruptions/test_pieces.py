"""The pieces that all commands write with: results, progress, SAE folders, locks. Every point of each."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from hooked_models import HookedRecurrent
from hooked_models.files.whole_files import replacing, whole_folder, write_whole
from tests.interruptions.harness import FINISHED, REFUSED, contents, end_of, restore, some
from tests.writesae_lens.cli.command_line import run
from writesae_lens import (
    WriteSAE,
    WriteSAEConfig,
    WriteSAEError,
    WriteSAETrainingConfig,
    WriteTrainingSAE,
    locks,
)
from writesae_lens.experiments import ExperimentResult, sign_test
from writesae_lens.experiments.result import Progress
from writesae_lens.locks import LOCK, locked
from writesae_lens.saelens.saving import check_checkpoint, newest_checkpoint

MODELS = {"tiny-gdn": (1, 2), "tiny-mamba2": (4, 4), "tiny-rwkv7": (1, 1)}


def result(rate: float, n: int) -> ExperimentResult:
    records = pd.DataFrame({"atom": range(n), "kl": [rate] * n})
    return ExperimentResult(
        "mine", records, {"experiment": "erase", "win_rate": rate, "n": n, "headline": ""}
    )


def sae(seed: int, training: bool = False) -> Any:
    torch.manual_seed(seed)
    if training:
        return WriteTrainingSAE(WriteSAETrainingConfig(d_k=4, d_v=6, d_sae=8, k=2))
    return WriteSAE(WriteSAEConfig(d_k=4, d_v=6, d_sae=8, k=2))


def save_folder(content: str) -> Callable[[Path], None]:
    def save(out: Path) -> None:
        with whole_folder(out / "checkpoint") as beside:
            for name in ("a", "b/c"):
                (beside / name).parent.mkdir(exist_ok=True)
                (beside / name).write_text(content * 100)

    return save


# What is saved: over an earlier one, by a function of the folder; and the file without which nothing is read.
SAVES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "result": (result(0.9, 400).save, result(0.1, 300).save),
    "SAE": (sae(0).save_model, sae(1).save_model),
    "training SAE": (sae(0, True).save_inference_model, sae(1, True).save_inference_model),
    "folder": (save_folder("old"), save_folder("new")),
    "file": (
        lambda out: write_whole(out / "x", lambda path: path.write_text("old" * 99)),
        lambda out: write_whole(out / "x", lambda path: path.write_text("new" * 99)),
    ),
}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: x for name, x in contents(folder).items() if not f"/{name}".count("/.")}


@pytest.mark.parametrize("kind", SAVES)
def test_killed_anywhere_no_file_of_the_new_one_is_beside_one_of_the_old(kind: str, tmp_path: Path) -> None:
    earlier, now = SAVES[kind]
    out = tmp_path / "out"
    out.mkdir()
    earlier(out)
    old = contents(out)
    undisturbed = end_of(lambda: now(out), tmp_path)
    new = contents(out)
    assert undisturbed.status == FINISHED, undisturbed.said
    assert old.keys() == new.keys()
    assert old != new
    for number in range(1, len(undisturbed.operations) + 1):
        restore(out, old)
        assert end_of(lambda: now(out), tmp_path, kill_at=number).status is None
        seen = visible(out).items()
        assert seen <= old.items() or seen <= new.items(), number
        if kind == "result":
            try:
                back = ExperimentResult.load(out)
            except WriteSAEError:
                continue
            assert (back.summary["win_rate"], len(back.records)) in ((0.9, 400), (0.1, 300))
        with locked(out):
            now(out)
        assert contents(out) == new  # and nothing is left


@pytest.mark.parametrize("kind", SAVES)
def test_on_a_full_disk_the_old_one_stays(kind: str, tmp_path: Path) -> None:
    earlier, now = SAVES[kind]
    out = tmp_path / "out"
    out.mkdir()
    earlier(out)
    old = contents(out)
    undisturbed = end_of(lambda: now(out), tmp_path)
    limits: list[dict[str, int]] = [{"full_from": number} for number in undisturbed.creating()]
    limits += [{"largest": len(content) - 1} for content in contents(out).values()]
    for limit in limits:
        restore(out, old)
        end = end_of(lambda: now(out), tmp_path, **limit)
        assert end.status == REFUSED or "SafetensorError" in end.said, end
        assert str(out) in end.said or "SafetensorError" in end.said
        assert contents(out) == old


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        result(0.9, 4).save(tmp_path / "result")
        sae(0).save_model(tmp_path / "sae")
        sae(0, True).save_inference_model(tmp_path / "trained")
        with whole_folder(tmp_path / "checkpoint") as beside:
            sae(0).save_model(beside)
            (beside / "trainer_state.pt").touch(0o600)
        progress = Progress(tmp_path / "progress", {})
        progress.part(0, lambda: pd.DataFrame({"a": [1]}))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_result_takes_the_pictures_of_another_experiments_along(tmp_path: Path) -> None:
    result(0.9, 4).save(tmp_path)  # whose summary says "erase"
    for name in ("erase.png", "mine.png"):
        (tmp_path / name).write_bytes(b"PNG")
    result(0.1, 4).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png", "records.csv", "summary.json"}


TEXTS = ["a\nb", "=1", "# 3 rows\n"]


def parts(folder: Path, rows: int = 3) -> list[pd.DataFrame]:
    with locked(folder):
        progress = Progress(folder, {"seed": 0})
        return [
            progress.part(n, lambda n=n: pd.DataFrame({"n": [n] * rows, "text": TEXTS})) for n in range(3)
        ]


def test_progress_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "progress"
    undisturbed = end_of(lambda: parts(folder), tmp_path)
    whole = contents(folder)
    for number in range(1, len(undisturbed.operations) + 1):
        restore(folder, {})
        folder.rmdir() if folder.exists() else None
        assert end_of(lambda: parts(folder), tmp_path, kill_at=number).status is None
        frames = parts(folder)
        assert contents(folder) == whole
        for n, frame in enumerate(frames):
            assert frame.n.tolist() == [n] * 3


def test_a_part_that_is_cut_anywhere_is_computed_again(tmp_path: Path) -> None:
    expected = parts(tmp_path)
    path = tmp_path / "part_000001.csv"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        pd.testing.assert_frame_equal(parts(tmp_path)[1], expected[1])
        assert path.read_bytes() == content
    path.write_bytes(b"\0" * len(content))
    parts(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("left", ["", "{", '{\n  "seed"', "\0\0\0", "\udcff"])
def test_torn_settings_are_begun_anew_but_not_among_other_files(left: str, tmp_path: Path) -> None:
    expected = parts(tmp_path)
    (tmp_path / "settings.json").write_bytes(left.encode(errors="surrogateescape"))
    (tmp_path / "part_000001.csv").write_text("n,text\n7,of other settings\n# 1 rows\n")
    for name in ("settings.json.part", "part_000002.csv.part"):  # of an earlier version
        (tmp_path / name).write_text("{")
    for one, other in zip(parts(tmp_path), expected):
        pd.testing.assert_frame_equal(one, other)
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "settings.json").write_bytes(left.encode(errors="surrogateescape"))
    (tmp_path / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(WriteSAEError, match="is not empty, and holds no progress"):
        parts(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", MODELS)
def test_an_experiment_goes_on_wherever_it_was_killed(name: str, tmp_path: Path) -> None:
    model = HookedRecurrent.boot_transformers(name, device="cpu")
    tokens, folder = torch.arange(100, 132).reshape(2, 16), tmp_path / "progress"

    def work(folder: Path | None = folder) -> pd.DataFrame:
        place = None if folder is None else str(folder)
        return sign_test(
            model, MODELS[name], tokens, n_trials=2, progress_folder=place, verbose=False
        ).records

    expected = work(None)
    undisturbed = end_of(work, tmp_path)
    for number in some(range(1, len(undisturbed.operations) + 1), 3):
        restore(folder, {})
        assert end_of(work, tmp_path, kill_at=number).status is None
        pd.testing.assert_frame_equal(work(), expected)
        assert not list(folder.glob(".*"))


@contextmanager
def writer(folder: Path) -> Iterator[int]:
    """Another process that writes to a folder."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(folder):
            os.write(writing, b".")
            threading.Event().wait()
    os.read(reading, 1)
    try:
        yield child
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_one_run_a_folder_until_it_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    expected = f"another run is writing to {folder}"
    with writer(folder):
        for call in (lambda: result(0.9, 3).save(folder), lambda: Progress(folder, {})):
            with pytest.raises(WriteSAEError, match=expected):
                call()
        done = run("sign", "--cell", "1:2", "--model", "tiny-gdn", "--max-passages", 1, "--out", folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.strip().splitlines()[-1].startswith(f"writesae-lens: {expected}: wait")
    assert (folder / LOCK).exists()  # the dead one's
    result(0.9, 3).save(folder)
    assert {path.name for path in folder.iterdir()} == {"records.csv", "summary.json"}


def test_locks_nest_in_a_thread_and_keep_other_threads_out(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except WriteSAEError as error:
            refused.append(str(error))

    with locked(tmp_path / "out"), locked(tmp_path / "out" / "progress"), locked(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other()
    assert len(refused) == 1
    assert not (tmp_path / "out").exists()  # nothing was written there


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    def killed() -> None:
        with locked(tmp_path), replacing(tmp_path) as beside:
            (beside / "x").write_text("new")
            os.kill(os.getpid(), 9)

    assert end_of(killed, tmp_path).status is None
    for name in (".hidden", "x.part", ".part", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with locked(tmp_path):
        assert len(list(tmp_path.iterdir())) == 5  # these and the lock
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "x.part", ".part", "notes.txt"}


def test_without_the_systems_locks_nothing_is_left_either(tmp_path: Path, monkeypatch: Any) -> None:
    """As on Windows, which has no fcntl, and removes no file that is open."""
    opened: set[int] = set()
    unlink, open_file, close = Path.unlink, os.open, os.close

    def opening(*arguments: Any, **options: Any) -> int:
        descriptor = open_file(*arguments, **options)
        opened.add(descriptor)
        return descriptor

    def closing(descriptor: int) -> None:
        opened.discard(descriptor)
        close(descriptor)

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        assert not opened, "the file is open"
        unlink(path, missing_ok)

    monkeypatch.setattr(locks, "fcntl", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opening)
        patch.setattr(os, "close", closing)
        patch.setattr(Path, "unlink", unlinking)
        with locked(tmp_path / "out"):
            (tmp_path / "out" / "x").touch()
    assert contents(tmp_path) == {"out/x": b""}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on another disk than ``tmp_path``."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_subfolder_may_be_a_link_to_another_disk(tmp_path: Path, elsewhere: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sae").symlink_to(elsewhere)
    for content in ("old", "new"):
        with replacing(out, ("cfg.json",)) as beside:
            (beside / "sae").mkdir()
            for name in ("sae/cfg.json", "sae/weights", "page"):
                (beside / name).write_text(content)
        assert contents(elsewhere) == {"cfg.json": content.encode(), "weights": content.encode()}
        assert (out / "page").read_text() == content
    assert {path.name for path in out.iterdir()} == {"page", "sae"}


def test_a_folder_in_the_place_of_a_file_leaves_the_old_result(tmp_path: Path) -> None:
    result(0.9, 4).save(tmp_path)
    (tmp_path / "picture.png").mkdir()
    old = contents(tmp_path)
    refused = pytest.raises(IsADirectoryError, match="picture")
    with refused, replacing(tmp_path, ("summary.json",)) as beside:
        for name in ("picture.png", "records.csv", "summary.json"):
            (beside / name).write_text("new")
    assert contents(tmp_path) == old


def checkpoint(folder: Path) -> Path:
    sae(0).save_model(folder)
    torch.save({"optimizer": torch.zeros(9)}, folder / "trainer_state.pt")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null}')
    content = (folder / "sae_weights.safetensors").read_bytes()
    for name in ("activations_store_state.safetensors", "sparsity.safetensors"):
        (folder / name).write_bytes(content)
    return folder


def test_a_checkpoint_with_any_file_torn_is_refused_and_never_named(tmp_path: Path) -> None:
    good, bad = checkpoint(tmp_path / "ck" / "100"), checkpoint(tmp_path / "ck" / "200")
    check_checkpoint(bad, [""])
    os.utime(good, (1, 1))
    assert newest_checkpoint(tmp_path / "ck", [""]) == bad
    for path in sorted(bad.iterdir()):
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            with pytest.raises(WriteSAEError, match=f"{path.name} is missing or damaged"):
                check_checkpoint(bad, [""])
            assert newest_checkpoint(tmp_path / "ck", [""]) == good
        path.unlink()
        if path.name not in ("cfg.json", "sparsity.safetensors"):  # which SAELens does not read
            with pytest.raises(WriteSAEError, match=f"{path.name} is missing or damaged"):
                check_checkpoint(bad, [""])
        path.write_bytes(content)
    with pytest.raises(WriteSAEError, match=r"trainer_state\.pt is missing"):
        check_checkpoint(good, ["L1H2", "L1H3"])  # of a run of several SAEs
