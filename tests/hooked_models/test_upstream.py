"""The parts of transformers, TransformerLens and SAELens in the table of `upstream` are as it says.

`test_new_architectures` tests that submodules are set up after the component, `test_mixers` that
``pos_slice`` finds the position axis of heads' activations.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import nn
from transformer_lens import ActivationCache
from transformer_lens.factories import architecture_adapter_factory as factory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformer_lens.utilities import get_tokenizer_with_bos
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from hooked_models import HookedModelError, HookedRecurrent, upstream
from hooked_models.architectures import adapters
from hooked_models.caches import cached
from hooked_models.mixers import HookedMixer
from tests.hooked_models.architectures import Pair, nothing, once_per_architecture, some_tokens

TABLES = {"adapters": factory.ArchitectureAdapterFactory._adapters}
TABLES["model classes"] = factory.SUPPORTED_ARCHITECTURES


class Adapter:
    def __init__(self, cfg: Any) -> None: ...


def test_transformer_lens_looks_model_classes_up_in_both_tables(mamba2_model: Any):
    """And adapters have the slots and methods that rows replace.

    This package's own adapters are for model classes that TransformerLens does not know, or extend its own.
    """
    for name, row in adapters.ADAPTERS.items():
        is_own = row.adapter.__module__.startswith("hooked_models.")
        for table in TABLES.values():
            assert issubclass(row.adapter, table[name]) if name in table else is_own, name
        with adapters.registered():
            assert determine_architecture_from_hf_config(SimpleNamespace(architectures=[name])) == name
        assert callable(row.adapter.prepare_loading)
        assert callable(row.adapter.create_stateful_cache)
    assert set(mamba2_model.adapter.component_mapping["blocks"].submodules) >= {"mixer"}
    config = SimpleNamespace(architectures=["Nobodys"], architecture="Nobodys")
    with upstream.registered({"Nobodys": Adapter}):
        assert determine_architecture_from_hf_config(config) == "Nobodys"
        select = factory.ArchitectureAdapterFactory.select_architecture_adapter
        assert isinstance(select(config), Adapter)


def test_other_bridges_keep_their_own_adapters(gdn_folder: Path, mamba2_folder: Path):
    """Neither importing the package nor booting a model replaces anything of TransformerLens."""
    before = {name: dict(table) for name, table in TABLES.items()}
    with upstream.registered({"Qwen3_5ForCausalLM": int, "NobodysForCausalLM": float}):
        for table in TABLES.values():
            assert (table["Qwen3_5ForCausalLM"], table["NobodysForCausalLM"]) == (int, float)
    assert before == TABLES
    with pytest.raises(ZeroDivisionError), adapters.registered():
        _ = 1 / int(before == TABLES)
    assert before == TABLES
    for folder in (gdn_folder, mamba2_folder):
        HookedRecurrent.boot_transformers(str(folder), device="cpu")
        assert before == TABLES
        other = TransformerBridge.boot_transformers(str(folder), device="cpu")
        assert not [x for x in other.modules() if isinstance(x, HookedMixer)]


def test_every_model_is_loaded_through_what_complete_checkpoints_replaces(gdn_folder: Path):
    before = PreTrainedModel.from_pretrained
    with upstream.complete_checkpoints():
        assert before.__func__ is not PreTrainedModel.from_pretrained.__func__
        _, info = AutoModelForCausalLM.from_pretrained(gdn_folder, output_loading_info=True)
        assert {"missing_keys", "mismatched_keys"} <= set(info)
        with pytest.raises(HookedModelError, match="wrong shape"):
            AutoModelForCausalLM.from_pretrained(
                gdn_folder, intermediate_size=97, ignore_mismatched_sizes=True
            )
    assert PreTrainedModel.from_pretrained == before


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_hooks_of_a_hook_point_are_torchs(direction: Any):
    point = HookPoint()
    assert not upstream.is_listened_to(point)
    for is_permanent in (False, True):
        point.add_hook(nothing, dir=direction, is_permanent=is_permanent)
        assert upstream.is_listened_to(point)
        point.remove_hooks(direction, including_permanent=True)
        assert not upstream.is_listened_to(point)
    assert upstream.is_listened_to(nn.Identity())  # as an SAE in its place


@once_per_architecture
def test_the_bridge_has_the_private_parts_that_its_subclass_uses(pair: Pair):
    for name in ("_add_aliases_to_hooks", "_resolve_hook_name", "_reset_sae"):
        assert callable(getattr(SAETransformerBridge, name)), name
    assert pair.model._acts_to_saes == {}
    assert pair.model._hook_registry.keys() <= pair.model.hook_dict.keys()
    assert "self._reset_sae(" in inspect.getsource(SAETransformerBridge.reset_saes)


@once_per_architecture
@torch.no_grad()
def test_caches_hold_what_is_read_from_them(pair: Pair):
    assert callable(DynamicCache.has_previous_state)
    cache = pair.model.new_cache()
    assert cached(cache, 0, "recurrent_states") is None
    pair.model(some_tokens(2, 5), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    assert isinstance(layer, LinearAttentionLayer)
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name)
        assert cached(cache, 0, name) is (held[0] if isinstance(held, dict) else held)
        assert len(cached(cache, 0, name)) == 2


def test_the_methods_and_arguments_that_checks_rest_on(mamba2_model: Any):
    assert {"dtype", "load_weights", "hf_model"} <= set(upstream.boot_arguments())
    assert (
        inspect.signature(TransformerBridge.run_with_cache).parameters["kwargs"].kind
        is inspect.Parameter.VAR_KEYWORD
    )
    assert "is_stateful_model and not use_stateful_cache" in inspect.getsource(TransformerBridge.generate)
    assert mamba2_model.cfg.is_stateful
    assert all("_original_component" in name for name in mamba2_model.original_model.state_dict())
    assert "state_dict" in inspect.signature(PreTrainedModel.save_pretrained).parameters
    parsed = torch._C._nn._parse_to("cpu", torch.float16)
    assert parsed == (torch.device("cpu"), torch.float16, False, None)
    assert isinstance(mamba2_model.run_with_cache(some_tokens(1, 3))[1], ActivationCache)


def test_tokenizers_are_loaded_again_by_their_name():
    source = inspect.getsource(get_tokenizer_with_bos)
    assert 'init_kwargs.pop("name_or_path")' in source
    assert 'init_kwargs.pop("add_bos_token"' in source
