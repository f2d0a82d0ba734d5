"""The language models of flash-linear-attention's folders: blocks in a row, and start values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from hooked_models.modeling.causal_lm import RecurrentCache, RecurrentForCausalLM, RecurrentModel
from hooked_models.modeling.fla.config import DeltaNetConfig, FLAConfig, GatedDeltaNetConfig, GLAConfig
from hooked_models.modeling.fla.layers import (
    DeltaNetLayer,
    GatedDeltaNetLayer,
    GLALayer,
    RecurrentLayer,
    RMSNorm,
)


class SoftmaxAttention(LlamaAttention):
    """Softmax attention of a hybrid's layer: Llama's, with biases of q, k and v where the field says so."""

    def __init__(self, config: FLAConfig, layer_idx: int, spec: dict[str, Any]) -> None:
        heads = spec["num_heads"]
        like_llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=spec.get("num_kv_heads") or heads,
            attention_bias=spec.get("qkv_bias", False),
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": float(spec.get("rope_theta", 1e4))},
            attn_implementation="eager",  # type: ignore[call-arg]  (of every PreTrainedConfig)
        )
        super().__init__(like_llama, layer_idx)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(like_llama)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch pos size"],
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        embeddings = self.rotary(hidden_states, position_ids)
        if attention_mask is not None and attention_mask.dtype == torch.bool:  # of the keys that are seen
            lowest = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=hidden_states.dtype).masked_fill(
                ~attention_mask, lowest
            )
        return super().forward(hidden_states, embeddings, attention_mask, past_key_values)


class FLAMLP(nn.Module):
    """The gated MLP: W_down (SiLU(W_gate x) * W_up x)."""

    def __init__(self, config: FLAConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, wide, bias=False)
        self.up_proj = nn.Linear(size, wide, bias=False)
        self.down_proj = nn.Linear(wide, size, bias=False)
        self.act_fn = F.silu

    def forward(self, x: Float[Tensor, "batch pos size"]) -> Float[Tensor, "batch pos size"]:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FLABlock(GradientCheckpointingLayer):
    """One block: x + attn(norm(x)), then x + mlp(norm(x)); attn is the recurrence or softmax attention."""

    def __init__(self, config: FLAConfig, layer_idx: int, recurrent: type[Any]) -> None:
        super().__init__()
        spec = config.attention(layer_idx)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn: nn.Module = (
            recurrent(config, layer_idx) if spec is None else SoftmaxAttention(config, layer_idx, spec)
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FLAMLP(config)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos size"],
        past_key_values: RecurrentCache | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos size"]:
        mixed = self.attn(self.attn_norm(hidden_states), past_key_values=past_key_values, **options)
        hidden_states = hidden_states + (mixed[0] if isinstance(mixed, tuple) else mixed)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class FLAPreTrainedModel(PreTrainedModel):
    """Start values of the weights, and loading."""

    config_class = FLAConfig
    base_model_prefix = "model"
    _no_split_modules = ["FLABlock"]  # noqa: RUF012  (the base class declares it so)
    _is_stateful = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """As flash-linear-attention does: decays of Gated DeltaNet from weak to strong, the rest normal."""
        super()._init_weights(module)
        if isinstance(module, GatedDeltaNetLayer):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1e-4, 16).log())
            low, high = math.log(0.001), math.log(0.1)
            step = torch.empty_like(module.dt_bias).uniform_(low, high).exp()
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus of it is the step


class FLAModel(RecurrentModel, FLAPreTrainedModel):
    """The model up to its last hidden state: embedding, blocks and last norm."""

    recurrent: type[RecurrentLayer]
    """The class of the recurrent layers."""

    def __init__(self, config: FLAConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (FLABlock(config, i, self.recurrent) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> RecurrentCache:
        kinds = {"linear_attention": LinearAttentionLayer, "full_attention": DynamicLayer}
        return RecurrentCache([kinds[kind]() for kind in self.config.layer_types])

    def run_layers(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache: RecurrentCache | None,
        attention_mask: Any,
        position_ids: Int[Tensor, "rows pos"] | None,
    ) -> Iterator[Float[Tensor, "batch pos size"]]:
        kinds = self.config.layer_types
        seen = 0 if cache is None else cache.seen_tokens
        options: dict[str, dict[str, Any]] = {"linear_attention": {}, "full_attention": {}}
        if isinstance(attention_mask, dict):  # one for each kind of layer
            masks = attention_mask
        elif attention_mask is not None and attention_mask.ndim == 4:
            masks = {"full_attention": attention_mask}
        else:
            masks = {"linear_attention": attention_mask}
            if "full_attention" in kinds:
                masks["full_attention"] = _causal_mask(hidden, seen, attention_mask)
        for kind, given in options.items():
            given["attention_mask"] = masks.get(kind)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        options["full_attention"]["position_ids"] = position_ids
        for kind, layer in zip(kinds, self.layers, strict=True):
            hidden = layer(hidden, past_key_values=cache, **options[kind])
            yield hidden


def _causal_mask(
    hidden: Float[Tensor, "batch pos size"], seen: int, real: Int[Tensor, "batch all_pos"] | None
) -> Tensor:
    """Which of all tokens each new one sees: those up to itself without padding; padding sees itself too."""
    length = hidden.shape[1]
    key = torch.arange(seen + length, device=hidden.device)
    query = key[seen:, None]
    sees = (key <= query)[None]
    if real is not None:
        sees = sees & (real[:, None] != 0) | (key == query)
    return sees[:, None]


class FLAForCausalLM(RecurrentForCausalLM, FLAPreTrainedModel):
    """A language model of flash-linear-attention; ``from_pretrained`` reads its folders as they are."""

    inner: type[FLAModel]
    """The class of the model without the unembedding."""

    def __init__(self, config: FLAConfig) -> None:
        super().__init__(config)
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DeltaNetModel(FLAModel):
    """DeltaNet up to its last hidden state."""

    config_class = DeltaNetConfig
    recurrent = DeltaNetLayer


class DeltaNetForCausalLM(FLAForCausalLM):
    """The DeltaNet language model."""

    config_class = DeltaNetConfig
    inner = DeltaNetModel


class GLAModel(FLAModel):
    """Gated linear attention up to its last hidden state."""

    config_class = GLAConfig
    recurrent = GLALayer


class GLAForCausalLM(FLAForCausalLM):
    """The gated linear attention language model."""

    config_class = GLAConfig
    inner = GLAModel


class GatedDeltaNetModel(FLAModel):
    """Gated DeltaNet up to its last hidden state."""

    config_class = GatedDeltaNetConfig
    recurrent = GatedDeltaNetLayer


class GatedDeltaNetForCausalLM(FLAForCausalLM):
    """The Gated DeltaNet language model."""

    config_class = GatedDeltaNetConfig
    inner = GatedDeltaNetModel
