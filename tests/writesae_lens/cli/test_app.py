"""The command line as a user types it."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError

import writesae_lens.demo
from hooked_models import zoo
from tests.writesae_lens.cli.command_line import run
from writesae_lens.cli import app as cli
from writesae_lens.cli import experiments as commands

COMMANDS = ("demo", "models", "train", "pull", "convert", "push", *cli.EXPERIMENTS, "report", "reproduce")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    options = ("--training-tokens", 20_000, "--d-sae", 128)
    return folder, run("demo", "--out", folder / "out", *options)


def test_demo_leaves_everything_it_promises(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    out = folder / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_firings"] >= 2000
    assert done.stdout.strip().splitlines()[-1].startswith(f"win rate {summary['win_rate']:.1%}")
    assert (out / "sae" / "sae_weights.safetensors").exists()
    assert (out / "records.csv").read_text().count("\n") == summary["n_firings"] + 1
    assert (out / "replacement.png").exists()
    page = (out / "report.html").read_text()
    assert f"{summary['win_rate']:.1%}" in page
    assert (
        page.count('<img src="data:image/png;base64,') == 5
    )  # training, replacement (2), partition, contexts
    curves = pd.read_csv(out / "sae" / "training.csv")
    assert {"step", "loss", "unexplained", "cosine", "l0", "dead"} <= set(curves)
    assert len(curves) > 10


@pytest.mark.parametrize("model", zoo.SHIPPED[1:])
def test_demo_runs_on_every_shipped_model(model, tmp_path):
    options = ("--training-tokens", 10_000, "--d-sae", 64)
    done = run("demo", "--model", model, "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("win rate")
    assert f"on {model}" in (tmp_path / "report.html").read_text()


def test_replace_works_on_what_demo_wrote(demo, tmp_path):
    folder, _ = demo
    text = tmp_path / "text.txt"
    text.write_text(zoo.held_out_text()[:6000])
    done = run("replace", "--sae", folder / "out" / "sae", "--text", text, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("win rate")
    assert (tmp_path / "r" / "replacement.png").exists()
    text.write_text("far too short")
    done = run("replace", "--sae", folder / "out" / "sae", "--text", text)
    assert done.returncode == 2
    assert "the text is too short" in done.stderr


def test_formula_on_what_demo_wrote(demo, tmp_path):
    folder, _ = demo
    options = ("--n-atoms", 3, "--max-passages", 2, "--max-horizon", 4, "--context-size", 32)
    done = run("formula", "--sae", folder / "out" / "sae", "--out", tmp_path / "f", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("median R2 ")
    assert {"records.csv", "summary.json", "formula.png"} <= {p.name for p in (tmp_path / "f").iterdir()}


def test_models_lists_what_ships_and_its_cells():
    assert run("models").stdout.split()[: len(zoo.SHIPPED)] == list(zoo.SHIPPED)
    cells = run("models", "--model", "tiny-gdn").stdout
    assert "1:0\t32 x 48\tgated_delta_net\tblocks.1.linear_attn.hook_write.0" in cells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models", "--model", "no-such-model"), "no model 'no-such-model'"),
        (("demo", "--cell", "2:0"), "no cell at layer 2, head 0; this model has layer 0: heads 0-3"),
        (("demo", "--cell", "x"), "a cell is written LAYER:HEAD"),
        (("demo", "--model", "gpt2"), "the demo runs on shipped models"),
        (("replace", "--sae", "nowhere"), "nowhere is no SAE folder"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("writesae-lens: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_damaged_saes_and_impossible_numbers(demo, tmp_path):
    folder, _ = demo
    broken = tmp_path / "sae"
    broken.mkdir()
    (broken / "cfg.json").write_text("{")
    (broken / "sae_weights.safetensors").write_bytes(b"x")
    done = run("replace", "--sae", broken)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("writesae-lens: could not load the SAE")
    for option in ("--seed=-1", "--max-passages=0", "--max-firings=0", "--context-size=0"):
        done = run("replace", "--sae", folder / "out" / "sae", option)
        assert done.returncode == 2, option
        assert option.split("=")[0].lstrip("-").replace("-", "_") in done.stderr.replace("-", "_")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command):
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted; run it again"),
        (InterruptedException(), "interrupted; run it again"),  # SAELens's, while it trains
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "out/records.csv"), "'out/records.csv'"),
    ],
)
def test_interruptions_and_full_disks_are_one_line(error, said, monkeypatch, tmp_path):
    def stop(*_):
        raise error

    monkeypatch.setattr(writesae_lens.demo, "run_demo", stop)
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("writesae-lens: ")
    assert said in line


def test_the_map_has_every_experiment():
    assert set(cli.EXPERIMENTS) == set(commands.COMMANDS)


def test_from_the_shell():
    shell = [sys.executable, "-m", "writesae_lens.cli.app", "--help"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in COMMANDS)
