"""The command line as a user types it: help at once, the demo and what can be done with its output."""

import inspect
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from torch.nn.functional import normalize

import writesae_lens.demo
import writesae_lens_cli
from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run, words
from writesae_lens import WriteSAE, WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS
from writesae_lens.experiments.subjects import find_site
from writesae_lens_cli import experiment_questions

SHARE = ("train", "pull", "convert", "push")
USE = ("attribute", "export", "label", "read", "steer")
COMMANDS = ("demo", "models", *OF_MODELS, *SHARE, *EXPERIMENTS, *USE, "report", "reproduce")
HEAVY = ("torch", "numpy", "pandas", "transformers", "transformer_lens", "sae_lens", "writesae_lens")


@pytest.fixture(scope="module")
def few_firings():
    """The demo tests 32 firings of 4 passages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writesae_lens.demo, "TEST_PASSAGES", 4)
        patch.setattr(writesae_lens.demo, "MAX_FIRINGS", 32)
        yield


@pytest.fixture(scope="module")
def demo(few_firings, tmp_path_factory):
    """Output folder and exit of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run("demo", "--out", folder, "--training-tokens", 20_000, "--d-sae", 128)


def test_demo_leaves_everything_it_promises(demo):
    out, done = demo
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["n_firings"], summary["horizon"]) == (32, 32)
    said = f"recovered in the median {summary['median_recovered']:.1%}"
    assert done.stdout.strip().splitlines()[-1].startswith(said)
    assert {row["name"] for row in summary["baselines"]} >= {"lookup", "mean_key", "mean_value"}
    assert (out / "sae" / "sae_weights.safetensors").exists()
    assert (out / "records.csv").read_text().count("\n") == summary["n_firings"] + 1
    assert (out / "replace.png").exists()
    page = (out / "report.html").read_text()
    assert f"{summary['win_rate']:.1%}" in page
    assert f"{summary['median_recovered']:.1%}" in page
    # The training, three of the replacement test, the partition, the contexts.
    assert page.count('<img src="data:image/png;base64,') == 6
    curves = pd.read_csv(out / "sae" / "training.csv")
    assert {"step", "loss", "unexplained", "read_alignment_loss", "l0", "dead"} <= set(curves)
    assert len(curves) > 10


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.SHIPPED[1:])
def test_demo_runs_on_every_shipped_model(model, few_firings, tmp_path):
    done = run("demo", "--model", model, "--out", tmp_path, "--training-tokens", 10_000, "--d-sae", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("recovered in the median")
    assert f"on {model}" in (tmp_path / "report.html").read_text()


def test_replace_works_on_what_demo_wrote(demo, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(zoo.text("test")[:6000])
    few = ("--max-firings", 32, "--out", tmp_path / "r")
    done = run("replace", "--sae", demo[0] / "sae", "--text", text, *few)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("recovered in the median")
    assert (tmp_path / "r" / "replace.png").exists()


def test_formula_works_on_what_demo_wrote(demo, tmp_path):
    options = ("--n-atoms", 3, "--max-passages", 2, "--max-horizon", 4, "--context-size", 32)
    done = run("formula", "--sae", demo[0] / "sae", "--out", tmp_path / "f", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("median R2 ")
    assert {"records.csv", "summary.json", "formula.png"} <= {p.name for p in (tmp_path / "f").iterdir()}


def test_what_the_demo_trains_on_by_default_is_what_shipped_models_train_on():
    """Its declaration imports no package, so the number stands there a second time."""
    parameters = inspect.signature(writesae_lens_cli.start.demo).parameters
    assert parameters["training_tokens"].default == zoo.TRAINING_TOKENS
    assert f"{zoo.TRAINING_TOKENS:,} on shipped models" in words(run("reproduce", "--help").stdout)


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
    for name, experiment in (EXPERIMENTS | OF_MODELS).items():
        assert listed[name] == f"{name} {experiment.question}"
    assert tuple(name for line in lines if (name := line.split(" ", 1)[0]) in COMMANDS) == COMMANDS


def test_the_declarations_in_the_source_are_those_of_the_catalogue(monkeypatch):
    every = EXPERIMENTS | OF_MODELS
    expected = [(name, (experiment.question, experiment.of_model)) for name, experiment in every.items()]
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


def test_a_bare_checkpoints_own_cell_is_used(tmp_path):
    """A colleague's best.pt names layer and head, and no model or hook."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"V_enc": (16, 1, 32), "W_enc": (16, 1, 48), "V_dec": (16, 1, 32), "W_dec": (16, 1, 48)}
    state = {name: normalize(torch.randn(size, generator=rng), dim=-1) for name, size in sizes.items()}
    state |= {"b_enc": torch.zeros(16), "bias": torch.zeros(32, 48)}
    config = {"sae_type": "bilinear", "layer": 1, "head": 2, "n_features": 16, "d_k": 32, "d_v": 48, "k": 4}
    torch.save({"model_state_dict": state, "config": config | {"rank": 1}}, tmp_path / "best.pt")
    few = ("--model", "tiny-gdn", "--max-passages", 2, "--context-size", 32)
    small = {"compare": ("--max-firings", 4), "contexts": ()}
    for name, options in small.items():
        done = run(name, "--sae", "best.pt", *few, *options, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["hook_name"] == "blocks.1.linear_attn.hook_write.2"
        assert (
            "best.pt names layer 1, head 2 and no hook: it is taken for an SAE on the writes" in done.stderr
        )
    done = run("report", "--sae", "best.pt", *few, "--results", "contexts", "--out", "page", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layer 1, head 2: writes of 32 x 48" in (tmp_path / "page" / "report.html").read_text()
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    said = "set sae.cfg.metadata.hook_name, its file says to model.write_hook_name(1, 2)"
    with pytest.raises(WriteSAEError, match=re.escape(said)):
        find_site(model, WriteSAE.from_checkpoint(tmp_path / "best.pt"))


def test_a_byte_order_mark_is_no_part_of_a_text(sae_folder, tmp_path):
    text = zoo.text("test")[:2000]
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(text, encoding="utf-8-sig")
    hashes = set()
    for name in ("plain", "marked"):
        how = ("--text", f"{name}.txt", "--max-passages", 2, "--n-contexts", 1, "--out", name)
        assert run("contexts", "--sae", sae_folder, *how, cwd=tmp_path).returncode == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        hashes.add((summary["text_hash"], summary["whole_text_hash"]))
    assert len(hashes) == 1
