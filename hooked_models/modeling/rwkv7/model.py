"""The RWKV-7 language model: start values, blocks in a row, and the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hooked_models.caches import refuse_unknown
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


class RWKV7Model(RWKV7PreTrainedModel):
    """The model up to its last hidden state: embedding, blocks and last norm."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RWKV7Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos size"] | None = None,
        past_key_values: RWKV7Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        refuse_unknown(options, "an RWKV-7 model")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:  # as in transformers: layers run twice
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = RWKV7Cache(self.config.num_hidden_layers)
        if past_key_values is not None and not isinstance(past_key_values, RWKV7Cache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: an RWKV-7 model needs an RWKV7Cache"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        v_first, hidden_states = None, [hidden]
        for layer in self.layers:
            # Positional, because the older form of checkpointing differentiates nothing else.
            hidden, v_first = layer(
                hidden, v_first, past_key_values=past_key_values, attention_mask=attention_mask
            )
            hidden_states.append(hidden)
        if past_key_values is not None:
            past_key_values.seen_tokens += hidden.shape[1]
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states[:-1], hidden) if output_hidden_states else None,
        )


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):
    """The RWKV-7 language model; ``from_pretrained`` reads flash-linear-attention's folders as they are."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes an RWKV7Cache itself

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: RWKV7Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Cut the inputs down to the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        options: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        options["attention_mask"] = attention_mask
        if inputs_embeds is None:
            return {"input_ids": input_ids[:, seen:], **options}
        if not seen:
            return {"inputs_embeds": inputs_embeds, **options}
        # Callers differ in whether ``input_ids`` begins with the embedded prompt, so only its end is used.
        return {"input_ids": input_ids[:, -1:], **options}

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos size"] | None = None,
        past_key_values: RWKV7Cache | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " position"] = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and loss, with the arguments of transformers' causal language models.

        ``labels`` are the input ids themselves: they are shifted by one token here.
        """
        if labels is None:
            refuse_unknown(kwargs, "an RWKV-7 model")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
