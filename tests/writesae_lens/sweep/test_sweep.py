"""A sweep does what is done by hand for each cell, goes on where it stopped, and lists failures."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pandas as pd
import pytest
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run
from writesae_lens import WriteSAEError
from writesae_lens.cells import listed_cells
from writesae_lens.experiments import replacement_test
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import read_table
from writesae_lens.locks import locked
from writesae_lens.saelens.progress import update_bar
from writesae_lens.saelens.runner import train_cells
from writesae_lens.sweep import plan_sweep, sweep, work
from writesae_lens.sweep.store import Store

TOKENS, CELLS = 8_000, [(1, 1), (3, 0)]
OPTIONS = {"horizon": 4, "max_firings": 12}
SMALL = {
    "training_tokens": TOKENS,
    "context_size": 64,
    "n_batches_in_buffer": 8,
    "experiments": {"replace": OPTIONS},
    "max_passages": 2,
    "verbose": False,
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep("tiny-gdn", CELLS, out, **SMALL)


def test_rows_are_those_of_each_cell_by_hand(swept, tmp_path):
    out, done = swept
    model = HookedRecurrent.boot_transformers("tiny-gdn")
    table = read_table(out / "cells.csv")
    assert list(zip(table.layer, table["head"])) == CELLS
    for row in table.to_dict("records"):
        cell = (row["layer"], row["head"])
        (folder,) = train_cells(
            model, [cell], tmp_path / str(cell), TOKENS, context_size=64, n_batches_in_buffer=8
        )
        sae = SAE.load_from_disk(folder)
        passages = as_passages(model, zoo.text("test"), 64)[-2:]
        summary = replacement_test(model, sae, passages, **OPTIONS, verbose=False).summary
        lookup = next(row for row in summary["baselines"] if row["name"] == "lookup")
        for figure in ("median_recovered", "recovered_later", "win_rate", "bits"):
            assert row[f"replace_{figure}"] == pytest.approx(summary[figure], rel=1e-9), figure
        assert row["replace_lookup_recovered"] == pytest.approx(lookup["recovered"], rel=1e-9)
        assert (row["architecture"], row["d_k"], row["d_v"]) == ("gated_delta_net", 32, 48)
        assert row["training_seconds"] > 0
        assert row["replace_seconds"] > 0
    pd.testing.assert_frame_equal(pd.read_parquet(out / "cells.parquet"), done.cells)
    assert not len(done.failed)
    assert list(done.failed.columns[:3]) == ["layer", "head", "step"]
    assert not (out / "failed.csv").exists()
    assert (out / "L1H1" / "training.csv").exists()


def test_a_text_of_ones_own(tmp_path):
    """Its last tenth is tested on; the rest is trained on, and untrained baselines are made from it."""
    text = "\n".join(zoo.text("validation").splitlines()[:400])
    done = sweep("tiny-gdn", CELLS[:1], tmp_path, text=text, **SMALL)
    train = text[: text.rfind("\n", 0, round(0.9 * len(text))) + 1]
    model = HookedRecurrent.boot_transformers("tiny-gdn")
    passages = as_passages(model, text.removeprefix(train), 64)[-2:]
    sae = SAE.load_from_disk(tmp_path / "L1H1")
    result = replacement_test(model, sae, passages, train_tokens=train, **OPTIONS, verbose=False)
    (row,) = done.cells.to_dict("records")
    for path, value in result.figures_of_merit().items():
        assert row["replace_" + path.removeprefix("baselines.").replace(".", "_")] == value, path


def test_what_is_finished_is_not_done_again(swept, monkeypatch):
    out, done = swept

    def never(*args, **kwargs):
        raise AssertionError("done twice")

    monkeypatch.setattr(work, "train_cells", never)
    monkeypatch.setattr(work, "_test", never)
    again = sweep("tiny-gdn", CELLS, out, **SMALL)
    pd.testing.assert_frame_equal(again.cells, done.cells)


def test_another_device_goes_on_and_is_noted(swept, tmp_path, monkeypatch):
    """The GPU of this machine is made of paper: the models of a sweep on it are on the CPU."""
    out, done = swept
    assert set(done.cells.device) == {"cpu"}
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "results" / "L3H0" / "replace")
    (tmp_path / "out" / "results" / "L3H0" / "row.json").unlink()
    boot, load = HookedRecurrent.boot_transformers, SAE.load_from_disk
    monkeypatch.setattr(HookedRecurrent, "boot_transformers", lambda name, device, **k: boot(name, **k))
    monkeypatch.setattr(work.SAE, "load_from_disk", lambda folder, device: load(folder))
    again = sweep("tiny-gdn", CELLS, tmp_path / "out", **SMALL, device="cuda:1", memory=4.0)
    assert list(again.cells.device) == ["cpu", "cpu, tests on cuda"]


def test_another_sweep_is_refused(swept):
    out, _ = swept
    with pytest.raises(WriteSAEError, match=r"another training_tokens"):
        sweep("tiny-gdn", CELLS, out, **SMALL | {"training_tokens": 9_000})
    planned = {name: value for name, value in SMALL.items() if name != "verbose"}
    with pytest.raises(WriteSAEError, match=r"another model"):
        plan_sweep("tiny-mamba2", "0:0", out, **planned)
    with pytest.raises(WriteSAEError, match=r"another replace"):
        sweep("tiny-gdn", CELLS, out, **SMALL | {"experiments": {"replace": OPTIONS | {"horizon": 5}}})


def test_failures_are_listed_and_tried_again(tmp_path, monkeypatch):
    """The training of one cell and an experiment of another fail; the third is there, and then all are."""
    run, train, failing = work._run, work.train_cells, {(1, 1), "blocks.3.linear_attn.hook_write.0"}

    def training(model, cells, *args, **kwargs):
        if cells[0] in failing:
            raise WriteSAEError("no luck")
        return train(model, cells, *args, **kwargs)

    def testing(job, experiment, options, model, sae, *args):
        if sae.cfg.metadata.hook_name in failing:
            raise RuntimeError("broken\nin two lines")
        return run(job, experiment, options, model, sae, *args)

    monkeypatch.setattr(work, "train_cells", training)
    monkeypatch.setattr(work, "_run", testing)
    # Memory for one cell at a time.
    monkeypatch.setattr("writesae_lens.sweep.run._bytes_of_a_training", lambda *_: 1)
    monkeypatch.setattr("writesae_lens.sweep.plan.training_bytes", lambda size, cfgs, *_: len(cfgs))
    first = sweep("tiny-gdn", [*CELLS, (3, 1)], tmp_path, **SMALL)
    assert first.failed.to_numpy()[:, :3].tolist() == [[1, 1, "training"], [3, 0, "replace"]]
    assert first.failed.reason[0] == "WriteSAEError: no luck"
    assert first.failed.reason[1].startswith("RuntimeError: broken")
    assert "\n" not in first.failed.reason[1]
    pd.testing.assert_frame_equal(read_table(tmp_path / "failed.csv"), first.failed, check_dtype=False)
    assert list(zip(first.cells.layer, first.cells["head"])) == [(3, 1)]
    failing.clear()
    second = sweep("tiny-gdn", [*CELLS, (3, 1)], tmp_path, **SMALL)
    assert len(second.cells) == 3
    assert not len(second.failed)
    assert not (tmp_path / "failed.csv").exists()


def test_failures_that_a_call_does_not_ask_for(tmp_path, monkeypatch):
    """failed.csv has them, but they are none of the call's own."""
    monkeypatch.setattr(work, "_run", lambda *_: pytest.fail("not to be run"))
    store = Store(tmp_path)
    for cell, step in [((0, 0), "replace"), ((1, 1), "partition")]:
        store.note_failures(cell, [work.failure(cell, step, RuntimeError("earlier"))], {step})
    done = sweep("tiny-gdn", CELLS[:1], tmp_path, **SMALL | {"experiments": []})
    assert (len(done.cells), len(done.failed)) == (1, 0)
    assert read_table(tmp_path / "failed.csv").step.tolist() == ["replace", "partition"]


