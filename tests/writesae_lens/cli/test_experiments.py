"""Every experiment from the command line."""

import dataclasses
import functools
import inspect
import json
import os
import re
import shutil

import pandas as pd
import pytest
import torch

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run, words
from writesae_lens import WriteSAE
from writesae_lens.cli.experiments import command_of
from writesae_lens.experiments import replacement_test
from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS, experiment
from writesae_lens.experiments.options import SHARED, Count
from writesae_lens.experiments.result import ExperimentResult, Progress

SMALL = ("--max-passages", 2, "--context-size", 32)
# Options that make a command take a second, and use every kind of option.
OWN = {
    "replace": ("--max-firings", 10, "--scale", "matched_norm"),
    "population": ("--min-firings", 1, "--max-firings-per-atom", 1),
    "partition": ("--n-seeds", 1, "--orders", 1, "--orders", 2),
    "formula": ("--n-atoms", 2, "--max-horizon", 3, "--epsilons", 0.1, "--epsilons", 1),
    "erase": ("--doses", 1),
    "sign": ("--n-trials", 20),
    "install": ("--n-refinements", 1, "--n-tokens", 3, "--targets", 12, "--targets", " the"),
    "amplify": ("--n-tokens", 4, "--factors", 2, "--factors", 10),
    "selectivity": ("--n-atoms", 3),
    "trace": ("--n-atoms", 2),
    "contexts": ("--n-contexts", 2),
    "compare": ("--max-firings", 10, "--random", "atom", "--no-baselines"),
    "map": ("--max-firings", 2, "--horizon", 3),
}
EVERY = EXPERIMENTS | OF_MODELS


@pytest.fixture
def results(monkeypatch):
    """The results that commands save."""
    saved, save = [], ExperimentResult.save

    def spy(self, folder):
        saved.append(self)
        return save(self, folder)

    monkeypatch.setattr(ExperimentResult, "save", spy)
    return saved


def files_in(folder):
    """The files of a result by name, the summary without its date."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".json", ".png")}
    summary = json.loads(files["summary.json"])
    del summary["date"]
    return files | {"summary.json": json.dumps(summary)}


@pytest.mark.parametrize("name", EVERY)
def test_every_command_writes_its_result_and_goes_on_after_an_interruption(
    name, sae_folder, tmp_path, results, monkeypatch
):
    out, interrupted = tmp_path / "out", tmp_path / "interrupted"
    subject = ("--model", "tiny-gdn") if name in OF_MODELS else ("--sae", sae_folder)
    arguments = (name, *subject, *SMALL, *OWN.get(name, ()), "--out")
    done = run(*arguments, out)
    assert done.returncode == 0, done.stderr
    (result,) = results
    assert result.headline
    assert done.stdout.splitlines()[-2:] == [f"saved: {out}", result.headline]
    records = pd.read_csv(out / "records.csv")
    assert len(records) == len(result.records) > 0
    assert list(records) == list(result.records)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(result.summary))
    pictures = {f"{stem}.png" for stem in EVERY[name].figures}
    assert set(files_in(out)) == {"records.csv", "summary.json"} | pictures
    assert not (out / "progress").exists()

    finished, part = [], Progress.part

    def stop_after_one(self, number, compute):
        if finished:
            raise KeyboardInterrupt
        finished.append(number)
        return part(self, number, compute)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "part", stop_after_one)
        stopped = run(*arguments, interrupted)
    first = interrupted / "progress" / f"part_{finished[0]:06d}.csv"
    if stopped.returncode:  # the experiment has more than one part
        assert stopped.returncode == 2
        last = stopped.stderr.strip().splitlines()[-1]
        assert "interrupted; the same command goes on where it stopped" in last
        assert str(interrupted) in last
        assert not (interrupted / "records.csv").exists()
        time = first.stat().st_mtime_ns

        def check_first(self, number, compute):
            assert number != finished[0] or first.stat().st_mtime_ns == time
            return part(self, number, compute)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "part", check_first)
            resumed = run(*arguments, interrupted)
        assert resumed.returncode == 0, resumed.stderr
        assert resumed.stdout.splitlines()[-1] == result.headline
    assert files_in(interrupted) == files_in(out)
    assert not (interrupted / "progress").exists()


@pytest.mark.parametrize("name", EVERY)
def test_help_lists_every_argument_with_the_docstrings_words(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    done = run(name, "--help")
    assert done.returncode == 0
    function = EVERY[name].function
    description, _, rest = inspect.getdoc(function).partition("\n\nArgs:\n")
    shown = words(done.stdout)
    assert words(description.split("\n\n")[0].replace("``", "")) in shown
    assert all(n in shown for n in re.findall(r"W_\w\[\w+\]", description))
    assert "\\[" not in done.stdout
    arguments = rest.split("\n\nReturns:")[0]
    for argument in inspect.signature(function).parameters:
        if argument in (*SHARED, "seed", "options"):
            continue
        row = next((x for x in done.stdout.splitlines() if f"--{argument.replace('_', '-')} " in x), None)
        assert row is not None, argument
        help_line = re.search(rf"^    (?:\w+, )*{argument}(?:, \w+)*: (.*)$", arguments, flags=re.M)
        assert help_line, f"{argument} is not in the docstring"
        assert words(help_line[1].replace("``", "").replace("(None:", "(default:"))[1:] in words(row), (
            argument
        )
    for shared in ("--text", "--model", "--out", "--max-passages", "--context-size", "--device", "--seed"):
        assert f"{shared} " in done.stdout


def test_brackets_of_the_docstring_are_shown():
    assert "W_O[head] W_U[T]" in words(run("sign", "--help").stdout)


def test_a_cell_stands_for_an_sae(sae_folder, tmp_path):
    options = (*SMALL, "--n-trials", 10)
    of_sae = run("sign", "--sae", sae_folder, "--out", tmp_path / "a", *options)
    of_cell = run("sign", "--cell", "1:2", "--model", "tiny-gdn", "--out", tmp_path / "b", *options)
    assert of_cell.returncode == 0, of_cell.stderr
    assert of_cell.stdout.splitlines()[-1] == of_sae.stdout.splitlines()[-1]
    assert (tmp_path / "a" / "records.csv").read_bytes() == (tmp_path / "b" / "records.csv").read_bytes()


def test_install_writes_in_all_heads_of_a_layer(tmp_path):
    options = ("--n-cells", 1, "--n-cells", 4, "--targets", 12, "--n-refinements", 1, "--n-tokens", 3)
    out = tmp_path / "out"
    done = run("install", "--cell", "1:*", "--model", "tiny-gdn", "--out", out, *options, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "4 installs in 4 cells; perplexity of the continuation" in done.stdout.splitlines()[-1]
    assert pd.read_csv(out / "records.csv").n_cells.tolist() == [1, 4] * 2
    assert len(json.loads((out / "summary.json").read_text())["hook_name"]) == 4


class CalledError(Exception):
    """The experiment's function was called."""


