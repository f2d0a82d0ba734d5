"""RWKV-7 in pure PyTorch, with the parameter names of flash-linear-attention's checkpoints.

Needs neither triton nor a GPU: the recurrence runs on `hooked_models.recurrence`. Importing this module
makes transformers' Auto classes know the model type ``rwkv7``, unless another package has claimed it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hooked_models.caches import cached, refuse_unknown
from hooked_models.recurrence import Recurrence, scan

# The log decay of a channel lies between this and 0: the recipe's -exp(-1/2).
LOWEST_LOG_DECAY = -0.6065306597126334


class RWKV7Config(PreTrainedConfig):
    """Configuration of an RWKV-7 model; fields and defaults as in flash-linear-attention's.

    Args:
        head_dim: d_k of a head; there are ``hidden_size / head_dim`` heads.
        value_dim: sum of d_v over the heads, one number or the same for each layer (None: ``hidden_size``).
        norm_first: whether the embedding goes through a LayerNorm (BlinkDL's ln0).
        fuse_norm: which normalisation the removal key has: x / sqrt(|x|^2 + 1e-6) if true, else
            x / max(|x|, 1e-12) as in BlinkDL's code.
        group_norm_eps: epsilon of the heads' norm (None: ``head_dim * norm_eps``; BlinkDL: 64e-5).
        **kwargs: as for ``PreTrainedConfig``; fields that only choose kernels are kept and unused.

    Raises:
        ValueError: sizes that do not divide, or a hybrid with softmax attention (``attn``).
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (the base class declares it so)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        hidden_ratio: int | float | None = 4,
        intermediate_size: int | None = None,
        value_dim: int | list[int] | None = None,
        decay_low_rank_dim: int = 64,
        gate_low_rank_dim: int = 128,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 16,
        hidden_act: str = "sqrelu",
        max_position_embeddings: int = 2048,
        norm_first: bool = True,
        norm_bias: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        group_norm_eps: float | None = None,
        attn: Any = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if attn is not None:
            raise ValueError(
                "RWKV-7 hybrids with softmax attention layers (config field attn) are not supported"
            )
        head_dim = head_dim or hidden_size // (num_heads or 1)
        if hidden_size % head_dim or (num_heads or hidden_size // head_dim) * head_dim != hidden_size:
            raise ValueError(
                f"heads do not fill hidden_size {hidden_size}: num_heads {num_heads}, head_dim {head_dim}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim
        self.num_heads = hidden_size // head_dim
        self.hidden_ratio = hidden_ratio
        if intermediate_size is None:  # the next multiple of 32
            intermediate_size = -int(-hidden_size * (hidden_ratio or 4) // 32) * 32
        self.intermediate_size = intermediate_size
        widths = set(value_dim) if isinstance(value_dim, list) else {value_dim or hidden_size}
        # All layers mix the first one's values into theirs.
        if len(widths) != 1 or any(width % self.num_heads for width in widths):
            raise ValueError(
                f"value_dim must be one multiple of {self.num_heads} heads for all layers: {value_dim}"
            )
        (self.value_dim,) = widths
        self.decay_low_rank_dim = decay_low_rank_dim
        self.gate_low_rank_dim = gate_low_rank_dim
        self.a_low_rank_dim = a_low_rank_dim
        self.v_low_rank_dim = v_low_rank_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.norm_first = norm_first
        self.norm_bias = norm_bias
        self.norm_eps = norm_eps
        self.fuse_norm = fuse_norm
        self.group_norm_eps = head_dim * norm_eps if group_norm_eps is None else group_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs |= {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**kwargs)


class RWKV7Cache(DynamicCache):
    """What decoding needs of the past: each attention's last input and state, each FFN's last input.

    Layer i of the model holds the attention's in cache layer i, the FFN's in cache layer n + i.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.layers = [LinearAttentionLayer() for _ in range(2 * n_layers)]
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


class Kept(NamedTuple):
    """What an attention layer needs beside the recurrence's outputs to finish."""

    bonus: Float[Tensor, "batch pos head d_v"]
    gate: Float[Tensor, "batch pos value_dim"]


class LowRank(nn.Module):
    """out = up(f(down(x))); named as in flash-linear-attention's files."""

    def __init__(self, size: int, out: int, rank: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(size, rank, bias=False), activation, nn.Linear(rank, out, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """Time mixing (Peng et al. 2025).

    Per head, with removal key u of unit length, rate a and decay w::

        S_t = (diag(w_t) - (u_t * a_t) u_t^T) S_{t-1} + k_t v_t^T
    """

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        size, value_dim = config.hidden_size, config.value_dim
        self.n_heads, self.head_dim = config.num_heads, config.head_dim
        self.head_v_dim = value_dim // self.n_heads
        self.fuse_norm = config.fuse_norm
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.zeros(1, 1, size)))
        self.k_k = nn.Parameter(torch.zeros(size))
        self.k_a = nn.Parameter(torch.zeros(size))
        self.r_k = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.r_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, value_dim, bias=False)
        self.o_proj = nn.Linear(value_dim, size, bias=False)
        self.w_lora = LowRank(size, size, config.decay_low_rank_dim, nn.Tanh())
        if layer_idx:
            self.v_lora = LowRank(size, value_dim, config.v_low_rank_dim, nn.Identity())
        self.a_lora = LowRank(size, size, config.a_low_rank_dim, nn.Identity())
        self.g_lora = LowRank(size, value_dim, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.n_heads, value_dim, eps=config.group_norm_eps)

    def inputs(
        self,
        hidden: Float[Tensor, "batch pos size"],
        previous: Float[Tensor, "batch pos size"],
        v_first: Float[Tensor, "batch pos value_dim"] | None,
    ) -> tuple[Recurrence, Kept, Float[Tensor, "batch pos value_dim"]]:
        """From layer inputs, and those of the token before, to the recurrence.

        Args:
            hidden: normed residual of each token.
            previous: the same one token earlier (zeros before the first).
            v_first: the first layer's values (None: this is the first layer).

        Returns:
            the recurrence, what `finish` needs, and the first layer's values.
        """
        delta = previous - hidden
        r, w, k, v, a, g = (torch.addcmul(hidden, delta, getattr(self, f"x_{name}")) for name in "rwkvag")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_decay = LOWEST_LOG_DECAY * self.w_lora(w).to(wide).sigmoid()
        r, k = self.r_proj(r), self.k_proj(k)
        rate, gate = self.a_lora(a).sigmoid(), self.g_lora(g)
        value = first = self.v_proj(v)
        if v_first is not None:
            value, first = torch.lerp(value, v_first, self.v_lora(v).sigmoid()), v_first
        removal = _unit((k * self.k_k).unflatten(-1, (self.n_heads, -1)), self.fuse_norm)
        k = torch.addcmul(k, k * (rate - 1), self.k_a)
        r, k, log_decay, rate = (x.unflatten(-1, (self.n_heads, -1)) for x in (r, k, log_decay, rate))
        value = value.unflatten(-1, (self.n_heads, -1))
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * value
        q, g, k, v, a, b = (x.to(wide) for x in (r, log_decay, k, value, removal * rate, -removal))
        return Recurrence(q=q, g=g, k=k, v=v, a=a, b=b), Kept(bonus, gate), first

    def finish(
        self, outputs: Float[Tensor, "batch pos head d_v"], kept: Kept
    ) -> Float[Tensor, "batch pos size"]:
        """From the recurrence's outputs to the layer's: norm per head, bonus, gate, projection."""
        flat = outputs.to(kept.gate.dtype).flatten(0, 1).flatten(1)
        normed = self.g_norm(flat).view_as(outputs)
        return self.o_proj((normed + kept.bonus).flatten(2) * kept.gate)

    def forward(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache_params: RWKV7Cache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden = masked(hidden, attention_mask)
        previous = one_earlier(hidden, cache_params, self.layer_idx)
        recurrence, kept, v_first = self.inputs(hidden, previous, v_first)
        outputs, state = scan(recurrence, cached(cache_params, self.layer_idx, "recurrent_states"))
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return self.finish(outputs, kept), v_first


class RWKV7FeedForward(nn.Module):
    """Channel mixing: token shift, then a two-layer network (squared ReLU by default)."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.cache_idx = config.num_hidden_layers + layer_idx
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["relu2" if config.hidden_act == "sqrelu" else config.hidden_act]

    def forward(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache_params: RWKV7Cache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos size"]:
        hidden = masked(hidden, attention_mask)
        return self.mix(hidden, one_earlier(hidden, cache_params, self.cache_idx))

    def mix(
        self, hidden: Float[Tensor, "batch pos size"], previous: Float[Tensor, "batch pos size"]
    ) -> Float[Tensor, "batch pos size"]:
        """From each token's input and its predecessor's."""
        delta = previous - hidden
        return self.value(self.act_fn(self.key(torch.addcmul(hidden, delta, self.x_k))))


class RWKV7Block(nn.Module):
    """x + attn(norm(x)), then x + ffn(norm(x)); layer 0 first normalises the embedding."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

        if config.norm_first and layer_idx == 0:
            self.pre_norm = norm()
        self.attn_norm = norm()
        self.attn = RWKV7Attention(config, layer_idx)
        self.ffn_norm = norm()
        self.ffn = RWKV7FeedForward(config, layer_idx)

    def forward(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache_params: RWKV7Cache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if hasattr(self, "pre_norm"):
            hidden = self.pre_norm(hidden)
        past = {"cache_params": cache_params, "attention_mask": attention_mask}
        mixed, first = self.attn(self.attn_norm(hidden), v_first=v_first, **past)
        hidden = hidden + mixed
        return hidden + self.ffn(self.ffn_norm(hidden), **past), first


class RWKV7PreTrainedModel(PreTrainedModel):
    """Weights, their initial values, and loading."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["RWKV7Block"]  # noqa: RUF012  (the base class declares it so)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Start values after BlinkDL's recipe: mixing by channel and depth, decays spread over channels."""
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
    """Embedding, blocks and last norm."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RWKV7Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
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
        if use_cache and past_key_values is None:
            past_key_values = RWKV7Cache(self.config.num_hidden_layers)
        if past_key_values is not None and not isinstance(past_key_values, RWKV7Cache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: an RWKV-7 model needs an RWKV7Cache"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        v_first, passed = None, [hidden]
        for layer in self.layers:
            hidden, v_first = layer(
                hidden, cache_params=past_key_values, attention_mask=attention_mask, v_first=v_first
            )
            passed.append(hidden)
        if past_key_values is not None:
            past_key_values.seen_tokens += hidden.shape[1]
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*passed[:-1], hidden) if output_hidden_states else None,
        )


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):
    """RWKV-7 language model; loads flash-linear-attention's folders as they are."""

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
        """The tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        given: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        given["attention_mask"] = attention_mask
        if inputs_embeds is None:
            return {"input_ids": input_ids[:, seen:], **given}
        if not seen:
            return {"inputs_embeds": inputs_embeds, **given}
        # The ids may or may not begin with those of the embedded prompt.
        return {"input_ids": input_ids[:, -1:], **given}

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos size"] | None = None,
        past_key_values: RWKV7Cache | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' causal language models; ``labels`` are shifted inside."""
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
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


def masked(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zeros at padding, so that it writes nothing and shifts in nothing."""
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden
    return hidden * attention_mask[:, -hidden.shape[1] :, None].to(hidden.dtype)


def one_earlier(hidden: Tensor, cache: RWKV7Cache | None, layer: int) -> Tensor:
    """Each token's predecessor in ``hidden``: zeros, or what the cache remembers, before the first."""
    held = cached(cache, layer, "conv_states")
    # Copied, for the cache is written in place.
    first = torch.zeros_like(hidden[:, :1]) if held is None else held.mT.to(hidden.dtype, copy=True)
    if cache is not None:
        cache.update_conv_state(hidden[:, -1:].mT.contiguous(), layer)
    return torch.cat([first, hidden[:, :-1]], dim=1)


def _unit(x: Tensor, fused: bool) -> Tensor:
    """Unit length, in the way of flash-linear-attention's kernel or of BlinkDL's code."""
    if fused:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)
    return F.normalize(x, dim=-1)


if RWKV7Config.model_type not in CONFIG_MAPPING:  # else another package answers to the name
    AutoConfig.register(RWKV7Config.model_type, RWKV7Config)
    AutoModel.register(RWKV7Config, RWKV7Model)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM)
