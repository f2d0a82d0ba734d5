"""Attention with branches in cuts: the same whatever the cut, on a model with softmax attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.bridge import branch_attention
from hooked_models.edited_runs import residual_with_swapped_writes


@pytest.mark.parametrize("at_once", [1, 4 * 24**2])
def test_any_cut_gives_the_same_and_no_matrix_is_larger(monkeypatch: pytest.MonkeyPatch, at_once: int):
    model: Any = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.float64)
    tokens = model.to_tokens(zoo.text("validation"), prepend_bos=False, truncate=False)[0, :20]
    cell, positions = model.cell(1, 2), torch.tensor([19, 0, 3, 3, 7, 12, 18, 1, 1, 5, 9, 11, 2])
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(13, 2, d, generator=generator).double() for d in (cell.d_k, cell.d_v))
    expected = residual_with_swapped_writes(model, tokens, cell, positions, keys, values)
    sides, softmax = [], torch.nn.functional.softmax

    def watched(x: Tensor, *args: Any, **options: Any) -> Tensor:
        sides.append(x.shape[-1])
        return softmax(x, *args, **options)

    monkeypatch.setattr(branch_attention, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(torch.nn.functional, "softmax", watched)
    found = residual_with_swapped_writes(model, tokens, cell, positions, keys, values)
    assert max(sides) == 20 + 10  # as many branches as half of the tokens, where there is less room
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # softmax is in float32
