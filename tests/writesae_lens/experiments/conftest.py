"""Fixtures of the experiments' tests: shipped models, passages of their text, few resamples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import read_passages


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
