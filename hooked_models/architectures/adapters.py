"""TransformerLens adapters that put the hooked mixers into its bridges.

They go in through ``ArchitectureAdapterFactory.register_adapter``: the entry-point group of
TransformerLens would refuse to replace the adapters that it already has for these architectures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.supported_architectures import (
    Mamba2ArchitectureAdapter,
    Qwen3_5ArchitectureAdapter,
    Qwen3_5MoeArchitectureAdapter,
    Qwen3NextArchitectureAdapter,
    RWKV7ArchitectureAdapter,
)
from transformers import DynamicCache

from hooked_models.architectures.gated_delta_net import HookedGatedDeltaNet
from hooked_models.architectures.mamba2 import HookedMamba2
from hooked_models.architectures.rwkv7 import HookedRWKV7, HookedRWKV7FeedForward
from hooked_models.modeling.rwkv7 import RWKV7Cache


class _HookedLinearAttention:
    """Builds Gated DeltaNet layers as hooked mixers; goes before the adapter in the bases."""

    cfg: Any

    def _build_linear_attn_bridge(self, optional: bool = False) -> Any:
        return HookedGatedDeltaNet(name="linear_attn", config=self.cfg, optional=optional)

    def create_stateful_cache(self, hf_model: Any, *_: Any, **__: Any) -> DynamicCache:
        return DynamicCache(config=hf_model.config)


class HookedQwen3_5Adapter(_HookedLinearAttention, Qwen3_5ArchitectureAdapter):
    """Qwen3.5, text only: also for checkpoints published with a vision tower, which is left out."""


class HookedQwen3_5MoeAdapter(_HookedLinearAttention, Qwen3_5MoeArchitectureAdapter):
    """Qwen3.5 with a mixture of experts, text only."""


class HookedQwen3NextAdapter(_HookedLinearAttention, Qwen3NextArchitectureAdapter):
    """Qwen3-Next."""


class HookedMamba2Adapter(Mamba2ArchitectureAdapter):
    """Mamba-2."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        _blocks(self)["mixer"] = HookedMamba2(name="mixer", config=self.cfg)


class HookedRWKV7Adapter(RWKV7ArchitectureAdapter):
    """RWKV-7, on this package's own model: what TransformerLens does to load another's is left out."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        blocks = _blocks(self)
        blocks["attn"] = HookedRWKV7(name="attn", config=self.cfg)
        blocks["ffn"] = HookedRWKV7FeedForward(name="ffn", config=self.cfg)

    def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
        pass

    def create_stateful_cache(self, hf_model: Any, *_: Any, **__: Any) -> RWKV7Cache:
        return RWKV7Cache(hf_model.config.num_hidden_layers)


def _blocks(adapter: Any) -> dict[str, Any]:
    return adapter.component_mapping["blocks"].submodules


ADAPTERS: dict[str, type] = {
    "Qwen3_5ForCausalLM": HookedQwen3_5Adapter,
    "Qwen3_5MoeForCausalLM": HookedQwen3_5MoeAdapter,
    "Qwen3NextForCausalLM": HookedQwen3NextAdapter,
    "Mamba2ForCausalLM": HookedMamba2Adapter,
    "RWKV7ForCausalLM": HookedRWKV7Adapter,
}


@contextmanager
def registered() -> Iterator[None]:
    """While open, TransformerLens builds recurrent layers as hooked mixers.

    Afterwards its own adapters are back, so that importing this package changes no other bridge.
    """
    known = ArchitectureAdapterFactory._adapters
    before = {name: known.get(name) for name in ADAPTERS}
    for name, adapter in ADAPTERS.items():
        ArchitectureAdapterFactory.register_adapter(name, adapter)
    try:
        yield
    finally:
        for name, adapter in before.items():
            if adapter is None:
                known.pop(name, None)
            else:
                ArchitectureAdapterFactory.register_adapter(name, adapter)
