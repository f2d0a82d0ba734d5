"""The RWKV-7 language model: start values, blocks in a row, and the unembedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hooked_models.modeling.causal_lm import RecurrentCache, RecurrentForCausalLM, RecurrentModel
from hooked_models.modeling.rwkv7.config import RWKV7Config
from hooked_models.modeling.rwkv7.layers import RWKV7Attention, RWKV7Block, RWKV7Cache, RWKV7FeedForward


class RWKV7PreTrainedModel(PreTrainedModel):
    """The base class of both models: start values of the weights, and loading."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["RWKV7Block"]  # noqa: RUF012  (the base class declares it so)
    _is_stateful = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Start values by BlinkDL's recipe: token mixing by channel and depth, decays over channels."""
        super()._init_weights(module)
        config: Any = self.config
        if isinstance(module, RWKV7FeedForward):
            depth = (module.cache_idx - config.num_hidden_layers) / config.num_hidden_layers
            channel = torch.arange(config.hidden_size) / config.hidden_size
            init.copy_(module.x_k, 1 - channel ** ((1 - depth) ** 4))
            init.zeros_(module.value.weight)
        if not isinstance(module, RWKV7Attention):
            return
        layer: Any = module
        size, heads = config.hidden_size, config.num_heads
        depth = layer.layer_idx / config.num_hidden_layers
        channel = torch.arange(size) / size
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            init.copy_(getattr(layer, f"x_{name}"), 1 - channel ** (power * (1 - depth)))
        ramp = torch.linspace(0, 1, size)
        in_head = torch.linspace(-1, 1, config.head_dim).repeat(heads)
        zigzag = in_head * in_head.abs()
        last = max(1, config.num_hidden_layers - 1)
        decay = 6 * ramp ** (1 + (layer.layer_idx / last) ** 0.3) - 6
        init.copy_(layer.w_lora.lora[2].bias, decay + 0.5 + 2.5 * zigzag)
        init.copy_(layer.a_lora.lora[2].bias, -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        init.copy_(layer.k_k, 0.71 - 0.1 * (ramp - 0.5))
        init.constant_(layer.k_a, 1.02)
        init.constant_(layer.r_k, -0.04)
        low_rank = [layer.w_lora, layer.a_lora, layer.g_lora]
        if layer.layer_idx:
            value_ramp = torch.linspace(-0.5, 0.5, len(layer.v_lora.lora[2].bias))
            init.copy_(layer.v_lora.lora[2].bias, 0.73 - 0.4 * value_ramp)
            low_rank.append(layer.v_lora)
        for part in low_rank:
            init.zeros_(part.lora[0].weight)
            init.orthogonal_(part.lora[2].weight, gain=0.1)
        for part, gain in ((layer.r_proj, 1.0), (layer.k_proj, 0.1), (layer.v_proj, 1.0)):
            init.orthogonal_(part.weight, gain=gain)
        init.zeros_(layer.o_proj.weight)
        init.constant_(layer.g_norm.weight, ((layer.layer_idx + 1) / config.num_hidden_layers) ** 0.7)


class RWKV7Model(RecurrentModel, RWKV7PreTrainedModel):
    """The model up to its last hidden state: embedding, blocks and last norm."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RWKV7Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> RWKV7Cache:
        return RWKV7Cache(self.config.num_hidden_layers)

    def run_layers(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache: RecurrentCache | None,
        attention_mask: Any,
        position_ids: Int[Tensor, "rows pos"] | None,
    ) -> Iterator[Float[Tensor, "batch pos size"]]:
        v_first = None
        for layer in self.layers:
            # Positional, because the older form of checkpointing differentiates nothing else.
            hidden, v_first = layer(hidden, v_first, past_key_values=cache, attention_mask=attention_mask)
            yield hidden


class RWKV7ForCausalLM(RecurrentForCausalLM, RWKV7PreTrainedModel):
    """The RWKV-7 language model; ``from_pretrained`` reads flash-linear-attention's folders as they are."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
