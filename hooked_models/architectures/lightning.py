"""Lightning attention (MiniMax-Text-01, MiniMax-M1) with hook points on its cache writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from hooked_models.mixers import AttributeNames, HookedMixer
from hooked_models.recurrence import Recurrence


class HookedLightningAttention(HookedMixer):
    __doc__ = f"""Wraps transformers' ``MiniMaxLightningAttention``.

    Per head, with q, k and v through SiLU and a decay alpha that is fixed (the later the head and the earlier
    the layer, the smaller)::

        S_t = alpha S_{{t-1}} + k_t v_t^T

    So the native write has key k and value v, and the transition only decays. Of the wrapped module the
    weights, the projections and the norm over all heads are used. In layers with softmax attention the same
    slot holds that.

    {HookedMixer.__doc__}"""

    architecture = "lightning"
    attribute_names = AttributeNames("num_attention_heads", "head_dim", "head_dim")
    erases = False

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, Tensor]:
        layer = self.wrapped
        wide = torch.promote_types(hidden.dtype, torch.float32)  # of the recurrence
        mixed = layer.act_fn(layer.qkv_proj(hidden)).to(wide)
        q, k, v = mixed.unflatten(-1, (self.n_heads, -1)).chunk(3, dim=-1)
        g = -layer.slope_rate.to(wide).flatten().expand(*hidden.shape[:2], -1)
        return Recurrence(q=q, g=self.fire_decay(g), k=k, v=v), layer.output_gate(hidden)

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: Tensor
    ) -> Float[Tensor, "batch pos head d_v"]:
        normed = self.wrapped.norm(outputs.flatten(2).to(bypass.dtype))
        return (bypass.sigmoid() * normed).view(outputs.shape)

    def returned(self, output: Float[Tensor, "batch pos d_model"], bypass: Any) -> tuple[Tensor, None]:
        """The layer's output, and nothing in the place of attention weights."""
        return output, None


class LightningCache(MiniMaxCache):
    """A cache of MiniMax with transformers' usual layers: a state in those that are recurrent.

    MiniMax's model takes no cache but a ``MiniMaxCache``, whose own states fit no call of several tokens.
    """

    def __init__(self, config: Any) -> None:
        DynamicCache.__init__(self, config=config)
        self.linear_cache = []

    batch_repeat_interleave = DynamicCache.batch_repeat_interleave
    batch_select_indices = DynamicCache.batch_select_indices
