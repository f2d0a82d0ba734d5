"""Hybrids that TransformerLens does not know: the hooks of their blocks, and MiniMax's cache and window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from hooked_models import HookedKDA, HookedLightningAttention, HookedRecurrent
from hooked_models.architectures.lightning import LightningCache
from tests.conftest import save_tokenizer
from tests.hooked_models.architectures import assert_close, refused
from tests.hooked_models.model_classes.case import Case, build
from tests.hooked_models.model_classes.delta_rules import minimax
from tests.hooked_models.model_classes.table import MODEL_CLASSES


@pytest.fixture(scope="module", params=["KimiLinearForCausalLM", "MiniMaxForCausalLM"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build(MODEL_CLASSES[request.param], tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def minimax_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build(MODEL_CLASSES["MiniMaxForCausalLM"], tmp_path_factory.mktemp("models") / "minimax")


@torch.no_grad()
def test_blocks_have_the_hooks_that_users_of_transformer_lens_know(case: Case) -> None:
    tokens, n_layers, wide = case.tokens(2, 9), len(case.model.blocks), case.model.cfg.d_model
    parts = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "ln1.hook_scale", "ln2.hook_normalized"]
    parts += ["attn.hook_in", "attn.hook_out", "mlp.hook_in", "mlp.hook_out"]
    names = [f"blocks.{layer}.{part}" for layer in range(n_layers) for part in parts]
    names += ["hook_embed", "ln_final.hook_normalized", "unembed.hook_in"]
    _, cache = case.model.run_with_cache(tokens, names_filter=names)
    for name in names:
        assert cache[name].shape == (2, 9, 1 if name.endswith("scale") else wide), name
    for layer in range(n_layers):
        expected = [f"hook_{x}" for x in ("in", "out")]
        mixer = case.model.blocks[layer].attn
        assert isinstance(mixer, (HookedKDA, HookedLightningAttention))
        assert mixer.is_recurrent == (layer in case.of.layers)
        assert mixer.is_recurrent or sorted(mixer.get_hooks()) == expected
        if layer:
            before, after = (
                cache[f"blocks.{layer - 1}.hook_resid_post"],
                cache[f"blocks.{layer}.hook_resid_pre"],
            )
            assert torch.equal(before, after)


@torch.no_grad()
def test_an_edit_of_softmax_attention_reaches_the_logits(case: Case) -> None:
    tokens = case.tokens(2, 9)
    softmax = next(n for n in range(len(case.model.blocks)) if n not in case.of.layers)
    edit = [(f"blocks.{softmax}.attn.hook_out", lambda x, hook: 0 * x)]
    module = case.reference.get_submodule(case.of.oracle.path.format(softmax))
    handle = module.register_forward_hook(lambda module, args, output: (0 * output[0], None))
    expected = case.logits(tokens)
    handle.remove()
    assert (expected - case.logits(tokens)).abs().max() > 1e-2
    assert_close(case.model.run_with_hooks(tokens, fwd_hooks=edit, use_cache=False), expected)


@torch.no_grad()
def test_minimax_fills_a_cache_that_the_next_call_takes(minimax_case: Case) -> None:
    """Where none is given, as in transformers' own `generate`, whose caches it goes on with too."""
    model: Any = minimax_case.model
    tokens = minimax_case.tokens(2, 12)
    expected = minimax_case.logits(tokens)
    first = model.original_model(tokens[:, :5], use_cache=True)
    assert isinstance(first.past_key_values, LightningCache)
    rest = model(tokens[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, rest], 1), expected)
    found = model.original_model.generate(tokens, max_new_tokens=4, num_beams=3, do_sample=False)
    stock = minimax_case.reference.generate(
        tokens, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False
    )
    assert torch.equal(found, stock)


@torch.no_grad()
def test_minimax_refuses_other_caches(minimax_case: Case) -> None:
    model: Any = minimax_case.model
    tokens = minimax_case.tokens(1, 4)
    for cache in (MiniMaxCache(), DynamicCache(config=model.original_model.config)):
        with refused(type(cache).__name__, "model.new_cache()"):
            model(tokens, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_ling_boots_under_the_name_that_its_checkpoints_have(tmp_path: Path) -> None:
    case = build(MODEL_CLASSES["BailingHybridForCausalLM"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BailingMoeV3ForCausalLM"]}))
    model, tokens = HookedRecurrent.boot_transformers(tmp_path, device="cpu"), case.tokens(1, 9)
    assert model.cells == case.model.cells
    assert torch.equal(model(tokens), case.model(tokens))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"layer_types": ["linear_attention"] * 4}, "without a layer of softmax attention"),
    ],
)
def test_what_minimax_cannot_honour_is_refused(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    model = minimax(**changes)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    for options in ({}, {"hf_model": model}):
        with refused(part):
            HookedRecurrent.boot_transformers(tmp_path, device="cpu", **options)
