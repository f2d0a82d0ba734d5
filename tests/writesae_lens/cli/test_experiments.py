"""Every experiment from the command line."""

import functools
import inspect
import json
import os
import re

import pandas as pd
import pytest
import torch
import typer

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.cli import app as cli
from writesae_lens.cli import experiments as commands
from writesae_lens.experiments import replacement_test
from writesae_lens.experiments.result import ExperimentResult, Progress

SMALL = ("--max-passages", 2, "--context-size", 32)
# Options that make each command take a second.
OWN = {
    "replace": ("--max-firings", 10, "--scale", "matched_norm"),
    "population": ("--min-firings", 1, "--max-firings-per-atom", 1),
    "partition": ("--n-seeds", 1, "--orders", 1, "--orders", 2),
    "formula": ("--n-atoms", 2, "--max-horizon", 3, "--epsilons", 0.1, "--epsilons", 1),
    "erase": ("--doses", 1),
    "sign": ("--n-trials", 20),
    "install": ("--n-refinements", 1, "--n-tokens", 3, "--targets", 12, "--targets", " the"),
    "splice": (),
    "amplify": ("--n-tokens", 4, "--factors", 2, "--factors", 10),
    "selectivity": ("--n-atoms", 3),
    "trace": ("--n-atoms", 2),
    "contexts": ("--n-contexts", 2),
    "compare": ("--max-firings", 10, "--random", "atom"),
}
CELL_ONLY = {
    name
    for name, command in commands.COMMANDS.items()
    if "sae_or_cell" in inspect.signature(command.function).parameters
}
# Arguments that options of all commands stand for.
COMMON = {
    "model", "sae", "saes", "sae_or_cell", "tokens", "prompts", "context_size", "progress_folder", "seed",
    "verbose", "options",
}  # fmt: skip


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """A folder as SAELens writes it: of 48 atoms, writes of the held-out text."""
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    cell, name = model.cell(1, 2), model.write_hook_name(1, 2)
    ids = model.to_tokens(zoo.held_out_text()[-8000:], prepend_bos=False, truncate=False)[:, :400]
    with torch.no_grad():
        writes = model.run_with_cache(ids, names_filter=[name])[1][name][0, 10::8][:48]
    left, _, right = torch.linalg.svd(writes.unflatten(-1, (cell.d_k, cell.d_v)), full_matrices=False)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=48, k=4, encoder="tied"))
    with torch.no_grad():
        sae.dec_key.copy_(left[:, :, :1].mT)
        sae.dec_value.copy_(right[:, :1])
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.context_size = "tiny-gdn", name, 32
    folder = tmp_path_factory.mktemp("sae")
    sae.save_model(folder)
    return folder


@pytest.fixture
def results(monkeypatch):
    """The results that commands save."""
    saved, save = [], ExperimentResult.save

    def spy(self, folder):
        saved.append(self)
        return save(self, folder)

    monkeypatch.setattr(ExperimentResult, "save", spy)
    return saved


def kept(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".json", ".png")}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_writes_its_result_and_goes_on_after_an_interruption(
    name, sae, tmp_path, results, monkeypatch
):
    out = tmp_path / "out"
    arguments = (name, "--sae", sae, "--out", out, *SMALL, *OWN[name])
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    (result,) = results
    assert result.headline
    assert done.stdout.splitlines()[-1] == result.headline
    assert f"saved: {out}" in done.stdout.splitlines()
    records = pd.read_csv(out / "records.csv")
    assert len(records) == len(result.records) > 0
    assert list(records) == list(result.records)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(result.summary))
    pictures = [p for p in out.iterdir() if p.suffix == ".png"]
    assert {p.stem for p in pictures} == set(result.figures) != set()
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert not (out / "progress").exists()
    again = ExperimentResult.load(out)
    assert (again.name, again.summary, set(again.figures)) == (
        result.name, json.loads(json.dumps(result.summary)), set(result.figures)
    )  # fmt: skip
    assert again.plot().axes

    interrupted, finished, part = tmp_path / "interrupted", [], Progress.part

    def stop_after_one(self, number, compute):
        if finished:
            raise KeyboardInterrupt
        finished.append(number)
        return part(self, number, compute)

    arguments = tuple(interrupted if argument is out else argument for argument in arguments)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "part", stop_after_one)
        stopped = run(*arguments)
    first = interrupted / "progress" / f"part_{finished[0]:06d}.csv"
    if stopped.returncode:  # it had more than one part
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
            resumed = run(*arguments)
        assert resumed.returncode == 0, resumed.stderr
        assert resumed.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert kept(interrupted) == kept(out)
    assert not (interrupted / "progress").exists()


