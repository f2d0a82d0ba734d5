"""RWKV-7 with hook points on its cache writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import LinearBridge

from hooked_models.caches import refuse_unknown, the_cache
from hooked_models.mixers import BranchAware, Branches, HookedMixer
from hooked_models.modeling.rwkv7.layers import BonusAndGate, masked, one_earlier
from hooked_models.recurrence import Recurrence


class HookedRWKV7(HookedMixer):
    __doc__ = f"""Stands for the time mixing of `hooked_models.modeling.rwkv7`.

    Per head, with removal key u of unit length, rate a and decay w per key channel::

        S_t = (diag(w_t) - (u_t * a_t) u_t^T) S_{{t-1}} + k_t v_t^T

    so the native write has key k (already scaled by the rate) and value v (already mixed with the first
    layer's), and the erase is another rank-1 term along other vectors: the whole update has rank 2, and
    ``hook_write`` and ``hook_erase`` show and edit its two terms. The bonus (r . r_k * k) v bypasses the
    state: a head without writes still puts it out.

    {HookedMixer.__doc__}"""

    architecture = "rwkv7"
    decay_per_channel = True

    def __init__(self, name: str, config: Any = None, optional: bool = False) -> None:
        projections = ("r_proj", "k_proj", "v_proj", "o_proj")
        super().__init__(
            name,
            config=config,
            optional=optional,
            submodules={projection: LinearBridge(name=projection) for projection in projections},
        )
        self._v_first: Tensor | None = None

    @property
    def _layer(self) -> Any:
        return self.original_component

    @property
    def n_heads(self) -> int:
        return self._layer.n_heads

    @property
    def write_shape(self) -> tuple[int, int]:
        return self._layer.head_dim, self._layer.head_v_dim

    @property
    def layer_index(self) -> int:
        return self._layer.layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        v_first: Float[Tensor, "batch pos value_dim"] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output, and the first layer's values for the layers to come."""
        self._v_first = v_first
        try:
            return super().forward(hidden_states, **kwargs), self._v_first
        finally:
            self._v_first = None

    @property
    def output_weight(self) -> Tensor:
        return self._layer.o_proj.weight

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, mask: Tensor | None
    ) -> tuple[Recurrence, BonusAndGate]:
        previous = _predecessors(hidden, cache, self.layer_index, self._branches)
        recurrence, kept, self._v_first = self._layer.inputs(hidden, previous, self._v_first)
        return dataclasses.replace(recurrence, g=self.fire_decay(recurrence.g)), kept

    def finish(
        self, outputs: Float[Tensor, "batch pos head d_v"], kept: BonusAndGate
    ) -> Float[Tensor, "batch pos d_model"]:
        return self._layer.finish(outputs, kept)


class HookedRWKV7FeedForward(BranchAware):
    """Stands for the channel mixing, whose token shift must know branches from passages."""

    def __init__(self, name: str, config: Any = None) -> None:
        super().__init__(
            name,
            config=config,
            submodules={projection: LinearBridge(name=projection) for projection in ("key", "value")},
            hook_alias_overrides={"hook_pre": "key.hook_out", "hook_post": "value.hook_in"},
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch all_pos"] | Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        cache = the_cache(options)
        refuse_unknown(options, type(self).__name__)
        layer: Any = self.original_component
        hidden = masked(self.hook_in(hidden_states), attention_mask)
        previous = _predecessors(hidden, cache, layer.cache_idx, self._branches)
        return self.hook_out(layer.mix(hidden, previous))


def _predecessors(hidden: Tensor, cache: Any, layer: int, branches: Branches | None) -> Tensor:
    """The input one token earlier; a branch has the predecessor of its position's native token."""
    if branches is None:
        return one_earlier(hidden, cache, layer)
    native = one_earlier(hidden[:, : branches.n_native], None, layer)
    return torch.cat([native, native[:, branches.positions]], dim=1)
