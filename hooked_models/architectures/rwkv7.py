"""RWKV-7 with hook points on its cache writes."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooked_models import calls
from hooked_models.caches import pop_cache, refuse_unknown
from hooked_models.edits import mix_neighbours
from hooked_models.mixers import AttributeNames, HookedMixer
from hooked_models.modeling.rwkv7.layers import BonusAndGate, one_earlier
from hooked_models.recurrence import Recurrence


class HookedRWKV7(HookedMixer):
    __doc__ = f"""Wraps the time mixing of `hooked_models.modeling.rwkv7`.

    Per head, with removal key u of unit length, rate a and decay w per key channel::

        S_t = (diag(w_t) - (u_t * a_t) u_t^T) S_{{t-1}} + k_t v_t^T

    So the native write has key k (after its scaling by the rate) and value v (after mixing with the first
    layer's), and the erase is another rank-1 term along other vectors: the whole update has rank 2, and
    ``hook_write`` and ``hook_erase`` show and edit its two terms. The bonus (r . r_k * k) v bypasses the
    state: a head without writes still outputs it.

    {HookedMixer.__doc__}"""

    architecture = "rwkv7"
    attribute_names = AttributeNames("n_heads", "head_dim", "head_v_dim", output_projection="o_proj")
    own_arguments = ("v_first",)
    decay_per_channel = True

    def __init__(self, name: str, config: Any = None, optional: bool = False) -> None:
        projections = ("r_proj", "k_proj", "v_proj", "o_proj")
        super().__init__(
            name,
            config=config,
            optional=optional,
            submodules={projection: LinearBridge(name=projection) for projection in projections},
        )

    def inputs(
        self,
        hidden: Float[Tensor, "batch pos d_model"],
        cache: Any,
        real: Bool[Tensor, "batch pos"] | None,
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
    ) -> tuple[Recurrence, tuple[BonusAndGate, Tensor]]:
        previous = _one_earlier(hidden, cache, self.layer_index)
        recurrence, bonus_and_gate, first = self.wrapped.inputs(hidden, previous, v_first)
        recurrence = dataclasses.replace(recurrence, g=self.fire_decay(recurrence.g))
        return recurrence, (bonus_and_gate, first)

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: tuple[BonusAndGate, Tensor]
    ) -> Float[Tensor, "batch pos head d_v"]:
        return self.wrapped.head_outputs(outputs, bypass[0])

    def returned(
        self, output: Float[Tensor, "batch pos d_model"], bypass: tuple[BonusAndGate, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The layer's output, and the first layer's values for the layers to come."""
        return output, bypass[1]


class HookedRWKV7FeedForward(GeneralizedComponent):
    """Wraps the channel mixing, because its token shift mixes neighbours too."""

    def __init__(self, name: str, config: Any = None, optional: bool = False) -> None:
        super().__init__(
            name,
            config=config,
            optional=optional,
            submodules={projection: LinearBridge(name=projection) for projection in ("key", "value")},
            hook_alias_overrides={"hook_pre": "key.hook_out", "hook_post": "value.hook_in"},
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch all_pos"] | Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        cache = pop_cache(options)
        refuse_unknown(options, type(self).__name__)
        layer: Any = self.original_component
        real = calls.real_tokens(attention_mask, hidden_states.shape)
        hidden = calls.without_padding(self.hook_in(hidden_states), real)
        previous = _one_earlier(hidden, cache, layer.cache_idx)
        return calls.without_padding(self.hook_out(layer.mix(hidden, previous)), real)


def _one_earlier(hidden: Tensor, cache: Any, layer: int) -> Tensor:
    """The token shift: each token's predecessor."""
    return mix_neighbours(lambda x: one_earlier(x, cache, layer), hidden)
