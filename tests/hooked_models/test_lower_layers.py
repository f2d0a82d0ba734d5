"""Edited runs that leave out the layers below the cell's: against runs of all layers, and what they run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.bridge.lower_layers import kept, run_lower_layers
from hooked_models.edited_runs import residual_with_added_writes, residual_with_swapped_writes
from hooked_models.unembedding import logits_of, run_to_residual, token_logits

LAYERS = {"tiny-gdn": (1, 3), "tiny-mamba2": (1, 4), "tiny-rwkv7": (1, 3)}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: Any) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture
def ran(model: Any) -> Any:
    """Layers and numbers of tokens that each forward pass ran, in order."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    handles = [
        block.original_component.register_forward_hook(
            lambda _, __, output, n=n: seen.append((n, tuple(_first(output).shape[:2])))
        )
        for n, block in enumerate(model.blocks)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def some_tokens(model: Any, length: int = 20) -> Tensor:
    return model.to_tokens(zoo.text("validation"), prepend_bos=False, truncate=False)[0, :length]


def some_writes(model: Any, layer: int, count: int) -> tuple[Any, Tensor, Tensor]:
    cell, generator = model.cell(layer, 1), torch.Generator().manual_seed(layer)
    key, value = (torch.randn(count, 1, d, generator=generator).double() for d in (cell.d_k, cell.d_v))
    return cell, key, value / 3


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited runs as they would be without leaving anything out."""
    monkeypatch.setattr("hooked_models.edited_runs.run_lower_layers", lambda *_, **__: None)


def test_swapped_writes_equal_runs_of_all_layers(model, monkeypatch, ran):
    tokens, positions = some_tokens(model), torch.tensor([0, 5, 5, 19])
    for layer in (0, *LAYERS[model.cfg.model_name]):
        writes = some_writes(model, layer, 4)
        ran.clear()
        found = residual_with_swapped_writes(model, tokens, writes[0], positions, *writes[1:])
        expected_runs = [(n, (1, 20)) for n in range(layer)]
        assert ran == expected_runs + [(n, (1, 24)) for n in range(layer, len(model.blocks))]
        with monkeypatch.context() as patched:
            everything(patched)
            expected = residual_with_swapped_writes(model, tokens, writes[0], positions, *writes[1:])
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # Mamba-2's stream is in float32


@pytest.mark.parametrize("start", [0, 7])
def test_added_writes_equal_runs_of_all_layers_from_a_cache_or_the_start(model, monkeypatch, ran, start):
    tokens, positions, cache = some_tokens(model), torch.tensor([0, 3, 9]), None
    if start:
        cache = model.new_cache()
        with torch.no_grad():
            run_to_residual(model, tokens[None, :start], past_key_values=cache, use_cache=True)
    before = copy.deepcopy(cache)
    for layer in LAYERS[model.cfg.model_name]:
        cell, keys, values = some_writes(model, layer, 3)
        ran.clear()
        found = residual_with_added_writes(model, tokens[start:], cell, positions, keys, values, cache)
        below = [(n, (1, 20 - start)) for n in range(layer)]
        assert ran == below + [(n, (3, 20 - start)) for n in range(layer, len(model.blocks))]
        with monkeypatch.context() as patched:
            everything(patched)
            expected = residual_with_added_writes(model, tokens[start:], cell, positions, keys, values, cache)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if cache is not None:  # it is left as it was
        after = (run_to_residual(model, tokens[None, start:], past_key_values=c) for c in (cache, before))
        torch.testing.assert_close(*after, rtol=0, atol=0)


def test_what_is_kept_from_another_pass_is_what_the_layers_would_give(model, ran):
    tokens, layer = some_tokens(model), LAYERS[model.cfg.model_name][1]
    with torch.no_grad(), kept(layer) as keep:
        whole = model(tokens[None], return_type="logits", use_cache=False)
    assert keep.found is not None
    assert keep.found.n_numbers >= 20 * model.cfg.d_model
    alone = run_lower_layers(model, tokens[None], layer, use_cache=False)
    assert alone is not None
    torch.testing.assert_close(_first(keep.found.output), _first(alone.output), rtol=0, atol=0)
    ran.clear()
    with torch.no_grad():
        rest = model(tokens[None], lower=alone, use_cache=False)
    assert [n for n, _ in ran] == list(range(layer, len(model.blocks)))
    torch.testing.assert_close(rest, whole, rtol=1e-9, atol=1e-9)


def test_a_pass_inside_the_one_that_is_kept_is_not_kept(model):
    """A hook that calls the model, below the layer and above."""
    tokens, layer = some_tokens(model), LAYERS[model.cfg.model_name][0]
    alone = run_lower_layers(model, tokens[None], layer, use_cache=False)
    assert alone is not None
    for hook in ("blocks.0.hook_in", f"blocks.{layer}.hook_out"):
        once = []

        def read(x: Tensor, hook: Any, once: list[int] = once) -> None:
            if not once:
                once.append(1)
                model(tokens[None, :3], use_cache=False)

        with torch.no_grad(), kept(layer) as keep, model.hooks(fwd_hooks=[(hook, read)]):
            model(tokens[None], use_cache=False)
        assert once
        assert keep.found is not None
        torch.testing.assert_close(_first(keep.found.output), _first(alone.output), rtol=0, atol=0)


def test_hooks_below_the_cell_see_every_row(model):
    """Then nothing is left out: the hook may do something else in each row."""
    tokens, layer = some_tokens(model), LAYERS[model.cfg.model_name][0]
    cell, keys, values = some_writes(model, layer, 2)
    rows = []

    def see(x: Tensor, hook: Any) -> None:
        rows.append(len(x))

    with model.hooks(fwd_hooks=[("blocks.0.hook_in", see)]):
        residual_with_added_writes(model, tokens, cell, torch.tensor([1, 2]), keys, values)
    assert rows == [2]
    with model.hooks(fwd_hooks=[("unembed.hook_out", see)]):
        assert run_lower_layers(model, tokens[None], layer, use_cache=False) is not None
    assert run_lower_layers(model, tokens[None], 0) is None


def test_gradients_of_swapped_writes_are_those_of_all_layers(model, monkeypatch):
    tokens, positions = some_tokens(model), torch.tensor([4, 11])
    cell, keys, values = some_writes(model, LAYERS[model.cfg.model_name][1], 2)
    slopes = []
    for how in ("usual", "checkpointed", "whole"):
        at = values.clone().requires_grad_()
        with monkeypatch.context() as patched:
            if how == "whole":
                everything(patched)
            if how == "checkpointed":
                patched.setattr("hooked_models.edited_runs._GRAPH_AT_ONCE", 0)
            _, branches = residual_with_swapped_writes(model, tokens, cell, positions, keys, at)
        slopes.append(torch.autograd.grad(token_logits(model, branches, tokens[:2]).sum(), at)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes[0], slopes[2], rtol=1e-5, atol=1e-9)


def test_logits_of_one_token_are_those_among_all(model):
    residual = torch.randn(3, model.cfg.d_model, dtype=torch.float64)
    tokens = torch.tensor([5, 0, 17])
    with torch.no_grad():
        expected = logits_of(model, residual).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(token_logits(model, residual, tokens), expected, rtol=1e-9, atol=1e-9)


def test_a_copy_of_a_model_leaves_out_its_own_layers(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block in twin.blocks:
            for weight in block.parameters():
                weight.mul_(1.1)
    tokens, layer = some_tokens(model), LAYERS[model.cfg.model_name][0]
    results = []
    for one in (model, twin):
        lower = run_lower_layers(one, tokens[None], layer, use_cache=False)
        with torch.no_grad():
            whole = one(tokens[None], use_cache=False)
            torch.testing.assert_close(one(tokens[None], lower=lower, use_cache=False), whole)
        results.append(whole)
    assert not torch.allclose(*results)
