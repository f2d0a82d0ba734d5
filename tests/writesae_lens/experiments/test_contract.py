"""Every experiment of the catalogue keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.writesae_lens.experiments.contract import CHECKS, Subject
from writesae_lens import WriteSAEError, experiments
from writesae_lens.experiments import EXPERIMENTS, Experiment
from writesae_lens.experiments.catalogue import find_experiment


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
