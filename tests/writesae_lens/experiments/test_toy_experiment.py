"""A new experiment is one file: a command, a figure, a section of the report, a row of the paper's table."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.writesae_lens.cli.command_line import run, words
from tests.writesae_lens.experiments.contract import CHECKS, Subject
from tests.writesae_lens.experiments.truth import make_sae, writes
from writesae_lens.experiments import EXPERIMENTS, Experiment, ExperimentResult
from writesae_lens.report import make_report
from writesae_lens.reproduce import reproduce

QUESTION = "How large are the writes at each position?"
MODULE = f'''
import pandas as pd
from matplotlib.figure import Figure

from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.options import Count, Natural
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import native_writes
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site


@experiment("toy", question="{QUESTION}", row="a position", table=("mean_norm",), max_passages=4)
def toy_test(model, sae, tokens, every: Count = 1, context_size: Count | None = None, seed: Natural = 0,
             progress_folder: str | None = None, verbose: bool = True):
    """The norm of the native writes.

    Args:
        every: take only every so many positions.
        seed: nothing is random here.

    Returns:
        a result with records passage, position, norm, and a summary with mean_norm.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    run = Run("toy", model, sae, passages, locals())

    def measure(n):
        key, value = native_writes(model, site.cell, passages[n])
        norm = (key.norm(dim=-1) * value.norm(dim=-1))[::every].tolist()
        return pd.DataFrame({{"passage": n, "position": range(0, passages.shape[1], every), "norm": norm}})

    records = run.records(range(len(passages)), measure, "Measuring")
    mean = float(records.norm.mean())
    return run.result(records, {{"mean_norm": mean}}, f"mean norm {{mean:.4f}}")


@figure("toy")
def plot_toy(result):
    drawing = Figure()
    drawing.subplots().plot(result.records.groupby("position").norm.mean())
    return drawing
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    """The experiment of the file above, in the catalogue for as long as these tests run."""
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield EXPERIMENTS["toy"]
    del EXPERIMENTS["toy"]


@pytest.fixture
def sae(gdn: Any) -> Any:
    return make_sae(gdn)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_keeps_the_contract(
    toy: Experiment, check: Callable[[Subject], None], gdn: Any, passages: Tensor, tmp_path: Path
) -> None:
    check(Subject(toy, gdn, passages, tmp_path))


def test_it_measures(toy: Experiment, gdn: Any, sae: Any, passages: Tensor) -> None:
    result = toy.function(gdn, sae, passages, verbose=False)
    norms = writes(gdn, passages).flatten(2).norm(dim=-1)
    assert result.records.norm.tolist() == pytest.approx(norms.flatten().tolist(), rel=1e-5)
    assert result.summary["mean_norm"] == pytest.approx(float(norms.mean()), rel=1e-5)


def test_it_is_a_command_that_help_lists(toy: Experiment, sae: Any, tmp_path: Path) -> None:
    assert f"toy {QUESTION}" in words(run("--help").stdout)
    options = words(run("toy", "--help").stdout)
    assert "--every" in options
    assert "Take only every so many positions." in options
    sae.save_model(tmp_path / "sae")
    out = tmp_path / "out"
    how = ("--sae", tmp_path / "sae", "--every", 4, "--context-size", 20, "--out", out)
    done = run("toy", *how)
    assert done.returncode == 0, done.stderr
    result = ExperimentResult.load(out)
    assert done.stdout.splitlines()[-1] == result.headline
    assert sorted(result.records.passage.unique()) == [0, 1, 2, 3]
    assert sorted(result.records.position.unique()) == [0, 4, 8, 12, 16]
    assert (out / "toy.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("toy", *how[:2], "--every", 0)
    assert wrong.returncode == 2
    assert "--every" in wrong.stderr


def test_the_report_shows_it(toy: Experiment, gdn: Any, sae: Any, passages: Tensor, tmp_path: Path) -> None:
    result = toy.function(gdn, sae, passages, verbose=False)
    page = make_report(tmp_path, gdn, sae, passages, [result], verbose=False).read_text(encoding="utf-8")
    assert QUESTION in page
    assert result.headline in page


def test_reproduce_runs_and_tabulates_it(toy: Experiment, tmp_path: Path) -> None:
    table = reproduce("qwen3.5-0.8b-L9H4", tmp_path, "tiny-gdn", training_tokens=10_000, experiments=("toy",))
    (row,) = table.itertuples()
    result = ExperimentResult.load(tmp_path / "toy")
    assert (row.experiment, row.figure, row.ours) == ("toy", "mean_norm", result.summary["mean_norm"])


def test_an_argument_that_a_function_lacks_is_answered_by_its_name() -> None:
    with pytest.raises(TypeError, match=r"^top_contexts got .*'n_context'; did you mean n_contexts"):
        EXPERIMENTS["contexts"].function(None, None, "", n_context=3)