@pytest.fixture
def arguments_of(monkeypatch, sae_folder):
    """arguments_of(name, *options) -> what the command calls the experiment's function with."""

    def call(name, *options):
        given, real = {}, EXPERIMENTS[name]

        @functools.wraps(real.function)
        def function(model, subject, passages, **options):
            given.update(options, passages=passages)
            raise CalledError

        with monkeypatch.context() as patch:
            patch.setitem(EXPERIMENTS, name, dataclasses.replace(real, function=function))
            command = command_of(name)
        with pytest.raises(CalledError):
            command(["--sae", str(sae_folder), *map(str, options)], standalone_mode=False)
        return given

    return call


def test_options_reach_the_function_in_its_own_types(arguments_of):
    given = arguments_of("formula", "--epsilons", "0.1", "--epsilons", "1", "--form", "gate_product")
    assert given["epsilons"] == (0.1, 1.0)
    assert given["form"] == "gate_product"
    assert type(given["form"]) is str
    assert given["progress_folder"] == os.path.join("writesae-formula", "progress")
    assert given["passages"].shape == (16, 64)
    given = arguments_of("erase", "--token", "12", "--seed", 7)
    assert (given["token"], given["seed"], given["atom"]) == (12, 7, None)
    assert given["passages"].shape == (64, 32)  # as the SAE was trained
    assert arguments_of("erase", "--token", " the")["token"] == " the"
    assert arguments_of("install", "--targets", "12", "--targets", " the")["targets"] == (12, " the")
    given = arguments_of("install", "--magnitude", 1.5, "--magnitude", 3)
    assert given["magnitude"] == (1.5, 3.0)
    assert given.get("targets") is None


def test_the_last_passages_of_the_text_are_read(sae_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(zoo.held_out_text()[:1500])
    done = run("replace", "--sae", sae_folder, "--text", text, "--out", tmp_path / "out", *SMALL)
    assert done.returncode == 0, done.stderr
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    ids = model.to_tokens(text.read_text(), prepend_bos=False, truncate=False)[0]
    passages = ids[: len(ids) // 32 * 32].view(-1, 32)[-2:]
    own = replacement_test(model, WriteSAE.load_from_disk(sae_folder), passages, verbose=False).records
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "records.csv"), own, check_dtype=False)


