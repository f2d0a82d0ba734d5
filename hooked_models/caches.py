"""What transformers' caches hold for a recurrent layer, whatever its version."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


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