def plain(text):
    """Words on a screen, without frames and line ends."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_lists_every_argument_with_the_docstrings_words(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    done = run(name, "--help")
    assert done.returncode == 0
    function = commands.COMMANDS[name].function
    doc = inspect.getdoc(function)
    shown = plain(done.stdout)
    first = plain(doc.split("\n\n")[0].replace("``", ""))
    assert first in shown
    for n in re.findall(r"W_\w\[\w+\]", doc.split("\n\nArgs:")[0]):
        assert n in shown
    assert "\\[" not in done.stdout
    own = [n for n in inspect.signature(function).parameters if n not in COMMON]
    arguments = doc.split("\n\nArgs:\n")[1].split("\n\nReturns:")[0]
    for argument in own:
        row = next((x for x in done.stdout.splitlines() if f"--{argument.replace('_', '-')} " in x), None)
        assert row is not None, argument
        said = re.search(rf"^    (?:\w+, )*{argument}(?:, \w+)*: (.*)$", arguments, flags=re.M)
        assert said, f"{argument} is not in the docstring"
        words = plain(said[1].replace("``", "").replace("(None:", "(default:"))
        assert words[1:] in plain(row), argument
    for shared in ("--text", "--model", "--out", "--max-passages", "--device", "--seed"):
        assert f"{shared} " in done.stdout


def test_brackets_of_the_docstring_are_shown():
    assert "W_O[head] W_U[T]" in plain(run("sign", "--help").stdout)


def test_every_command_is_tested():
    assert set(OWN) == set(commands.COMMANDS)
    assert {"sign", "install"} <= CELL_ONLY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sign",), "which cell? Give one of --sae and --cell"),
        (("sign", "--sae", "SAE", "--cell", "1:2", "--model", "tiny-gdn"), "one of --sae and --cell"),
        (("install", "--cell", "1:2"), "--cell names no model: give --model"),
        (("install", "--cell", "1", "--model", "tiny-gdn"), "a cell is written LAYER:HEAD"),
        (("sign", "--cell", "2:0", "--model", "tiny-gdn"), "no cell at layer 2"),
        (("install", "--sae", "SAE", "--targets", "unquestionably strange"), "is not one token but"),
        (("install", "--sae", "SAE", "--targets", "99999"), "token 99999 does not exist"),
        (("erase", "--sae", "SAE", "--token", "unquestionably strange"), "is not one token but"),
        (("erase", "--sae", "SAE", "--atom", 48), "atom 48 does not exist: the SAE has atoms 0 to 47"),
        (("amplify", "--sae", "SAE", "--atom", 48), "atom 48 does not exist: the SAE has atoms 0 to 47"),
        (("formula", "--sae", "SAE", "--epsilons", "-1"), "epsilons"),
        (("compare", "--sae", "SAE", "--random", "gauss"), "random='gauss' is unknown"),
        (("partition", "--sae", "SAE", "--text", "TEXT"), "the text is too short"),
        (("trace", "--sae", "SAE", "--text", "NOWHERE"), "could not read"),
        (("contexts", "--sae", "nowhere"), "nowhere is no SAE folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, sae, tmp_path):
    (tmp_path / "text.txt").write_text("far too short")
    places = {"SAE": sae, "TEXT": tmp_path / "text.txt", "NOWHERE": tmp_path / "no.txt"}
    done = run(*(places.get(a, a) for a in arguments), cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.strip().splitlines() if "it/s" not in line and "%|" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("writesae-lens: ")
    assert message in lines[0]
    assert not any(p.name.startswith("writesae-") for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replace",), "--sae"),
        (("compare",), "--sae"),
        (("replace", "--sae", "SAE", "--scale", "huge"), "matched_norm"),
        (("sign", "--sae", "SAE", "--direction", "up"), "unembedding"),
        (("formula", "--sae", "SAE", "--epsilons", "x"), "--epsilons"),
        (("splice", "--sae", "SAE", "--seed", "-1"), "--seed"),
        (("replace", "--sae", "SAE", "--cell", "1:2"), "--cell"),
    ],
)
def test_what_typer_refuses_is_status_2_and_names_the_option(arguments, message, sae, tmp_path):
    done = run(*(sae if a == "SAE" else a for a in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert message in plain(done.stderr)
    assert "Traceback" not in done.stderr


def test_a_cell_stands_for_an_sae(sae, tmp_path):
    options = (*SMALL, "--n-trials", 10)
    of_sae = run("sign", "--sae", sae, "--out", tmp_path / "a", *options)
    of_cell = run("sign", "--cell", "1:2", "--model", "tiny-gdn", "--out", tmp_path / "b", *options)
    assert of_cell.returncode == 0, of_cell.stderr
    assert of_cell.stdout.splitlines()[-1] == of_sae.stdout.splitlines()[-1]
    assert (tmp_path / "a" / "records.csv").read_bytes() == (tmp_path / "b" / "records.csv").read_bytes()


class Seen(Exception):
    """The function was called."""


def seen_by(name, monkeypatch, *arguments):
    """What the function is called with."""
    given, real = {}, commands.COMMANDS[name]

    @functools.wraps(real.function)
    def function(model, about, passages, **options):
        given.update(options, model=model, about=about, passages=passages)
        raise Seen

    with monkeypatch.context() as patch:
        patch.setitem(commands.COMMANDS, name, real._replace(function=function))
        app = commands.make(name, cli._load)
    with pytest.raises(Seen):
        typer.main.get_command(app)(list(map(str, arguments)), standalone_mode=False)
    return given


def test_options_reach_the_function_in_its_own_types(sae, monkeypatch):
    given = seen_by(
        "formula", monkeypatch, "--sae", sae, "--epsilons", "0.1", "--epsilons", "1", "--form", "gate_product"
    )
    assert given["epsilons"] == (0.1, 1.0)
    assert given["form"] == "gate_product"
    assert type(given["form"]) is str
    assert given["progress_folder"] == os.path.join("writesae-formula", "progress")
    assert given["passages"].shape == (16, 64)
    given = seen_by("erase", monkeypatch, "--sae", sae, "--token", "12", "--seed", 7)
    assert given["token"] == 12
    assert given["seed"] == 7
    assert given["atom"] is None
    assert given["passages"].shape == (64, 32)  # the SAE's own size
    assert seen_by("erase", monkeypatch, "--sae", sae, "--token", " the")["token"] == " the"
    given = seen_by("install", monkeypatch, "--sae", sae, "--targets", "12", "--targets", " the")
    assert given["targets"] == (12, " the")
    assert seen_by("install", monkeypatch, "--sae", sae).get("targets") is None
    given = seen_by("install", monkeypatch, "--sae", sae, "--magnitude", 1.5, "--magnitude", 3)
    assert given["magnitude"] == (1.5, 3.0)


def test_the_last_passages_of_the_text_are_read(sae, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(zoo.held_out_text()[:1500])
    done = run("replace", "--sae", sae, "--text", text, "--out", tmp_path / "out", *SMALL)
    assert done.returncode == 0, done.stderr
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    ids = model.to_tokens(text.read_text(), prepend_bos=False, truncate=False)[0]
    passages = ids[: len(ids) // 32 * 32].view(-1, 32)[-2:]
    own = replacement_test(model, WriteSAE.load_from_disk(sae), passages, verbose=False).records
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "records.csv"), own, check_dtype=False)


def test_several_saes_are_compared_by_the_names_given(sae, tmp_path, results):
    os.symlink(sae, tmp_path / "other")
    here = ("--sae", "other", "--sae", sae, "--random", "orthogonal", "--max-firings", 10, *SMALL)
    done = run("compare", *here, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = results[0].summary["table"]
    assert [row["name"] for row in table] == ["other", str(sae), "orthogonal", "delete"]
    assert (tmp_path / "writesae-compare" / "comparison.png").exists()


def test_an_sae_given_twice_is_refused(sae, tmp_path):
    here = ("--sae", sae, "--sae", sae, "--random", "orthogonal", "--max-firings", 10, *SMALL)
    done = run("compare", *here, cwd=tmp_path)
    assert done.returncode == 2
