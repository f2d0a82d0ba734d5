"""The table of architectures: which hooked components stand in the blocks of which model class.

A new architecture is one file beside this one, with its mixer, and one row here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformer_lens.model_bridge import supported_architectures as stock
from transformers import DynamicCache

from hooked_models import upstream
from hooked_models.architectures.delta_net import FLAAdapter, HookedDeltaNet, HookedFLAGatedDeltaNet
from hooked_models.architectures.gated_delta_net import HookedGatedDeltaNet, HookedOlmoDeltaNet
from hooked_models.architectures.gla import HookedGLA
from hooked_models.architectures.kda import HookedKDA
from hooked_models.architectures.lightning import HookedLightningAttention, LightningCache
from hooked_models.architectures.mamba2 import HookedMamba2
from hooked_models.architectures.mamba2_hybrids import (
    GraniteMoeHybridAdapter,
    HookedFalconH1Mamba2,
    Zamba2Adapter,
)
from hooked_models.architectures.own_adapters import HybridAdapter, MiniMaxAdapter
from hooked_models.architectures.rwkv7 import HookedRWKV7, HookedRWKV7FeedForward
from hooked_models.modeling.causal_lm import RecurrentCache


def _dynamic_cache(hf_model: Any, *_: Any, **__: Any) -> DynamicCache:
    return DynamicCache(config=hf_model.config)


def _lightning_cache(hf_model: Any, *_: Any, **__: Any) -> LightningCache:
    return LightningCache(hf_model.config)


def _own_cache(hf_model: Any, *_: Any, **__: Any) -> RecurrentCache:
    return hf_model.model.new_cache()


def _prepare_nothing(model_name: str, model_kwargs: dict[str, Any]) -> None:
    """Stands for an adapter's ``prepare_loading``."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How the bridge of one model class is built.

    Args:
        adapter: TransformerLens's adapter of the model class, or of one that is built alike.
        components: the hooked components that replace its own, by their slot in a block. Where a slot holds
            something else in other layers, as attention in a hybrid, the mixer leaves it as it is.
        new_cache: stands for the adapter's ``create_stateful_cache`` (None: its own stays).
        is_own_model: whether the model class is this package's own, so that what the adapter does to load
            another one is left out.
    """

    adapter: type
    components: dict[str, type]
    new_cache: Callable[..., Any] | None = _dynamic_cache
    is_own_model: bool = False


ADAPTERS: dict[str, Row] = {
    # Qwen3.5 is text only, also where a checkpoint was published with a vision tower.
    "Qwen3_5ForCausalLM": Row(stock.Qwen3_5ArchitectureAdapter, {"linear_attn": HookedGatedDeltaNet}),
    "Qwen3_5MoeForCausalLM": Row(stock.Qwen3_5MoeArchitectureAdapter, {"linear_attn": HookedGatedDeltaNet}),
    "Qwen3NextForCausalLM": Row(stock.Qwen3NextArchitectureAdapter, {"linear_attn": HookedGatedDeltaNet}),
    "OlmoHybridForCausalLM": Row(stock.OlmoHybridArchitectureAdapter, {"linear_attn": HookedOlmoDeltaNet}),
    "KimiLinearForCausalLM": Row(HybridAdapter, {"attn": HookedKDA}),
    "BailingHybridForCausalLM": Row(HybridAdapter, {"attn": HookedKDA}),
    # What published checkpoints of Ling 3.0 call the class before.
    "BailingMoeV3ForCausalLM": Row(HybridAdapter, {"attn": HookedKDA}),
    "MiniMaxForCausalLM": Row(MiniMaxAdapter, {"attn": HookedLightningAttention}, new_cache=_lightning_cache),
    "Mamba2ForCausalLM": Row(stock.Mamba2ArchitectureAdapter, {"mixer": HookedMamba2}, new_cache=None),
    "NemotronHForCausalLM": Row(stock.NemotronHArchitectureAdapter, {"mixer": HookedMamba2}),
    "GraniteMoeHybridForCausalLM": Row(GraniteMoeHybridAdapter, {"mixer": HookedMamba2}),
    "BambaForCausalLM": Row(stock.BambaArchitectureAdapter, {"mixer": HookedMamba2}),
    "FalconH1ForCausalLM": Row(stock.FalconH1ArchitectureAdapter, {"mamba": HookedFalconH1Mamba2}),
    "Zamba2ForCausalLM": Row(Zamba2Adapter, {"mixer": HookedMamba2}),
    "RWKV7ForCausalLM": Row(
        stock.RWKV7ArchitectureAdapter,
        {"attn": HookedRWKV7, "ffn": HookedRWKV7FeedForward},
        new_cache=_own_cache,
        is_own_model=True,
    ),
    # Of flash-linear-attention's folders.
    "DeltaNetForCausalLM": Row(FLAAdapter, {"attn": HookedDeltaNet}, _own_cache, is_own_model=True),
    "GLAForCausalLM": Row(FLAAdapter, {"attn": HookedGLA}, _own_cache, is_own_model=True),
    "GatedDeltaNetForCausalLM": Row(
        FLAAdapter, {"attn": HookedFLAGatedDeltaNet}, _own_cache, is_own_model=True
    ),
}


def hooked_adapter(row: Row, cfg: Any) -> Any:
    """The row's adapter for a model, with the hooked components in its blocks."""
    adapter = row.adapter(cfg)
    slots = adapter.component_mapping["blocks"].submodules
    for slot, component in row.components.items():
        stock_one = slots[slot]
        slots[slot] = component(name=stock_one.name, config=cfg, optional=stock_one.optional)
    if row.new_cache is not None:
        adapter.create_stateful_cache = row.new_cache
    if row.is_own_model:
        adapter.prepare_loading = _prepare_nothing
    return adapter


def registered() -> AbstractContextManager[None]:
    """While open, TransformerLens builds the bridges of the model classes in `ADAPTERS` with their rows."""
    return upstream.registered(
        {model_class: functools.partial(hooked_adapter, row) for model_class, row in ADAPTERS.items()}
    )
