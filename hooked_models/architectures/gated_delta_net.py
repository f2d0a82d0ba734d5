"""Gated DeltaNet (Qwen3.5, Qwen3-Next, OLMo-Hybrid) with hook points on its cache writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hooked_models.mixers import AttributeNames, HookedMixer, causal_convolution
from hooked_models.recurrence import Recurrence


class HookedGatedDeltaNet(HookedMixer):
    __doc__ = f"""Wraps transformers' ``Qwen3_5GatedDeltaNet`` and ``Qwen3NextGatedDeltaNet``.

    Per value head, with k and q of unit length (q then times d_k^-1/2), alpha = exp(g)::

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{{t-1}} + beta_t k_t v_t^T

    So the native write has key k and value beta v, and the erase reads along k (in `recurrence`, a is
    -alpha beta k and b is k). An edit of ``hook_decay`` changes alpha, hence the erase too; an edit of the
    write's factors leaves the erase native. Of the wrapped module the weights, the projections and the gated
    norm are used.

    {HookedMixer.__doc__}"""

    architecture = "gated_delta_net"
    hook_aliases = {  # noqa: RUF012  (the base class declares it so)
        "hook_linear_attn_in": "hook_in",
        "hook_linear_attn_out": "hook_out",
    }

    attribute_names = AttributeNames(n_heads="num_v_heads", d_k="head_k_dim", d_v="head_v_dim")

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, Tensor]:
        mixed, z, beta, g = self.project(hidden)
        mixed = causal_convolution(mixed, self.wrapped.conv1d, cache, self.layer_index, real)
        mixed = ACT2FN[self.wrapped.activation](mixed).to(g.dtype)
        d_k, d_v = self.write_shape
        values = self.n_heads * d_v
        keys = (mixed.shape[-1] - values) // 2
        q, k, v = mixed.split([keys, keys, values], dim=-1)
        q, k = (_unit(x.unflatten(-1, (-1, d_k))) for x in (q, k))
        if (repeats := self.n_heads // k.shape[2]) > 1:
            q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
        g = self.fire_decay(g)
        a, b = self.erase_factors(g, beta, k)
        v = beta[..., None] * v.unflatten(-1, (-1, d_v))
        return Recurrence(q=q * d_k**-0.5, g=g, k=k, v=v, a=a, b=b), z

    def project(self, hidden: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flat [Q | K | V] before the convolution, the output gate z, and beta and the log decay per head.

        The last two have the recurrence's dtype, float32 at least.
        """
        mixed, z, b, a = self._projections(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        steps = torch.nn.functional.softplus(a.to(wide) + self.wrapped.dt_bias)
        return mixed, z, b.sigmoid().to(wide), -self.wrapped.A_log.to(wide).exp() * steps

    def erase_factors(self, g: Tensor, beta: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a and b of the erase: alpha (I - beta k k^T) has -alpha beta k and k."""
        return -g.exp() * beta, k

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: Tensor
    ) -> Float[Tensor, "batch pos head d_v"]:
        z, d_v = bypass, outputs.shape[-1]
        normed = self.output_norm(outputs.to(z.dtype).reshape(-1, d_v), z.reshape(-1, d_v))
        return normed.view(outputs.shape)

    @property
    def output_norm(self) -> nn.Module:
        """The norm of each head's output, which also applies the gate."""
        return self.wrapped.norm

    def _projections(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flat [Q | K | V] before the convolution, the output gate z, and the gates b and a per head."""
        layer = self.wrapped
        if hasattr(layer, "in_proj_qkv"):
            return (
                layer.in_proj_qkv(hidden),
                layer.in_proj_z(hidden),
                layer.in_proj_b(hidden),
                layer.in_proj_a(hidden),
            )
        # Qwen3-Next interleaves by key head: [q | k | v of its value heads | z of its value heads].
        d_k, d_v = self.write_shape
        repeats = layer.num_v_heads // layer.num_k_heads
        qkvz = layer.in_proj_qkvz(hidden).unflatten(-1, (layer.num_k_heads, -1))
        parts = qkvz.split([d_k, d_k, repeats * d_v, repeats * d_v], dim=-1)
        q, k, v, z = (x.flatten(-2) for x in parts)
        gates = layer.in_proj_ba(hidden).unflatten(-1, (layer.num_k_heads, 2 * repeats))
        b, a = (x.flatten(-2) for x in gates.split(repeats, dim=-1))
        return torch.cat([q, k, v], dim=-1), z, b, a


class HookedOlmoDeltaNet(HookedGatedDeltaNet):
    __doc__ = f"""Wraps transformers' ``OlmoHybridGatedDeltaNet``.

    The recurrence is that of `HookedGatedDeltaNet`; beta is doubled, so that it lies in (0, 2) and a
    transition can have negative eigenvalues, where the model's ``linear_allow_neg_eigval`` says so.

    {HookedMixer.__doc__}"""

    attribute_names = AttributeNames("num_v_heads", "head_k_dim", "head_v_dim", output_projection="o_proj")

    def project(self, hidden: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed, z, beta, g = super().project(hidden)
        return mixed, z, 2 * beta if self.wrapped.allow_neg_eigval else beta, g

    @property
    def output_norm(self) -> nn.Module:
        return self.wrapped.o_norm

    def _projections(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer = self.wrapped
        mixed = torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], dim=-1)
        return mixed, layer.g_proj(hidden), layer.b_proj(hidden), layer.a_proj(hidden)


def _unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6): the normalisation of transformers' layer, with its fixed epsilon."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
