"""Kimi Delta Attention (Kimi Linear, Ling 3.0) with hook points on its cache writes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_models.architectures.gated_delta_net import HookedGatedDeltaNet
from hooked_models.mixers import AttributeNames, HookedMixer


class HookedKDA(HookedGatedDeltaNet):
    __doc__ = f"""Wraps transformers' ``KimiLinearDeltaAttention`` and ``BailingHybridDeltaAttention``.

    Gated DeltaNet with a decay of each key channel. Per head, with k and q of unit length (q then times
    d_k^-1/2) and alpha = exp(g) of size d_k::

        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{{t-1}} + beta_t k_t v_t^T

    So the native write has key k and value beta v, and the erase reads along alpha * k (in `recurrence`, a is
    -beta k and b is alpha * k). An edit of ``hook_decay`` changes alpha, hence the erase too; an edit of the
    write's factors leaves the erase native. Of the wrapped module the weights, the projections and the gated
    norm are used. In layers with softmax attention (MLA) the same slot holds that.

    {HookedMixer.__doc__}"""

    architecture = "kda"
    attribute_names = AttributeNames("num_heads", "head_dim", "head_dim", output_projection="o_proj")
    decay_per_channel = True

    def wraps(self, component: nn.Module) -> bool:
        return super().wraps(component) and hasattr(component, "forget_gate")

    def project(self, hidden: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer = self.wrapped
        mixed = torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], dim=-1)
        is_low_rank = hasattr(layer, "g_a_proj")
        z = layer.g_b_proj(layer.g_a_proj(hidden)) if is_low_rank else layer.g_proj(hidden)
        g = self._log_decay(hidden)
        return mixed, z, layer.b_proj(hidden).sigmoid().to(g.dtype), g

    def erase_factors(self, g: Tensor, beta: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return -beta, g.exp() * k

    @property
    def output_norm(self) -> nn.Module:
        return self.wrapped.o_norm

    def _log_decay(self, hidden: Tensor) -> Float[Tensor, "batch pos head d_k"]:
        """-rate softplus(x), or lower_bound sigmoid(rate x) where Ling bounds it."""
        gate = self.wrapped.forget_gate
        wide = torch.promote_types(hidden.dtype, torch.float32)
        is_low_rank = hasattr(gate, "f_a_proj")
        x = gate.f_b_proj(gate.f_a_proj(hidden)) if is_low_rank else gate.f_proj(hidden)
        x = (x.to(wide) + gate.dt_bias).unflatten(-1, (self.n_heads, -1))
        rate = gate.A_log.to(wide).exp().view(-1, 1)
        if getattr(gate, "safe_gate", False):
            return gate.lower_bound * torch.sigmoid(rate * x)
        return -rate * torch.nn.functional.softplus(x)
