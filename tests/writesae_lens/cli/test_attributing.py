"""The command attribute as a user types it."""

import json

import pandas as pd
import pytest

from tests.writesae_lens.cli.command_line import run

PROMPT = ("--prompt", "It was late in the evening when Mr. Darcy")


def test_attribute_prints_a_table_and_saves_result_and_graph(sae_folder, tmp_path):
    out = tmp_path / "out"
    options = ("--n-check", 4, "--n-nodes", 3, "--steps", 2, "--out", out)
    done = run("attribute", "--sae", sae_folder, *PROMPT, "--target", " was", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["attributed", "ablated", "integrated"]
    assert lines[-1].startswith("' was' over ")
    assert "completeness" in lines[-1]
    records = pd.read_csv(out / "records.csv")
    assert int(records.ablated.notna().sum()) == 4
    assert len(json.loads((out / "graph.json").read_text())["nodes"]) == 3
    names = {"attribute.png", "attribute_ablations.png", "graph.png", "summary.json"}
    assert names <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PROMPT, "--target", " not a token"), "is not one token"),
        (("--target", " was"), "Give one of --prompt TEXT and --text FILE"),
        ((*PROMPT, "--target", " was", "--alternative", " was"), "are the same token"),
        ((*PROMPT, "--target", " was", "--position", 99), "position 99 does not exist"),
    ],
)
def test_wrong_input_is_one_line(sae_folder, tmp_path, arguments, message):
    done = run("attribute", "--sae", sae_folder, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
