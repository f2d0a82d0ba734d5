"""Gated DeltaNet (Qwen3.5, Qwen3-Next) with hook points on its cache writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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

    @torch.no_grad()
    def stop_decay(self) -> None:
        """Make the layer a DeltaNet: every decay is 1, and it forgets only what it overwrites."""
        self.wrapped.A_log.fill_(-float("inf"))

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, Tensor]:
        layer = self.wrapped
        mixed, z, b, a = self._project(hidden)  # [batch, pos, channel] twice, [batch, pos, head] twice
        mixed = causal_convolution(mixed, layer.conv1d, cache, self.layer_index, real)
        mixed = torch.nn.functional.silu(mixed)
        q, k, v = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
        d_k, d_v = self.write_shape
        repeats = layer.num_v_heads // layer.num_k_heads
        wide = torch.promote_types(hidden.dtype, torch.float32)  # of the recurrence, from here on
        q, k = (_unit(x.to(wide).unflatten(-1, (-1, d_k))) for x in (q, k))
        if repeats > 1:
            q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
        v = v.to(wide).unflatten(-1, (-1, d_v))
        beta = b.sigmoid().to(wide)
        g = -layer.A_log.to(wide).exp() * torch.nn.functional.softplus(a.to(wide) + layer.dt_bias)
        g = self.fire_decay(g)
        return Recurrence(q=q * d_k**-0.5, g=g, k=k, v=beta[..., None] * v, a=-g.exp() * beta, b=k), z

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: Tensor
    ) -> Float[Tensor, "batch pos head d_v"]:
        z, d_v = bypass, outputs.shape[-1]
        normed = self.wrapped.norm(outputs.to(z.dtype).reshape(-1, d_v), z.reshape(-1, d_v))
        return normed.view(outputs.shape)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6): the normalisation of transformers' layer, with its fixed epsilon."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
