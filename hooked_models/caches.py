"""transformers' caches, whatever its version: the names they are passed under and what they hold."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from hooked_models.errors import HookedModelError

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")
"""Keywords for a cache: of most models, of Mamba-2, and of everything from transformers 5.24 on."""
# Keywords of transformers that concern other parts of a model, and change nothing in a recurrent layer.
_WITHOUT_EFFECT = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def the_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, under whichever of `CACHE_ARGUMENTS` it is (None: no cache).

    Raises:
        HookedModelError: two of the keywords name different caches.
    """
    given = {name: arguments.pop(name) for name in CACHE_ARGUMENTS if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if any(cache is not caches[0] for cache in caches):
        raise HookedModelError(f"{' and '.join(given)} are two different caches: give one")
    return caches[0] if caches else None


def refuse_unknown(arguments: dict[str, Any], taker: str) -> None:
    """Refuse keyword arguments that a layer or model would otherwise ignore, those like a cache first.

    Raises:
        HookedModelError: there is one, unless it is known to concern other parts of the model.
    """
    unknown = [name for name, value in arguments.items() if name not in _WITHOUT_EFFECT and value is not None]
    unknown.sort(key=lambda name: "cache" not in name and "past" not in name)
    if unknown:
        raise HookedModelError(
            f"{taker} takes no argument {unknown[0]!r}, and would ignore it: a cache is past_key_values, a "
            "mask attention_mask"
        )


def cached(cache: Any, layer: int, name: str) -> Tensor | None:
    """The ``conv_states`` or ``recurrent_states`` of a layer in a cache, or None before the first token.

    Before transformers 5.14 a layer held bare tensors, since then a dict of them.
    """
    if cache is None or not cache.has_previous_state(layer):
        return None
    held = getattr(cache.layers[layer], name)
    return held[0] if isinstance(held, dict) else held


def repeated(cache: Any, count: int) -> Any:
    """A copy of a cache (or None) with every row ``count`` times, one after another."""
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]

    def repeat(held: Any) -> Any:
        if isinstance(held, dict):
            return {name: repeat(value) for name, value in held.items()}
        return held.repeat_interleave(count, dim=0) if isinstance(held, Tensor) and held.ndim else held

    for layer in twin.layers:
        for name, held in vars(layer).items():
            setattr(layer, name, repeat(held))
    return twin
