"""The layers of an RWKV-7 model, and the cache that they decode with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from hooked_models.caches import cached
from hooked_models.modeling.causal_lm import RecurrentCache, masked
from hooked_models.modeling.rwkv7.config import RWKV7Config
from hooked_models.recurrence import Recurrence, scan

# A channel's log decay lies between this number, -exp(-1/2), and 0 (Peng et al. 2025).
LOWEST_LOG_DECAY = -0.6065306597126334


class RWKV7Cache(RecurrentCache):
    """The cache for decoding: the last input and the state of each attention, the last input of each FFN.

    In a model of n layers, cache layer i belongs to the attention of layer i, cache layer n + i to its FFN.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__([LinearAttentionLayer() for _ in range(2 * n_layers)])


class BonusAndGate(NamedTuple):
    """The two tensors that `RWKV7Attention.head_outputs` needs beside the recurrence's outputs."""

    bonus: Float[Tensor, "batch pos head d_v"]
    gate: Float[Tensor, "batch pos value_dim"]


class LowRank(nn.Module):
    """A low-rank map up(f(down(x))); its parameters have flash-linear-attention's names."""

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
    ) -> tuple[Recurrence, BonusAndGate, Float[Tensor, "batch pos value_dim"]]:
        """The recurrence's tensors, computed from the layer's inputs.

        Args:
            hidden: the layer's input at each token (the normed residual stream).
            previous: the layer's input at the token before (zeros before the first token).
            v_first: the first layer's values; None where this is the first layer.

        Returns:
            the recurrence, the bonus and gate for `head_outputs`, and the first layer's values.
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
        return Recurrence(q=q, g=g, k=k, v=v, a=a, b=b), BonusAndGate(bonus, gate), first

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bonus_and_gate: BonusAndGate
    ) -> Float[Tensor, "batch pos head d_v"]:
        """What the output projection reads, from the recurrence's outputs: norm per head, bonus, gate."""
        bonus, gate = bonus_and_gate
        flat = outputs.to(gate.dtype).flatten(0, 1).flatten(1)
        normed = self.g_norm(flat).view_as(outputs)
        return (normed + bonus) * gate.view_as(outputs)

    def forward(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache_params: RWKV7Cache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden = masked(hidden, attention_mask)
        previous = one_earlier(hidden, cache_params, self.layer_idx)
        recurrence, bonus_and_gate, v_first = self.inputs(hidden, previous, v_first)
        outputs, state = scan(recurrence, cached(cache_params, self.layer_idx, "recurrent_states"))
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return self.o_proj(self.head_outputs(outputs, bonus_and_gate).flatten(2)), v_first


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
        """The layer's output, from each token's input and the input of the token before."""
        delta = previous - hidden
        return self.value(self.act_fn(self.key(torch.addcmul(hidden, delta, self.x_k))))


class RWKV7Block(GradientCheckpointingLayer):
    """One block: x + attn(norm(x)), then x + ffn(norm(x)); block 0 normalises the embedding first."""

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
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
        past_key_values: RWKV7Cache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if hasattr(self, "pre_norm"):
            hidden = self.pre_norm(hidden)
        past = {"cache_params": past_key_values, "attention_mask": attention_mask}
        mixed, first = self.attn(self.attn_norm(hidden), v_first=v_first, **past)
        hidden = hidden + mixed
        return hidden + self.ffn(self.ffn_norm(hidden), **past), first


def one_earlier(
    hidden: Float[Tensor, "batch pos size"], cache: RWKV7Cache | None, layer: int
) -> Float[Tensor, "batch pos size"]:
    """The input at the token before each token (the token shift); the cache has the one before the first.

    Without a cache, zeros stand before the first token. The cache is given the last token's input.
    """
    last = cached(cache, layer, "conv_states")
    # A copy, because the cache is written in place below.
    first = torch.zeros_like(hidden[:, :1]) if last is None else last.mT.to(hidden.dtype, copy=True)
    if cache is not None:
        cache.update_conv_state(hidden[:, -1:].mT.contiguous(), layer)
    return torch.cat([first, hidden[:, :-1]], dim=1)


def _unit(x: Tensor, fused: bool) -> Tensor:
    """Vectors of unit length, as flash-linear-attention's kernel (fused) or BlinkDL's code computes them."""
    if fused:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)
    return F.normalize(x, dim=-1)
