"""The commands read and steer: what they print and leave, and one line for bad input."""

import json

import pandas as pd
import pytest
import torch

from hooked_models import HookedRecurrent
from tests.writesae_lens.cli.command_line import run
from tests.writesae_lens.experiments.truth import make_codes, make_sae
from writesae_lens.cli.reading import parse_feature
from writesae_lens.use.reading import read_prompt
from writesae_lens.use.steer import steer

PROMPT = "The house was old"
SHORT = ("--n-tokens", 3, "--n-continuations", 1, "--dose", 1, "--unit", "absolute", "--temperature", 0)


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def saes(model):
    return [make_codes(model, layer=1, head=2), make_sae(model, layer=3, head=0)]


@pytest.fixture(scope="module")
def folder(saes, tmp_path_factory):
    """Two SAEs in folders of one folder, as a sweep has them."""
    folder = tmp_path_factory.mktemp("saes")
    for sae, name in zip(saes, ("L1H2", "L3H0"), strict=True):
        sae.save_model(folder / name)
    return folder


def test_read_prints_the_text_and_leaves_records_and_page(model, saes, folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "prompt.txt").write_text(PROMPT)
    for given in (("--prompt", PROMPT), ("--text", tmp_path / "prompt.txt")):
        done = run("read", "--sae", folder, *given, "--n-features", 2, "--out", out)
        assert done.returncode == 0, done.stderr
        expected = read_prompt(model, saes, PROMPT, n_features=2)
        records = pd.read_csv(out / "records.csv")
        assert records.feature.tolist() == expected.records.feature.tolist()
        assert (out / "read.html").read_text() == expected.page()
        lines = done.stdout.splitlines()
        assert lines[0] == f"1:2  {PROMPT}"
        assert f"3:0  {PROMPT}" in lines
        assert lines[-1] == expected.headline
    one = run("read", "--sae", folder / "L3H0", "--prompt", PROMPT, "--out", out)
    assert " features active in the cell 3:0; " in one.stdout.splitlines()[-1]


def test_steer_prints_continuations_and_leaves_the_dose_curve(model, saes, folder, tmp_path):
    features = ("--feature", "1:2:3", "--feature", "1:2:5+25", "--feature", "3:0:7")
    sizes = ("--size", 2, "--size", 1.5, "--size", -4)
    out = tmp_path / "out"
    promoted = ("--promoted", 11, "--promoted", " the")
    done = run(
        "steer", "--sae", folder, *features, *sizes, "--prompt", PROMPT, *SHORT, *promoted, "--out", out
    )
    assert done.returncode == 0, done.stderr
    named = {(1, 2, 3): 2.0, (1, 2, 5, 25): 1.5, (3, 0, 7): -4.0}
    how = {"n_tokens": 3, "n_continuations": 1, "doses": (1.0,), "unit": "absolute", "temperature": 0.0}
    expected = steer(model, saes, named, PROMPT, promoted=(11, " the"), **how)
    assert done.stdout.splitlines()[-1] == expected.headline
    assert f"steered: {PROMPT}|" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["by_dose"] == expected.summary["by_dose"]
    assert (out / "steer.png").exists()


def test_one_size_is_for_all_features_and_firing_sizes_come_from_a_text(model, saes, folder, tmp_path):
    sae, text = saes[0], "It is a truth universally acknowledged, that a single man must want a wife. " * 40
    (tmp_path / "text.txt").write_text(text)
    sae.cfg.metadata.context_size = None
    result = read_prompt(model, sae, text)
    first, second = result.records.feature.unique()[:2].tolist()
    how = ("--feature", first, "--feature", second, "--size", 2, "--sizes-text", tmp_path / "text.txt")
    short = [x for x in SHORT if x not in ("--unit", "absolute")]
    done = run("steer", "--sae", folder / "L1H2", *how, *short, "--prompt", PROMPT, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [x["size"] for x in summary["features"]] == [2.0, 2.0]
    ids = model.to_tokens(text, prepend_bos=False)[0]
    name = sae.cfg.metadata.hook_name
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    acts = sae.encode(model.run_with_cache(rows, names_filter=[name])[1][name]).flatten(0, 1).double()
    for feature, one in zip((first, second), summary["features"], strict=True):
        median = torch.quantile(acts[acts[:, feature] > 0, feature].detach(), 0.5)
        assert one["coefficient"] == pytest.approx(2 * float(median), rel=1e-4)


def test_features_as_texts():
    assert [parse_feature(x) for x in ("12", "12+600", "1:3:12", "1:3:12+600")] == [
        12,
        (12, 600),
        (1, 3, 12),
        (1, 3, 12, 600),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read"], "which prompt?"),
        (["read", "--prompt", ""], "the prompt is empty"),
        (["read", "--prompt", "a", "--text", "b"], "which prompt?"),
        (["read", "--prompt", "a", "--n-features", "0"], "n-features"),
        (["steer", "--prompt", "a"], "Missing option '--feature'"),
        (["steer", "--prompt", "a", "--feature", "1:2"], "--feature is a number"),
        (["steer", "--prompt", "a", "--feature", "3"], "which SAE has feature 3"),
        (["steer", "--prompt", "a", "--feature", "0:0:3"], "is of the cell 0:0"),
        (["steer", "--prompt", "a", "--feature", "1:2:3", "--feature", "1:2:3"], "--feature is given twice"),
        (["steer", "--prompt", "a", "--feature", "1:2:3", "--size", "1", "--size", "2"], "2 sizes for 1"),
        (["steer", "--prompt", "a", "--feature", "1:2:3", "--dose", "0", *SHORT[6:]], "doses must be pos"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folder, tmp_path):
    done = run(*arguments, "--sae", folder, cwd=tmp_path)
    assert done.returncode == 2
    line = [line for line in done.stderr.splitlines() if line.startswith("writesae-lens: ")][-1]
    assert message in line
    assert len(line) < 300