@pytest.mark.parametrize("size", [32, 256, 2048])
def test_the_default_text_is_what_no_sae_was_trained_on(size, sae_folder, tmp_path, monkeypatch):
    """However many passages are asked for, and of any length: fewer are read, and a line says so."""
    read, test_text = [], " ".join(zoo.text("test").split())

    class ReadError(HookedModelError):
        pass

    def read_only(model, sae, passages, **options):
        read.append((model, passages))
        raise ReadError("read")

    monkeypatch.setitem(
        EXPERIMENTS, "replace", dataclasses.replace(EXPERIMENTS["replace"], function=read_only)
    )
    for wanted in (2, 10_000):
        done = run("replace", "--sae", sae_folder, "--context-size", size, "--max-passages", wanted)
        model, passages = read.pop()
        ids = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)[0]
        whole = ids[: len(ids) // size * size].view(-1, size)
        assert torch.equal(passages, whole[-wanted:])
        assert " ".join(model.tokenizer.decode(passages.flatten().tolist())[8:-8].split()) in test_text
        lines = [line for line in done.stderr.splitlines() if "passages" in line]
        told = f"(what SAEs are trained on is no part of it) has {len(whole)} passages of {size} tokens"
        assert len(lines) == (wanted > len(whole))
        assert all(told in line for line in lines)


def test_a_short_text_is_read_whole_and_a_line_says_so(sae_folder, tmp_path):
    (tmp_path / "my notes.txt").write_text(zoo.text("test")[:1500])
    few = ("--sae", sae_folder, "--context-size", 32, "--n-contexts", 1, "--out", tmp_path / "out")
    done = run("contexts", "--text", "my notes.txt", *few, cwd=tmp_path)
    summary = ExperimentResult.load(tmp_path / "out").summary
    n = summary["text_tokens"] // 32
    line = f"my notes.txt has {n} passages of 32 tokens: all are read, where --max-passages allows 64"
    assert f"writesae-lens: {line}" in done.stderr.splitlines()
    assert (summary["text"], summary["text_range"]) == ("my notes.txt", [0, 32 * n])
    run("contexts", "--text", "my notes.txt", "--max-passages", 3, *few, cwd=tmp_path)
    summary = ExperimentResult.load(tmp_path / "out").summary
    assert summary["text_range"] == [32 * (n - 3), 32 * n]
    assert summary["call"].startswith(
        "top_contexts(model='tiny-gdn', sae='blocks.1.linear_attn.hook_write.2',"
    )
    assert str(tmp_path) not in json.dumps(summary)


def test_text_that_the_sae_was_trained_on_is_warned_of(sae_folder, tmp_path):
    shutil.copytree(sae_folder, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = zoo.TEXT_NAME
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "mine.txt").write_text(zoo.text("test")[:2000] + zoo.text("train")[:2000].replace(" ", "\n"))
    few = ("contexts", "--sae", tmp_path / "sae", "--n-contexts", 1, "--out", tmp_path / "out")
    done = run(*few, "--text", tmp_path / "mine.txt", "--max-passages", 100)
    (warning,) = [line for line in done.stderr.splitlines() if "warning" in line]
    share = int(re.search(r"(\d+)% of this text is text that the SAE was trained on", warning)[1])
    assert 35 <= share <= 65
    assert f"[{share}% of this text" in done.stdout.splitlines()[-1]
    done = run(*few, "--max-passages", 20)
    assert "warning" not in done.stderr
    assert ExperimentResult.load(tmp_path / "out").summary["warnings"] == []


def test_several_saes_are_compared_by_the_names_given(sae_folder, tmp_path, results):
    os.symlink(sae_folder, tmp_path / "other")
    saes = ("--sae", "other", "--sae", sae_folder)
    few = (*SMALL, "--max-firings", 10, "--no-baselines")
    done = run("compare", *saes, "--random", "orthogonal", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = results[0].summary["table"]
    assert [row["name"] for row in table] == ["other", str(sae_folder), "orthogonal", "delete"]
    assert (tmp_path / "writesae-compare" / "compare.png").exists()


def test_a_declared_experiment_is_a_command(sae_folder, tmp_path, monkeypatch):
    """Nothing but its declaration names it: it is listed in --help, has its options, and runs."""
    before = dict(EXPERIMENTS)
    try:

        @experiment("toy", question="How long are the passages?", row="a passage", max_passages=3)
        def toy_experiment(
            model,
            sae,
            tokens,
            repeat: Count = 1,
            context_size=None,
            seed=0,
            progress_folder=None,
            verbose=True,
        ):
            """Measure passages.

            Args:
                repeat: how often each passage is measured.
            """
            records = pd.DataFrame({"length": [tokens.shape[1]] * len(tokens) * repeat})
            summary = {"experiment": "toy", "headline": f"{len(records)} lengths", "seed": seed}
            return ExperimentResult("toy", records, summary)

        monkeypatch.setenv("COLUMNS", "200")
        assert "toy How long are the passages?" in words(run("--help").stdout)
        own_help = words(run("toy", "--help").stdout)
        assert "Measure passages." in own_help
        assert "How often each passage is measured." in own_help
        done = run("toy", "--sae", sae_folder, "--repeat", 2, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "6 lengths"
        assert (pd.read_csv(tmp_path / "out" / "records.csv").length == 32).all()
        wrong = run("toy", "--sae", sae_folder, "--repeat", 0)
        assert wrong.returncode == 2
        assert "Invalid value for '--repeat'" in wrong.stderr
    finally:
        EXPERIMENTS.clear()
        EXPERIMENTS.update(before)
