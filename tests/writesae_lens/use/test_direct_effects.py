"""Direct effects of heads, against logits of the residual stream without the head at the fixed norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.hooked_models.test_logit_attributions import logits_at_fixed_norm
from writesae_lens import WriteSAEError
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.use.direct_effects import head_logit_effects

PROMPT, HER, HIM = "My mother was in the garden, and I ran to kiss", " her", " him"


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@torch.no_grad()
def test_an_effect_is_what_the_logits_lose_without_the_heads_part(model: Any, tmp_path: Any) -> None:
    her, him = (model.to_single_token(text) for text in (HER, HIM))
    last = f"blocks.{len(model.blocks) - 1}.hook_out"
    _, cache = model.run_with_cache(PROMPT)
    stream, logits = cache[last], model(PROMPT)
    single = head_logit_effects(model, PROMPT, HER)
    result = head_logit_effects(model, PROMPT, HER, HIM, position=-3)
    for cell in (model.cells[0], model.cells[-1]):
        w_o = model.mixers[cell.layer].output_projection.weight.mT  # every shipped model has a plain matrix
        heads = cache[model.hook_name(cell.layer, "head_out")]
        own = slice(cell.head * cell.d_v, (cell.head + 1) * cell.d_v)
        lost = logits - logits_at_fixed_norm(model, stream, heads[:, :, cell.head] @ w_o[own])
        row = (result.records.layer == cell.layer) & (result.records["head"] == cell.head)
        assert result.records.effect[row].item() == pytest.approx(
            float(lost[0, -3, her] - lost[0, -3, him]), abs=1e-5
        )
        assert single.records.effect[row].item() == pytest.approx(float(lost[0, -1, her]), abs=1e-5)
    assert single.summary["logit"] == pytest.approx(float(logits[0, -1, her]))
    assert result.summary["heads"] + result.summary["rest"] == pytest.approx(result.summary["logit"])
    again = ExperimentResult.load(result.save(tmp_path / "direct"))
    np.testing.assert_array_equal(again.records.effect, result.records.effect)
    assert (tmp_path / "direct" / "direct.png").stat().st_size > 3000


def test_positions_and_tokens_that_are_not_there_are_refused(model: Any, without_type_checks: None) -> None:
    for options in (
        {"position": 400},
        {"position": -400},
        {"position": 0.5},
        {"target": " herself and"},
        {"target": True},
        {"alternative": HER},
        {"alternative": model.to_single_token(HER)},
    ):
        with pytest.raises(WriteSAEError) as error:
            head_logit_effects(model, PROMPT, **({"target": HER} | options))
        assert len(str(error.value)) < 300
    with (
        model.hooks(fwd_hooks=[(model.write_hook_name(1, 0), lambda x, hook: 2 * x)]),
        pytest.raises(HookedModelError, match=r"hook_write\.0 is hooked: remove the hooks first"),
    ):
        head_logit_effects(model, PROMPT, HER)
