"""Every experiment of the catalogue keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.writesae_lens.experiments.contract import CHECKS, Subject
from tests.writesae_lens.experiments.truth import make_sae
from writesae_lens import WriteSAEError, experiments
from writesae_lens.experiments import EXPERIMENTS, Experiment
from writesae_lens.experiments.catalogue import experiment, find_experiment
from writesae_lens.experiments.options import Count
from writesae_lens.experiments.run import fingerprint, fingerprint_sae


@pytest.mark.usefixtures("without_type_checks", "few_resamples")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_contract(
    name: str, check: Callable[[Subject], None], gdn: Any, passages: Tensor, tmp_path: Path
) -> None:
    check(Subject(EXPERIMENTS[name], gdn, passages, tmp_path))


@pytest.mark.parametrize("entry", EXPERIMENTS.values(), ids=lambda entry: entry.name)
def test_the_name_is_that_of_the_module_and_the_function_is_exported(entry: Experiment) -> None:
    assert entry.function.__module__ == f"writesae_lens.experiments.{entry.name}"
    assert getattr(experiments, entry.function.__name__) is entry.function
    assert all(stem.startswith(entry.name) for stem in entry.figures)


def test_former_names_are_found_and_unknown_ones_refused() -> None:
    for former, name in (
        ("replacement", "replace"),
        ("erasure", "erase"),
        ("amplification", "amplify"),
        ("readers", "trace"),
        ("comparison", "compare"),
    ):
        assert find_experiment(former).name == name
    with pytest.raises(WriteSAEError, match="no experiment is called 'x': there are replace"):
        find_experiment("x")


def misdeclared(name="mistaken", second="sae", option="n: Count = 1", **declaration):
    """Declare an experiment whose arguments are the second one, an option and those of every experiment."""
    arguments = f"model, {second}, tokens, {option}, seed=0, progress_folder=None, verbose=True"
    scope: dict = {"Count": Count}
    exec(f"def function({arguments}): pass", scope)
    experiment(name, **({"question": "Why?", "row": "a row"} | declaration))(scope["function"])


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"name": "replace"}, "there is an experiment 'replace' already"),
        ({"second": "thing"}, "lacks an argument that every experiment has: sae, saes or sae_or_cell"),
        ({"option": "out='x'"}, "has an argument 'out', which is an option of every command"),
        ({"option": "m: Count = 0"}, "m=0 makes no sense: give 1 or more"),
        ({"question": None}, "lacks question or row"),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(declaration, message):
    with pytest.raises(WriteSAEError, match=message):
        misdeclared(**declaration)
    assert "mistaken" not in EXPERIMENTS


def test_a_tied_encoders_gain_of_1_does_not_tell_saes_apart(gdn):
    """Files from before the gain was kept have none, and their saved results bear the hash without it."""
    sae = make_sae(gdn, encoder="tied")
    weights = {name: x for name, x in sae.state_dict().items() if name != "enc_gain"}
    assert fingerprint_sae(sae) == fingerprint(*weights.values())
    sae.enc_gain.fill_(0.5)
    assert fingerprint_sae(sae) != fingerprint(*weights.values())
