"""The recurrent layers of flash-linear-attention's DeltaNet, GLA and Gated DeltaNet."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_models.caches import cached, store_state
from hooked_models.modeling.causal_lm import RecurrentCache, masked
from hooked_models.modeling.fla.config import DeltaNetConfig, FLAConfig, GatedDeltaNetConfig, GLAConfig
from hooked_models.recurrence import Recurrence, scan

Change = Callable[[Tensor], Tensor]
_EPSILON = 1e-6
"""Of the kernels that give queries and keys unit length; no field changes it."""
_GATE_RANK, _GATE_NORMALIZER = 16, 16
"""Of GLA's decay: rank of its map, and divisor of its log; fixed in flash-linear-attention's model."""


_FEATURE_MAPS: dict[str, Change] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), times a weight; computed in float32 at least."""

    def __init__(self, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed if self.weight is None else normed * self.weight.to(normed)).to(x.dtype)


class Convolution(NamedTuple):
    """A causal convolution of each channel over positions; it has the attributes of ``nn.Conv1d``."""

    weight: Float[Tensor, "channel one tap"]  # the last tap is the token's own
    bias: None = None


class RecurrentLayer(nn.Module):
    """What the three have in common: queries, keys and values, a short convolution, norm, gate and W_O.

    Args:
        n_key_heads, n_value_heads: heads of keys and of values, which the ``n_heads`` heads share.
        n_query_heads: heads of queries.
        gated: whether the heads' outputs are gated.
    """

    norm_name = "o_norm"
    """The attribute of the norm of each head's output, which checkpoints call it by."""

    def __init__(
        self,
        config: FLAConfig,
        layer_idx: int,
        n_query_heads: int,
        n_key_heads: int,
        n_value_heads: int,
        gated: bool,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.n_heads = max(n_query_heads, n_value_heads)
        self.head_k_dim, self.head_v_dim = d_k, d_v = config.head_sizes()
        size = config.hidden_size
        self.widths = [n_query_heads * d_k, n_key_heads * d_k, n_value_heads * d_v]
        self.use_short_conv = config.use_short_conv
        for name, width in zip("qkv", self.widths, strict=True):
            setattr(self, f"{name}_proj", nn.Linear(size, width, bias=False))
            if self.use_short_conv:
                taps = config.conv_size
                setattr(self, f"{name}_conv1d", nn.Conv1d(width, width, taps, groups=width, bias=False))
        self.g_proj = nn.Linear(size, self.n_heads * d_v, bias=False) if gated else None
        self.o_proj = nn.Linear(self.n_heads * d_v, size, bias=False)

    gate_function: Change = staticmethod(F.silu)

    @abstractmethod
    def inputs(
        self, hidden: Float[Tensor, "batch pos size"], convolve: Change, decay: Change = lambda g: g
    ) -> tuple[Recurrence, Float[Tensor, "batch pos value_dim"] | None]:
        """The recurrence's tensors and the gate's input, from the layer's input.

        Args:
            hidden: the layer's input at each token (the normed residual stream).
            convolve: `convolution` on [batch, pos, channel], whoever runs it.
            decay: what is done to the log decay before it is used.
        """

    def project(self, hidden: Float[Tensor, "batch pos size"], convolve: Change) -> tuple[Tensor, ...]:
        """Flat queries, keys and values, after the convolution and before any activation."""
        flat = torch.cat([getattr(self, f"{name}_proj")(hidden) for name in "qkv"], dim=-1)
        return (convolve(flat) if self.use_short_conv else flat).split(self.widths, dim=-1)

    def heads(self, flat: Float[Tensor, "batch pos channel"], size: int) -> Float[Tensor, "batch pos head d"]:
        """Vectors of each head in the recurrence's dtype; neighbours share one where there are fewer."""
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32)).unflatten(-1, (-1, size))
        return wide.repeat_interleave(self.n_heads // wide.shape[2], dim=2)

    @property
    def convolution(self) -> Convolution:
        """The short convolution of queries, keys and values, side by side."""
        return Convolution(torch.cat([getattr(self, f"{name}_conv1d").weight for name in "qkv"]))

    def gate_of(self, hidden: Tensor) -> Float[Tensor, "batch pos value_dim"] | None:
        return None if self.g_proj is None else self.g_proj(hidden)

    def head_outputs(
        self,
        outputs: Float[Tensor, "batch pos head d_v"],
        gate: Float[Tensor, "batch pos value_dim"] | None,
    ) -> Float[Tensor, "batch pos head d_v"]:
        """What the output projection reads, from the recurrence's outputs: norm of each head, and gate."""
        normed = getattr(self, self.norm_name)(outputs)
        if gate is not None:
            normed = normed * self.gate_function(gate.view_as(outputs).to(normed))
        return normed.to(self.o_proj.weight.dtype)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos size"],
        past_key_values: RecurrentCache | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos size"]:
        hidden = masked(hidden_states, attention_mask)
        recurrence, gate = self.inputs(hidden, lambda x: self._convolve(x, past_key_values))
        outputs, state = scan(recurrence, cached(past_key_values, self.layer_idx, "recurrent_states"))
        if past_key_values is not None:
            store_state(past_key_values, self.layer_idx, state)
        return self.o_proj(self.head_outputs(outputs, gate).flatten(2))

    def _convolve(
        self, x: Float[Tensor, "batch pos channel"], cache: RecurrentCache | None
    ) -> Float[Tensor, "batch pos channel"]:
        """The convolution; the cache has the inputs of the tokens before, as many as there are taps."""
        weight = self.convolution.weight
        taps = weight.shape[-1]
        past = cached(cache, self.layer_idx, "conv_states")
        window = F.pad(x.mT, (taps, 0)) if past is None else torch.cat([past.to(x.dtype), x.mT], dim=-1)
        if cache is not None:
            cache.update_conv_state(window[..., -taps:], self.layer_idx)
        return F.conv1d(window[..., 1:], weight, groups=len(weight)).mT


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Recurrence:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""
    return Recurrence(q=q * q.shape[-1] ** -0.5, g=g, k=k, v=beta[..., None] * v, a=-g.exp() * beta, b=k)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPSILON)


