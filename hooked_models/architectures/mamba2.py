"""Mamba-2 with hook points on its cache writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import GatedRMSNormBridge, LinearBridge

from hooked_models.mixers import AttributeNames, HookedMixer, causal_convolution
from hooked_models.recurrence import Recurrence


class HookedMamba2(HookedMixer):
    __doc__ = f"""Wraps transformers' ``Mamba2Mixer``, and those of Nemotron-H, Granite 4, Bamba and Zamba2.

    Per head, with x, B and C from the convolution and dt clamped to the configured limits::

        S_t = exp(dt_t A) S_{{t-1}} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

    So the native write has key B (shared by the heads of a group) and value dt x, and the transition only
    decays. D x_t bypasses the state: a head without writes still outputs it. The step dt is a factor of both
    decay and write; an edit of ``hook_decay`` changes the decay alone. transformers caches the state
    transposed, [head_dim, d_state]; here it is [d_state, head_dim] = [d_k, d_v], as in other architectures.

    {HookedMixer.__doc__}"""

    architecture = "mamba2"
    attribute_names = AttributeNames(n_heads="num_heads", d_k="ssm_state_size", d_v="head_dim")
    erases = False
    state_is_transposed = True

    def __init__(self, name: str, config: Any = None, optional: bool = False) -> None:
        super().__init__(
            name,
            config=config,
            optional=optional,
            submodules={
                "in_proj": LinearBridge(name="in_proj"),
                "inner_norm": GatedRMSNormBridge(name="norm"),
                "out_proj": LinearBridge(name="out_proj"),
            },
        )

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, tuple[Tensor, Tensor]]:
        layer = self.wrapped
        groups, keys = layer.n_groups, layer.n_groups * layer.ssm_state_size
        gate, mixed, dt = self.projected(hidden).split(
            [layer.intermediate_size, layer.intermediate_size + 2 * keys, layer.num_heads], dim=-1
        )
        mixed = layer.act(causal_convolution(mixed, layer.conv1d, cache, self.layer_index, real))
        x, b, c = mixed.split([layer.intermediate_size, keys, keys], dim=-1)
        wide = torch.promote_types(hidden.dtype, torch.float32)  # of the recurrence, from here on
        x = x.unflatten(-1, (layer.num_heads, -1)).to(wide)
        b, c = (y.unflatten(-1, (groups, -1)).to(wide) for y in (b, c))
        if groups < layer.num_heads:
            b, c = (y.repeat_interleave(layer.num_heads // groups, dim=2) for y in (b, c))
        dt = torch.nn.functional.softplus(dt.to(wide) + layer.dt_bias).clamp(*layer.time_step_limit)
        g = self.fire_decay(-layer.A_log.to(wide).exp() * dt)
        return Recurrence(q=c, g=g, k=b, v=dt[..., None] * x), (gate, x)

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "batch pos head d_v"]:
        gate, x = bypass
        outputs = outputs + self.wrapped.D[:, None] * x
        normed = self.gated(outputs.flatten(2).to(gate.dtype), gate)
        return normed.to(gate.dtype).view(outputs.shape)

    def projected(
        self, hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos gate_and_channel_and_head"]:
        """The gate, the channels of the convolution (x, B, C) and the heads' dt, one after another."""
        return self.wrapped.in_proj(hidden)

    def gated(
        self, outputs: Float[Tensor, "batch pos inner"], gate: Float[Tensor, "batch pos inner"]
    ) -> Float[Tensor, "batch pos inner"]:
        """The gate and the norm on the outputs of all heads."""
        return self.wrapped.norm(outputs, gate)