def test_cells_that_another_run_writes_are_left_to_it(swept, tmp_path):
    """One is trained elsewhere, one is tested elsewhere: neither has failed, and the third is done."""
    shutil.copytree(swept[0] / "L1H1", tmp_path / "L1H1")
    with ThreadPoolExecutor() as other, ExitStack() as locks:  # locks of one thread nest
        for folder in ("results/L1H1", "L3H1"):
            other.submit(locks.enter_context, locked(tmp_path / folder)).result()
        with pytest.warns(ResultWarning, match=r"writing the cells 1:1, 3:1, .* \(2 in all\)"):
            first = sweep("tiny-gdn", [*CELLS, (3, 1)], tmp_path, **SMALL | {"experiments": []})
        other.submit(locks.close).result()
    assert list(zip(first.cells.layer, first.cells["head"])) == [(3, 0)]
    assert not len(first.failed)
    assert not (tmp_path / "failed.csv").exists()
    assert len(sweep("tiny-gdn", [*CELLS, (3, 1)], tmp_path, **SMALL | {"experiments": []}).cells) == 3


def test_a_damaged_sae_is_named(swept, tmp_path):
    shutil.copytree(swept[0] / "L1H1", tmp_path / "L1H1")
    weights = tmp_path / "L1H1" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings = SMALL | {"experiments": []}
    for damage in (lambda: None, weights.unlink, lambda: (tmp_path / "L1H1" / "cfg.json").write_text("{")):
        damage()
        (reason,) = sweep("tiny-gdn", CELLS[:1], tmp_path, **settings).failed.reason
        assert f"the SAE is damaged: remove {tmp_path}/L1H1, and the same command" in reason
    shutil.rmtree(tmp_path / "L1H1")
    assert len(sweep("tiny-gdn", CELLS[:1], tmp_path, **settings).cells) == 1