class DeltaNetLayer(RecurrentLayer):
    """DeltaNet (Yang et al. 2024): S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int) -> None:
        heads = config.num_heads
        super().__init__(config, layer_idx, heads, heads, heads, config.use_gate)
        self.activation: Change = {
            "silu": F.silu,
            "relu": F.relu,
            "elu": lambda x: F.elu(x) + 1,
            "identity": lambda x: x,
        }[config.qk_activation]
        self.normalised: Change = {"l2": _unit, "sum": lambda x: F.normalize(x, p=1, dim=-1, eps=_EPSILON)}[
            config.qk_norm
        ]
        self.largest_beta = 2.0 if config.allow_neg_eigval else 1.0
        self.b_proj = nn.Linear(config.hidden_size, heads, bias=False) if config.use_beta else None
        self.o_norm = RMSNorm(self.head_v_dim, config.norm_eps)

    def inputs(
        self, hidden: Float[Tensor, "batch pos size"], convolve: Change, decay: Change = lambda g: g
    ) -> tuple[Recurrence, Float[Tensor, "batch pos value_dim"] | None]:
        q, k, v = self.project(hidden, convolve)
        q, k = (self.normalised(self.activation(self.heads(x, self.head_k_dim))) for x in (q, k))
        v = self.heads(F.silu(v), self.head_v_dim)
        beta = torch.ones_like(v[..., 0]) if self.b_proj is None else self.b_proj(hidden).to(v).sigmoid()
        g = decay(torch.zeros_like(v[..., 0]))
        return _delta_rule(q, k, v, self.largest_beta * beta, g), self.gate_of(hidden)


class GatedDeltaNetLayer(RecurrentLayer):
    """Gated DeltaNet (Yang et al. 2024): DeltaNet with a decay alpha_t of each head."""

    def __init__(self, config: GatedDeltaNetConfig, layer_idx: int) -> None:
        heads, keys, size = config.num_v_heads, config.num_heads, config.hidden_size
        super().__init__(config, layer_idx, keys, keys, heads, config.use_gate)
        self.largest_beta = 2.0 if config.allow_neg_eigval else 1.0
        self.a_proj = nn.Linear(size, heads, bias=False)
        self.b_proj = nn.Linear(size, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.gate_function = F.sigmoid if config.output_gate_activation == "sigmoid" else F.silu
        self.o_norm = RMSNorm(self.head_v_dim, config.norm_eps)

    def inputs(
        self, hidden: Float[Tensor, "batch pos size"], convolve: Change, decay: Change = lambda g: g
    ) -> tuple[Recurrence, Float[Tensor, "batch pos value_dim"] | None]:
        q, k, v = (F.silu(x) for x in self.project(hidden, convolve))
        q, k = (_unit(self.heads(x, self.head_k_dim)) for x in (q, k))
        v = self.heads(v, self.head_v_dim)
        beta, step = self.b_proj(hidden).to(v).sigmoid(), F.softplus(self.a_proj(hidden).to(v) + self.dt_bias)
        g = decay(-self.A_log.to(v).exp() * step)
        return _delta_rule(q, k, v, self.largest_beta * beta, g), self.gate_of(hidden)


class GLALayer(RecurrentLayer):
    """Gated linear attention (Yang et al. 2023): S_t = diag(alpha_t) S_{t-1} + k_t v_t^T."""

    def __init__(self, config: GLAConfig, layer_idx: int) -> None:
        heads, shared = config.num_heads, config.num_kv_heads
        super().__init__(config, layer_idx, heads, shared, shared, config.use_output_gate)
        self.clamp_min = config.clamp_min
        self.feature_map = _FEATURE_MAPS.get(config.feature_map or "")
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, _GATE_RANK, bias=False), nn.Linear(_GATE_RANK, self.widths[1])
        )
        self.norm_name = "g_norm_swish_gate" if config.fuse_norm and config.use_output_gate else "g_norm"
        norm = RMSNorm(self.head_v_dim, config.norm_eps, config.elementwise_affine)
        setattr(self, self.norm_name, norm)

    def inputs(
        self, hidden: Float[Tensor, "batch pos size"], convolve: Change, decay: Change = lambda g: g
    ) -> tuple[Recurrence, Float[Tensor, "batch pos value_dim"] | None]:
        q, k, v = self.project(hidden, convolve)
        if self.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, gate = (self.heads(x, self.head_k_dim) for x in (q, k, self.gk_proj(hidden)))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        g = F.logsigmoid(gate) / _GATE_NORMALIZER
        g = decay(g if self.clamp_min is None else g.clamp(min=self.clamp_min))
        v = self.heads(v, self.head_v_dim)
        return Recurrence(q=q * self.head_k_dim**-0.5, g=g, k=k, v=v), self.gate_of(hidden)
