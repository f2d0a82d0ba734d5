"""The command line as a user types it: help at once, the demo and what can be done with its output."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError

import writesae_lens.demo
from hooked_models import zoo
from tests.writesae_lens.cli.command_line import run, words
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens_cli import experiment_questions

COMMANDS = ("demo", "models", "train", "pull", "convert", "push", *EXPERIMENTS, "report", "reproduce")
HEAVY = ("torch", "numpy", "pandas", "transformers", "transformer_lens", "sae_lens", "writesae_lens")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder and exit of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run("demo", "--out", folder, "--training-tokens", 20_000, "--d-sae", 128)


def test_demo_leaves_everything_it_promises(demo):
    out, done = demo
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_firings"] >= 2000
    assert done.stdout.strip().splitlines()[-1].startswith(f"win rate {summary['win_rate']:.1%}")
    assert (out / "sae" / "sae_weights.safetensors").exists()
    assert (out / "records.csv").read_text().count("\n") == summary["n_firings"] + 1
    assert (out / "replace.png").exists()
    page = (out / "report.html").read_text()
    assert f"{summary['win_rate']:.1%}" in page
    # The training, two of the replacement test, the partition, the contexts.
    assert page.count('<img src="data:image/png;base64,') == 5
    curves = pd.read_csv(out / "sae" / "training.csv")
    assert {"step", "loss", "unexplained", "cosine", "l0", "dead"} <= set(curves)
    assert len(curves) > 10


@pytest.mark.parametrize("model", zoo.SHIPPED[1:])
def test_demo_runs_on_every_shipped_model(model, tmp_path):
    done = run("demo", "--model", model, "--out", tmp_path, "--training-tokens", 10_000, "--d-sae", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("win rate")
    assert f"on {model}" in (tmp_path / "report.html").read_text()


def test_replace_works_on_what_demo_wrote(demo, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(zoo.held_out_text()[:6000])
    done = run("replace", "--sae", demo[0] / "sae", "--text", text, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("win rate")
    assert (tmp_path / "r" / "replace.png").exists()


def test_formula_works_on_what_demo_wrote(demo, tmp_path):
    options = ("--n-atoms", 3, "--max-passages", 2, "--max-horizon", 4, "--context-size", 32)
    done = run("formula", "--sae", demo[0] / "sae", "--out", tmp_path / "f", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("median R2 ")
    assert {"records.csv", "summary.json", "formula.png"} <= {p.name for p in (tmp_path / "f").iterdir()}


def test_models_lists_what_ships_and_its_cells():
    assert run("models").stdout.split()[: len(zoo.SHIPPED)] == list(zoo.SHIPPED)
    cells = run("models", "--model", "tiny-gdn").stdout
    assert "1:0\t32 x 48\tgated_delta_net\tblocks.1.linear_attn.hook_write.0" in cells


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted; run it again"),
        (InterruptedException(), "interrupted; run it again"),  # SAELens's, while it trains
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "out/records.csv"), "'out/records.csv'"),
    ],
)
def test_interruptions_and_full_disks_are_one_line(error, message, monkeypatch, tmp_path):
    def stop(*_):
        raise error

    monkeypatch.setattr(writesae_lens.demo, "run_demo", stop)
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("writesae-lens: ")
    assert message in line


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command):
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_help_lists_every_command_and_the_questions_of_the_experiments(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    lines = [words(line) for line in run("--help").stdout.splitlines()]
    listed = {line.split(" ", 1)[0]: line for line in lines if line}
    assert set(COMMANDS) <= set(listed)
    for name, experiment in EXPERIMENTS.items():
        assert listed[name] == f"{name} {experiment.question}"
    order = [line.split(" ", 1)[0] for line in lines if line.split(" ", 1)[0] in COMMANDS]
    assert [name for name in order if name in EXPERIMENTS] == list(EXPERIMENTS)


def test_the_declarations_in_the_source_are_those_of_the_catalogue(monkeypatch):
    expected = [(name, experiment.question) for name, experiment in EXPERIMENTS.items()]
    assert list(experiment_questions().items()) == expected
    monkeypatch.delitem(sys.modules, "writesae_lens.experiments.catalogue")
    assert list(experiment_questions().items()) == expected


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (["--help"], 0, "selectivity"),
        (["--version"], 0, "writesae-lens"),
        ([], 2, "selectivity"),
        (["no"], 2, ""),
    ],
)
def test_answers_that_need_no_package_import_none(arguments, status, output):
    program = (
        "import sys, writesae_lens_cli\n"
        f"sys.argv = {['writesae-lens', *arguments]!r}\n"
        "try:\n    writesae_lens_cli.main()\n"
        f"finally:\n    print('imported:', [n for n in {HEAVY!r} if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert output in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_the_package_runs_as_a_module():
    shell = [sys.executable, "-m", "writesae_lens.cli", "--help"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in COMMANDS)
