"""The models that the tests of hooks run on; see `architectures`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.hooked_models.architectures import MODELS, Pair


@pytest.fixture(params=["gdn", "qwen3_next", "mamba2", "rwkv7"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A model under test. A test that leaves a hook behind fails."""
    model, reference, folder = (
        request.getfixturevalue(f"{request.param}_{x}") for x in ("model", "reference", "folder")
    )
    yield Pair(*dataclasses.astuple(MODELS[request.param]), model, reference, folder)
    left = [hook for hook, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    model.reset_hooks(including_permanent=True)
    assert not left
