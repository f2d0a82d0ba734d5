"""Patched writes, against full hooked passes of the corrupted prompt, one by one, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAEError
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.use.patching import patch_writes

CLEAN, CORRUPTED = "My mother was in the garden", "My father was in the garden"
HER, HIM = " her", " him"


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


def difference(model: Any, logits: Tensor) -> float:
    her, him = (model.to_single_token(text) for text in (HER, HIM))
    return float(logits[0, -1, her] - logits[0, -1, him])


@torch.no_grad()
def patched_by_hand(model: Any, layer: int, head: int, position: int) -> float:
    """The metric of a full pass of the corrupted prompt, in which a hook sets one write to the clean one."""
    name = model.write_hook_name(layer, head)
    _, cache = model.run_with_cache(CLEAN, names_filter=[name])

    def patch(write: Tensor, hook: Any) -> Tensor:
        write = write.clone()
        write[:, position] = cache[name][:, position]
        return write

    return difference(model, model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, patch)]))


def test_effects_are_those_of_full_hooked_passes(model: Any) -> None:
    result = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, verbose=False)
    records, length = result.records, model.to_tokens(CLEAN).shape[1]
    with torch.no_grad():
        clean, corrupted = (difference(model, model(text)) for text in (CLEAN, CORRUPTED))
    assert len(records) == len(model.cells) * length
    assert result.summary["metric_clean"] == pytest.approx(clean, abs=1e-6)
    assert result.summary["metric_corrupted"] == pytest.approx(corrupted, abs=1e-6)
    scale = abs(clean - corrupted)
    tested = records[records.effect != 0].sample(6, random_state=0)
    tested = [*tested.itertuples(), *records.loc[records.effect.abs().nlargest(2).index].itertuples()]
    for row in tested:
        expected = patched_by_hand(model, row.layer, row.head, row.position)
        assert row.metric == pytest.approx(expected, abs=1e-5 * max(1, scale))
        assert row.effect == pytest.approx((expected - corrupted) / (clean - corrupted), abs=1e-4)
    assert result.summary["top"][0]["effect"] == records.effect[records.effect.abs().idxmax()]


def test_nothing_is_restored_before_the_prompts_differ(model: Any) -> None:
    records = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, verbose=False).records
    first = int((model.to_tokens(CLEAN) != model.to_tokens(CORRUPTED))[0].nonzero()[0])
    assert (records.effect[records.position < first] == 0).all()
    assert (records.effect[records.position == first] != 0).any()
    assert set(records.text[records.position == first]) == {"father → mother"}


def test_a_metric_of_ones_own_on_cells_of_ones_own(model: Any, tmp_path: Any) -> None:
    cells = [(model.cells[-1].layer, 1), (1, 2)]

    def logit_difference(logits: Tensor) -> Tensor:
        her, him = (model.to_single_token(text) for text in (HER, HIM))
        return logits[0, -1, her] - logits[0, -1, him]

    given = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, cells=cells, verbose=False)
    ids = [model.to_tokens(text)[0] for text in (CLEAN, CORRUPTED)]
    own = patch_writes(model, *ids, metric=logit_difference, cells=cells, verbose=False)
    assert set(zip(own.records.layer, own.records["head"], strict=True)) == set(cells)
    np.testing.assert_allclose(own.records.effect, given.records.effect, atol=1e-6)
    assert own.summary["metric"] == "logit_difference"
    again = ExperimentResult.load(given.save(tmp_path / "patch"))
    np.testing.assert_array_equal(again.records.effect, given.records.effect)
    assert (tmp_path / "patch" / "patch.png").stat().st_size > 5000


def test_wrong_input_is_refused(model: Any, without_type_checks: None) -> None:
    for options, message in (
        ({"corrupted": CORRUPTED + " now"}, "tokens and the corrupted one"),
        ({"corrupted": CLEAN}, "are the same"),
        ({"alternative": None}, "what is measured"),
        ({"metric": lambda logits: 0.0}, "what is measured"),
        ({"target": None, "alternative": None, "metric": "logit"}, "must be a function"),
        ({"target": None, "alternative": None, "metric": lambda logits: 0.0}, "on both prompts"),
        ({"target": None, "alternative": None, "metric": lambda logits: logits}, "must give a number"),
        (
            {"target": None, "alternative": None, "metric": lambda logits: logits[0, 0, 0] * np.nan},
            "gave nan",
        ),
        ({"alternative": HER}, "are the same token"),
        ({"target": True}, "not True"),
        ({"cells": [(1, 2), (1, 2)]}, "given twice"),
        ({"target": " herself and"}, "is not one token"),
        ({"cells": []}, "no cells"),
        ({"cells": [(2000, 0)]}, "no cell at layer 2000"),
    ):
        given = {"corrupted": CORRUPTED, "target": HER, "alternative": HIM, "verbose": False} | options
        with pytest.raises(Exception, match=message) as error:
            patch_writes(model, CLEAN, **given)
        assert len(str(error.value)) < 300
        assert "\n" not in str(error.value)
    with pytest.raises(WriteSAEError, match="HookedRecurrent"):
        patch_writes("tiny-gdn", CLEAN, CORRUPTED, HER, HIM)


def test_metrics_that_are_small_count_by_their_own_size(model: Any) -> None:
    her, him = (model.to_single_token(text) for text in (HER, HIM))

    def small(logits: Tensor) -> Tensor:
        return 1e-9 * (logits[0, -1, her] - logits[0, -1, him])

    first = (model.cells[0].layer, 0)
    given = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, cells=first, verbose=False)
    own = patch_writes(model, CLEAN, CORRUPTED, metric=small, cells=[first], verbose=False)
    np.testing.assert_allclose(own.records.effect, given.records.effect, atol=1e-6)
    assert own.summary["metric_clean"] == pytest.approx(1e-9 * given.summary["metric_clean"], rel=1e-5)


def test_a_metric_that_is_no_number_in_a_patched_run_alone_is_refused(model: Any) -> None:
    calls: list[float] = []

    def breaks(logits: Tensor) -> float:
        calls.append(float(logits[0, -1, 0]))
        return calls[-1] if len(calls) < 3 else float("inf")

    with pytest.raises(WriteSAEError, match="metric gave inf of finite logits"):
        patch_writes(model, CLEAN, CORRUPTED, metric=breaks, cells=[(1, 2)], verbose=False)
    assert len(calls) == 3


def test_cells_are_named_by_text_and_hooked_models_are_refused(model: Any) -> None:
    by_text = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, cells="1:*", verbose=False)
    pairs = [(cell.layer, cell.head) for cell in model.cells if cell.layer == 1]
    given = patch_writes(model, CLEAN, CORRUPTED, HER, HIM, cells=pairs, verbose=False)
    np.testing.assert_array_equal(by_text.records.effect, given.records.effect)
    assert set(zip(by_text.records.layer, by_text.records["head"], strict=True)) == set(pairs)
    with (
        model.hooks(fwd_hooks=[(model.write_hook_name(1, 0), lambda x, hook: 2 * x)]),
        pytest.raises(HookedModelError, match=r"hook_write\.0 is hooked: remove the hooks first"),
    ):
        patch_writes(model, CLEAN, CORRUPTED, HER, HIM, verbose=False)
