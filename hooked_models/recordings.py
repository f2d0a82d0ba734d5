"""The recurrences of a forward pass, kept while it runs, and what they say of how writes are read later.

Hook points show a layer's factors one by one; what a transition does to a read takes all of them at once,
decay and erase included. `record_recurrences` keeps them as the scan gets them, after every hook on a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_models.errors import HookedModelError
from hooked_models.recurrence import Recurrence, later_reads

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

# The mixers that somebody records, with their last recurrences (None: it has not run yet).
_Recording = dict[nn.Module, Recurrence | None]
_RECORDING: ContextVar[_Recording | None] = ContextVar("recording of recurrences", default=None)


@contextmanager
def record_recurrences(mixers: Iterable[nn.Module]) -> Iterator[_Recording]:
    """While open, in this thread, keep the recurrence of each of these mixers from its last call.

    Edits of whole writes, erases and states (``hook_write`` and its like) and swapped writes are no part of
    it. A recording inside another one has its own mixers, and the outer one sees nothing meanwhile.

    Args:
        mixers: values of ``model.mixers``.
    """
    recording: _Recording = dict.fromkeys(mixers)
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def record(mixer: nn.Module, recurrence: Recurrence) -> None:
    """Keep a mixer's recurrence, if somebody records it."""
    recording = _RECORDING.get()
    if recording is not None and mixer in recording:
        recording[mixer] = recurrence


@torch.no_grad()
def later_reads_of_head(
    model: HookedRecurrent,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    head: int,
    distances: Sequence[int],
) -> Float[Tensor, "batch pos distance d_k"]:
    """How the tokens that follow read a head's writes: W_t^T r_{t,h} is what W_t adds to S^T q at t + h.

    Args:
        tokens: passages, each from its beginning; no token is prepended.
        layer, head: the cell.
        distances: h in tokens, 0 for the write's own token.

    Returns:
        r_{t,h} = T_{t+1}^T ... T_{t+h}^T q_{t+h}, zero where the passage has ended.

    Raises:
        HookedModelError: no such cell, or a distance that is no whole number from 0.
    """
    model.cell(layer, head)
    wrong = [h for h in distances if type(h) is not int or h < 0]
    if wrong:
        raise HookedModelError(f"distances are whole numbers of tokens from 0, got {wrong[0]!r:.40}")
    with record_recurrences([model.mixers[layer]]) as recording:
        model(tokens, prepend_bos=False, return_type=None, stop_at_layer=layer + 1)
    recurrence = recording[model.mixers[layer]]
    assert recurrence is not None, "the layer has run"
    return later_reads(recurrence.heads(head), distances)[:, :, 0]
