"""The caches of transformers, of any supported version: the keywords for them, and what is in them.

This module imports no TransformerLens, for the models in `modeling` need it too.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_models.errors import HookedModelError

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")
"""Keywords for a cache: of most models, of Mamba-2, and of all models from transformers 5.24 on."""
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "max_length_q", "max_length_k")
"""Keywords for the boundaries of several documents in one row."""
# Keywords of transformers that concern other parts of a model and change nothing in a recurrent layer.
_WITHOUT_EFFECT = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments (None: there is none).

    Args:
        arguments: a call's keywords; the cache may have any name of `CACHE_ARGUMENTS`.

    Raises:
        HookedModelError: two of the keywords name different caches.
    """
    given = {name: arguments[name] for name in CACHE_ARGUMENTS if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if any(cache is not caches[0] for cache in caches):
        raise HookedModelError(f"{' and '.join(given)} are two different caches: give one")
    return caches[0] if caches else None


def pop_cache(arguments: dict[str, Any]) -> Any:
    """As `cache_in`; the cache is removed from the arguments."""
    cache = cache_in(arguments)
    for name in CACHE_ARGUMENTS:
        arguments.pop(name, None)
    return cache


def refuse_packing(arguments: dict[str, Any]) -> None:
    """Refuse the boundaries of documents that are packed into one row.

    Raises:
        HookedModelError: there are some.
    """
    packing = [name for name in _PACKING if arguments.get(name) is not None]
    if packing:
        raise HookedModelError(
            f"the model takes no argument {packing[0]!r}, the boundaries of packed documents: recurrent "
            "layers carry their memory from one into the next; give each document a row of its own, padded "
            "on the left, with its attention_mask"
        )


def refuse_unknown(arguments: dict[str, Any], taker: str) -> None:
    """Refuse keyword arguments that a layer or model would otherwise ignore.

    Args:
        arguments: the keywords that nothing took; those that concern other parts of a model may stay.
        taker: the layer or model, for the message.

    Raises:
        HookedModelError: there is one. If there are several, the message names one that looks like a cache.
    """
    refuse_packing(arguments)
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


def store_state(cache: Any, layer: int, state: Tensor) -> None:
    """Put a layer's new state into a cache, which has a past from now on.

    transformers notes the past with a convolution's, which not every recurrence has.
    """
    cache.update_recurrent_state(state, layer)
    if isinstance(cache.layers[layer].has_previous_state, dict):
        cache.layers[layer].has_previous_state[0] = True
    else:
        cache.layers[layer].has_previous_state = True


def check(cache: Any, n_layers: int, recurrent: dict[int, tuple[int, int, int]], batch: int) -> None:
    """Refuse a cache that is another model's, or that the recurrent layers would not honour.

    Args:
        cache: what a call was given.
        n_layers: how many layers a cache of the model has.
        recurrent: heads, d_k and d_v of each recurrent layer, by its number in the cache.
        batch: rows of the call.

    Raises:
        HookedModelError: it does not fit; it records the past, so that it could be rolled back, which a state
            cannot; or it holds another number of rows.
    """
    layers = getattr(cache, "layers", ())
    if len(layers) != n_layers or not all(hasattr(layers[i], "recurrent_states") for i in recurrent):
        raise HookedModelError(
            f"this {type(cache).__name__} of {len(layers)} layers does not fit the model: make one with "
            "model.new_cache()"
        )
    if any(getattr(layer, "record_past", False) for layer in layers):
        raise HookedModelError(
            "the cache records its past to be cropped, but a recurrent state cannot be rolled back: keep "
            "copy.deepcopy(cache) of the point to go back to"
        )
    for layer, (heads, d_k, d_v) in recurrent.items():
        state = cached(cache, layer, "recurrent_states")
        if state is None:
            continue
        if state.shape[1] != heads or state[0, 0].numel() != d_k * d_v:
            raise HookedModelError(
                f"the cache's layer {layer} has states of shape {tuple(state.shape[1:])}, the model's "
                f"{(heads, d_k, d_v)}: it is another model's; make one with model.new_cache()"
            )
        if len(state) != batch:
            raise HookedModelError(
                f"the cache holds {len(state)} rows, the call has {batch}: give as many "
                "(hooked_models.caches.repeated repeats a cache's rows)"
            )


def has_fixed_length(cache: Any) -> bool:
    """Whether a cache (or None) keeps room for tokens to come, so that masks must have columns for them."""
    return any(hasattr(layer, "max_cache_len") for layer in getattr(cache, "layers", ()))


@dataclasses.dataclass(frozen=True)
class Past:
    """What a cache holds, as far as its tensors do not say it.

    Args:
        columns: tokens of each row, padding included (None: unknown).
        mask: False where they are padding (None: nowhere).
        last_position: position id of each row's last token, ``[batch, 1]`` (None: none was given).
        state: a layer's state; reordering the cache's rows replaces it.
        rearranged: whether the rows may have another order than ``mask`` has.
        whole: whether the call that filled the cache came to its end.
    """

    columns: int | None = 0
    mask: Bool[Tensor, "batch past"] | None = None
    last_position: Int[Tensor, "batch one"] | None = None
    state: Tensor | None = None
    rearranged: bool = False
    whole: bool = True

    def n_tokens(self) -> int | Int[Tensor, " batch"] | None:
        """How many tokens of each row the cache holds, without padding (None: unknown)."""
        if self.mask is None:
            return self.columns
        counts = self.mask.sum(1)
        return None if self.rearranged and bool((counts != counts[0]).any()) else counts

    def gone_on(
        self,
        shape: tuple[int, int],
        real: Bool[Tensor, "batch pos"] | None,
        last_position: Int[Tensor, "batch one"] | None,
    ) -> Past:
        """What the cache holds after a call of some more tokens.

        Args:
            shape: rows and tokens of the call.
            real: False where they are padding (None: nowhere).
            last_position: position id of each row's last token (None: none was given).
        """
        earlier = self.columns
        columns = None if earlier is None else earlier + shape[1]
        if last_position is None and self.last_position is not None:
            last_position = self.last_position + shape[1]
        if earlier is None or (self.mask is None and real is None):
            return Past(columns, None, last_position)
        parts = [
            torch.ones(rows_and_length, dtype=torch.bool, device=device) if part is None else part
            for part, rows_and_length, device in (
                (self.mask, (shape[0], earlier), None if real is None else real.device),
                (real, shape, None if self.mask is None else self.mask.device),
            )
        ]
        return Past(columns, torch.cat(parts, dim=1), last_position, rearranged=self.rearranged)


def remember(cache: Any, past: Past) -> None:
    """Note on a cache what it holds; copies of the cache have the note too."""
    cache.hooked_past = dataclasses.replace(past, state=_first_state(cache))


def _first_state(cache: Any) -> Tensor | None:
    """The state of the first layer that has one (None before the first token)."""
    layers = (i for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states"))
    states = (cached(cache, i, "recurrent_states") for i in layers)
    return next((state for state in states if state is not None), None)


def past_of(cache: Any) -> Past:
    """What a cache holds that has been checked (`check`), filled by this package's models or by others.

    Raises:
        HookedModelError: a call that should have filled it ended in an error, or it was cropped.
    """
    state = _first_state(cache)
    if state is None:
        return Past()
    past = getattr(cache, "hooked_past", None)
    length = _seen(cache)
    if past is None:
        return Past(length)
    if not past.whole:
        raise HookedModelError(
            "the last call with this cache ended in an error or at an earlier layer, so that its layers hold "
            "different tokens: make a new one (model.new_cache()) and read the text again"
        )
    if length is not None and past.columns is not None and length != past.columns:
        if length < past.columns:
            raise HookedModelError(
                f"the cache was cropped from {past.columns} to {length} tokens, but a recurrent state cannot "
                "be rolled back: keep copy.deepcopy(cache) of the point to go back to"
            )
        more = length - past.columns  # read by another model
        past = past.gone_on((len(past.mask) if past.mask is not None else 0, more), None, None)
    moved = past.state is not None and state is not past.state
    return dataclasses.replace(past, rearranged=past.rearranged or moved)


def _seen(cache: Any) -> int | None:
    """How many tokens a cache says that it holds, padding included; None where only states are kept."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def numbers_in(cache: Any) -> int:
    """How many numbers the tensors of a cache (or None) hold."""
    values = [x for layer in getattr(cache, "layers", ()) for x in vars(layer).values()]
    tensors = [y for x in values for y in (x.values() if isinstance(x, dict) else [x])]
    return sum(x.numel() for x in tensors if isinstance(x, Tensor))


def repeated(cache: Any, count: int, unused: int = 0) -> Any:
    """A copy of a cache (or None) with every row ``count`` times, one after another.

    Args:
        cache: the cache.
        count: how often.
        unused: the layers below this one are not run with the copy: their rows, if there is one row, are not
            copied.
    """
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]

    def repeat(value: Any, shared: bool = False) -> Any:
        if isinstance(value, dict):
            return {name: repeat(item, shared) for name, item in value.items()}
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if shared and len(value) == 1:
            return value.expand(count, *value.shape[1:])
        return value.repeat_interleave(count, dim=0)

    for number, layer in enumerate(twin.layers):
        for name, value in vars(layer).items():
            setattr(layer, name, repeat(value, number < unused))
    past = getattr(cache, "hooked_past", None)
    if past is not None:
        rows = {name: repeat(getattr(past, name)) for name in ("mask", "last_position")}
        remember(twin, dataclasses.replace(past, **rows))
    return twin
