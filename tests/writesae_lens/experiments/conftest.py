"""Fixtures of the experiments' tests: shipped models, passages of their text, the edits of their writes."""

from __future__ import annotations

from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import (
    Edits,
    Step,
    read_passages,
    recorded_edits,
    recorded_steps,
    recorded_swaps,
)
from writesae_lens import statistics


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    """Each shipped model in float64, for comparisons with full passes."""
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    """Two passages of 20 tokens."""
    return read_passages(model)


@pytest.fixture(scope="session")
def gdn() -> Any:
    """tiny-gdn in float32. Shared: leave no hook behind."""
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="session")
def passages(gdn: Any) -> Tensor:
    """Two passages of 20 tokens of tiny-gdn."""
    return read_passages(gdn)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[Edits]:
    """The calls of `hooked_models.edited_runs.residual_with_swapped_writes` by the experiments."""
    return recorded_swaps(monkeypatch)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Edits]:
    """The calls of `HookedRecurrent.run_with_added_writes`."""
    return recorded_edits(monkeypatch, "run_with_added_writes")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps of decoding in which something is added."""
    return recorded_steps(monkeypatch)


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users run without them, and get the experiments' own answers to wrong input."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passages have four resamples: drawing 2,000 takes time and shows no more."""
    monkeypatch.setattr(statistics, "N_RESAMPLES", 200)
