"""The caches of transformers, of any supported version: the keywords for them, and the tensors in them.

This module imports no TransformerLens, for the models in `modeling` need it too.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from hooked_models.errors import HookedModelError

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")
"""Keywords for a cache: of most models, of Mamba-2, and of all models from transformers 5.24 on."""
# Keywords of transformers that concern other parts of a model and change nothing in a recurrent layer.
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


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments and return it (None: there is none).

    Args:
        arguments: a call's keywords; the cache may have any name of `CACHE_ARGUMENTS`.

    Raises:
        HookedModelError: two of the keywords name different caches.
    """
    given = {name: arguments.pop(name) for name in CACHE_ARGUMENTS if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if any(cache is not caches[0] for cache in caches):
        raise HookedModelError(f"{' and '.join(given)} are two different caches: give one")
    return caches[0] if caches else None


def refuse_unknown(arguments: dict[str, Any], taker: str) -> None:
    """Refuse keyword arguments that a layer or model would otherwise ignore.

    Args:
        arguments: the keywords that nothing took; those that concern other parts of a model may stay.
        taker: the layer or model, for the message.

    Raises:
        HookedModelError: there is one. If there are several, the message names one that looks like a cache.
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

    Before transformers 5.14 a layer had bare tensors, since then it has dicts of them.
    """
    if cache is None or not cache.has_previous_state(layer):
        return None
    states = getattr(cache.layers[layer], name)
    return states[0] if isinstance(states, dict) else states


def repeated(cache: Any, count: int) -> Any:
    """A copy of a cache (or None) with every row ``count`` times, one after another."""
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]

    def repeat(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: repeat(item) for name, item in value.items()}
        return value.repeat_interleave(count, dim=0) if isinstance(value, Tensor) and value.ndim else value

    for layer in twin.layers:
        for name, value in vars(layer).items():
            setattr(layer, name, repeat(value))
    return twin