def test_a_page_that_is_there_counts_as_done(swept, tmp_path, monkeypatch):
    shutil.copytree(swept[0], tmp_path / "out")
    for layer, head in CELLS:
        page = tmp_path / "out" / "reports" / f"L{layer}H{head}" / "report.html"
        page.parent.mkdir(parents=True)
        page.write_text("made by another command")
    done = sweep("tiny-gdn", CELLS, tmp_path / "out", reports=True, **SMALL)
    assert done.cells.report_seconds.isna().all()
    monkeypatch.setattr(work, "_test", lambda *_: pytest.fail("tested again"))
    assert len(sweep("tiny-gdn", CELLS, tmp_path / "out", reports=True, **SMALL).cells) == 2


@pytest.mark.parametrize("place", ["[1] a*b?", "memory://x[12]"])
def test_addresses_with_the_signs_of_patterns(place, tmp_path):
    store = Store(place if "://" in place else tmp_path / place)
    for row in ({"layer": 3, "head": 0}, {"layer": 1, "head": 1}):
        store.write_json(f"results/L{row['layer']}H{row['head']}/row.json", row)
    assert [row["layer"] for row in store.rows()] == [1, 3]
    with store.open("results/L1H1") as (folder,):
        assert json.loads((folder / "row.json").read_text()) == {"layer": 1, "head": 1}


