"""The models that the tests of hooks run on; see `architectures`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hooked_models.architectures import MODELS, Pair


@pytest.fixture(params=["gdn", "qwen3_next", "mamba2", "rwkv7"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A model under test. A test that leaves a hook behind fails."""
    parts = {x: request.getfixturevalue(f"{request.param}_{x}") for x in ("model", "reference", "folder")}
    yield Pair(**vars(MODELS[request.param]), **parts)
    model = parts["model"]
    left = [hook for hook, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    model.reset_hooks(including_permanent=True)
    assert not left
