"""The position ids of a call: those that it is given, and those that follow its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_models.errors import HookedModelError

if TYPE_CHECKING:
    from hooked_models.calls import Call


def check(call: Call, ids: Any) -> None:
    """Refuse position ids that do not count up: the recurrent layers keep no documents apart.

    Raises:
        HookedModelError: their shape does not fit, or they jump or restart.
    """
    if ids is None:
        return
    batch, length = call.shape
    if (
        not isinstance(ids, Tensor)
        or ids.ndim not in (2, 3)
        or ids.shape[-1] != length
        or (ids.shape[-2] not in (1, batch))
    ):
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise HookedModelError(
            f"position_ids must have shape {batch, length}, that of the tokens; got {shape}"
        )
    if length == 1:
        return
    ids = ids if ids.ndim == 2 else ids[0]
    jumps = (ids[:, 1:] - ids[:, :-1] != 1).expand(batch, -1)
    if call.real is not None:
        jumps = jumps & call.real[:, 1:] & call.real[:, :-1]
    if bool(jumps.any()):
        raise HookedModelError(
            "position_ids do not go up by one from token to token, as those of packed documents: recurrent "
            "layers carry their memory from one document into the next; give each document a row of its own"
        )


def following(call: Call, rearranged: bool, has_attention: bool) -> Int[Tensor, "batch pos"] | None:
    """The position ids that follow those of the cache (None: the model counts from 0 by itself).

    transformers counts a cache's padding as positions even if the ids that filled it did not, and Bamba does
    not count what its cache holds.

    Raises:
        HookedModelError: the rows of the cache were rearranged, and they end at several positions.
    """
    columns, last = call.past.columns, call.past.last_position
    if columns is None or (has_attention and not columns):
        return None
    if last is not None and rearranged and bool((last != last[0]).any()):
        raise HookedModelError(
            "the rows of the cache were rearranged, and end at several positions: give the position_ids "
            "[batch, new]"
        )
    first = columns if last is None else last + 1
    return (first + torch.arange(call.shape[1], device=call.device)).expand(call.shape[0], -1)