def test_a_full_disk_is_a_failure_of_the_step(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(work, "write_whole", full)
    first = sweep("tiny-gdn", CELLS[:1], tmp_path, **SMALL)
    assert first.failed[["layer", "head", "step"]].to_numpy().tolist() == [[1, 1, "tests"]]
    assert "No space left" in first.failed.reason[0]
    monkeypatch.undo()
    monkeypatch.setattr(work, "train_cells", lambda *_, **__: pytest.fail("trained twice"))
    assert len(sweep("tiny-gdn", CELLS[:1], tmp_path, **SMALL).cells) == 1


def test_an_sae_that_a_full_disk_cannot_hold_is_an_error_of_the_disk(tmp_path, monkeypatch):
    """safetensors has an error of its own, and engines give a step whose disk failed to another machine."""

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(work, "train_cells", full)
    settings = {name: value for name, value in SMALL.items() if name != "verbose"}
    job = plan_sweep("tiny-gdn", CELLS[:1], tmp_path, **settings).job
    with pytest.raises(OSError, match=r"could not be saved: .* No space left"):
        work.run_step(job, work.Train(tuple(CELLS[:1])), "cpu", None)


def test_workers_train_without_a_bar():
    with tqdm(total=10, disable=True) as bar:
        update_bar(None, trainer=None, output={}, bar=bar)


def test_at_an_address_of_fsspec(swept):
    _, done = swept
    there = sweep("tiny-gdn", CELLS, "memory://sweeps/one", **SMALL)
    seconds = [name for name in done.cells if name.endswith("seconds")]
    pd.testing.assert_frame_equal(there.cells.drop(columns=seconds), done.cells.drop(columns=seconds))
    store = Store("memory://sweeps/one")
    for name in ("cells.csv", "cells.parquet", "L1H1/cfg.json", "results/L3H0/replace/summary.json"):
        assert store.has(name), name
    assert not store.has("L1H1/.writesae-lens.lock")
    with store.open(read_only="L1H1") as (folder,):
        SAE.load_from_disk(folder)


def test_further_experiments_join_the_rows(swept):
    out, done = swept
    more = sweep("tiny-gdn", CELLS, out, **SMALL | {"experiments": ["partition"]})
    assert set(more.cells) > set(done.cells)
    assert more.cells.partition_n_register.notna().all()
    assert set(json.loads((out / "sweep.json").read_text())["experiments"]) == {"replace", "partition"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experiments": ["compare"]}, "several SAEs"),
        ({"experiments": ["nonsense"]}, "no experiment is called"),
        ({"experiments": "replace"}, "a list of names"),
        ({"experiments": {"replace": {"horizons": 3}}}, "no option 'horizons'"),
        ({"workers": 0}, "workers"),
        ({"n_batches_in_bufer": 3}, "takes no 'n_batches_in_bufer'"),
        ({"output_path": "x"}, "takes no 'output_path'"),
        ({"site": "reads"}, "site"),
        ({"cells": "9:*"}, "names no cell"),
        ({"cells": []}, "no cells to sweep"),
        ({"cells": [(1, 1), (3, 0), (1, 1)]}, "names 1:1 more than once"),
        ({"text": "word " * 400, "context_size": 64}, "too short to test on: .* one passage has 64"),
        ({"text": "word " * 40}, "too short to train on"),
        ({"out": "memory://x", "workers": 2}, "in the memory of one process"),
        ({"out": "nonsense://x"}, "cannot write"),
        ({"memory": 0.001}, "raise --memory"),
    ],
)
def test_wrong_input(wrong, message, tmp_path):
    options = {"cells": CELLS, "out": tmp_path} | SMALL | wrong
    with pytest.raises(WriteSAEError, match=message) as raised:
        sweep("tiny-gdn", **options)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("wrong", ["1:1", (1, 1.0), (1, True), (1,)])
def test_a_list_of_cells_holds_pairs(wrong):
    model = HookedRecurrent.boot_transformers("tiny-gdn")
    with pytest.raises(WriteSAEError, match=r"pairs, or one text as '0:2,3:1'; got "):
        listed_cells(model, [(0, 0), wrong])


def test_a_model_without_text(tmp_path):
    with pytest.raises(WriteSAEError, match=r"ships with no text"):
        sweep(str(zoo.model_path("tiny-gdn")), CELLS, tmp_path, **SMALL)


def test_the_command(swept, tmp_path):
    out, swept_before = swept
    sizes = ["--training_tokens=8000", "--context_size=64", "--n_batches_in_buffer=8"]
    command = ["sweep", "--model_name", "tiny-gdn", "--cells", "1:1,3:0", *sizes]
    command += ["--experiments", "-", "--out", tmp_path]
    done = run(*command)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 cells finished"), done.stderr
    before = (tmp_path / "cells.csv").read_bytes()
    sweep("tiny-gdn", CELLS, tmp_path, **SMALL | {"experiments": []})  # nothing is left to do
    assert (tmp_path / "cells.csv").read_bytes() == before
    done = run(*command[:-1], out)  # nor in the folder of the same sweep in Python
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"table: {out}/cells.csv (2 cells)"), (
        done.stderr
    )
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / "cells.parquet")[[*swept_before.cells]], swept_before.cells
    )  # further experiments may have joined it
    for name in ("L1H1", "L3H0"):
        there, here = (load_file(folder / name / "sae_weights.safetensors") for folder in (out, tmp_path))
        assert all((there[key] == here[key]).all() for key in there)
    assert "every cell has its SAE" in run(*command, "--dry-run").stdout


@pytest.mark.parametrize("flag", ["--output_path x", "--hook_name x", "--n_checkpoints 2"])
def test_flags_that_a_sweep_has_no_use_for(flag):
    done = run("sweep", "--model_name", "tiny-gdn", *flag.split())
    assert done.returncode == 2
    assert f"sweep takes no {flag.split()[0]}" in done.stderr


def test_the_memory_of_a_command_is_no_place():
    done = run("sweep", "--model_name", "tiny-gdn", "--out", "memory://x")
    assert done.returncode == 2
    assert "gone when the command ends" in done.stderr
