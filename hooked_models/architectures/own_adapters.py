"""Adapters for hybrids that TransformerLens does not know: Kimi Linear, Ling 3.0, MiniMax.

They are written as its own adapters are. The table in `adapters` puts the hooked mixers into the slot
``attn``, which holds the recurrence in some layers and softmax attention in the others.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    LinearBridge,
    MLABlockBridge,
    MoEBridge,
    MoERouterBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooked_models.architectures.lightning import LightningCache
from hooked_models.caches import cache_in
from hooked_models.errors import HookedModelError


class HybridBlock(MLABlockBridge):
    """A block without hooks on the inputs of q, k and v, which a recurrence has not."""


class PostNormBlock(HybridBlock):
    """A block whose residual branch is the normed stream, ``ln(x) * alpha + f(ln(x)) * beta``.

    What attention and MLP return is not what the stream gets, so there are no hooks of these names.
    """

    adds_its_parts = False
    """Read by `hooked_models.bridge.activation_cache`."""
    hook_aliases: ClassVar = {
        name: place
        for name, place in HybridBlock.hook_aliases.items()
        if name not in ("hook_attn_out", "hook_mlp_out")
    }


class HybridAdapter(ArchitectureAdapter):
    """A decoder with Hugging Face's usual names, mixtures of experts, and one slot for all mixers."""

    supports_fold_ln = False
    block: ClassVar[type[HybridBlock]] = HybridBlock

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.cfg.attn_implementation = "eager"
        self.weight_processing_conversions = {}
        norms = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": self.block(
                name="model.layers",
                submodules={
                    **{slot: RMSNormalizationBridge(name=n, config=self.cfg) for slot, n in norms.items()},
                    "attn": GeneralizedComponent(name="self_attn"),
                    "mlp": self._mlp(),
                },
            ),
            "ln_final": RMSNormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def _mlp(self) -> MoEBridge:
        """A mixture of experts in some layers, a gated MLP in others."""
        return MoEBridge(
            name="mlp",
            config=self.cfg,
            sparse_required=("gate",),
            submodules={
                "gate": MoERouterBridge(name="gate", optional=True),
                "shared_experts": self._gated_mlp(name="shared_experts", optional=True),
                "dense_gate": LinearBridge(name="gate_proj", optional=True),
                "dense_in": LinearBridge(name="up_proj", optional=True),
                "dense_out": LinearBridge(name="down_proj", optional=True),
            },
        )


class MiniMaxAdapter(HybridAdapter):
    """MiniMax-Text-01 and M1, whose model makes a cache of its own where it is given none."""

    block = PostNormBlock

    def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
        super().prepare_loading(model_name, model_kwargs)
        _refuse_unsupported(model_kwargs["config"])

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        _refuse_unsupported(hf_model.config)
        hf_model.model.register_forward_pre_hook(_with_cache, with_kwargs=True)


def _refuse_unsupported(config: Any) -> None:
    if config.sliding_window is not None:
        raise HookedModelError(
            f"MiniMax with sliding_window={config.sliding_window} is not supported: with padding or swapped "
            "writes its attention would see all earlier tokens"
        )
    if "full_attention" not in config.layer_types:
        raise HookedModelError(
            "MiniMax without a layer of softmax attention is not supported: transformers' model asks such a "
            "layer how many tokens its cache holds"
        )


def _with_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give MiniMax's model the cache that its layers understand, where it would make another one."""
    config: Any = model.config
    use_cache, cache = kwargs.get("use_cache"), cache_in(kwargs)
    if not (config.use_cache if use_cache is None else use_cache):
        return None
    if cache is None:
        return args, kwargs | {"past_key_values": LightningCache(config)}
    if not isinstance(cache, LightningCache):
        raise HookedModelError(
            f"MiniMax takes no {type(cache).__name__}, but a cache of its own kind: make one with "
            "model.new_cache()"
        )
    return None
