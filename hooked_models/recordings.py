"""Recording the recurrences of a forward pass, and the later reads of a head's writes computed from them.

Hook points show a layer's factors one by one; pulling a read back through the transitions needs all of them
at once. `record_recurrences` keeps them as the scan gets them, after every hook on a factor.
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
from hooked_models.recurrence import Recurrence
from hooked_models.responses import later_reads

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

# The mixers that somebody records, and their last recurrences.
_Recording = tuple[frozenset[nn.Module], dict[nn.Module, Recurrence]]
_RECORDING: ContextVar[_Recording | None] = ContextVar("recording of recurrences", default=None)


@contextmanager
def record_recurrences(mixers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Recurrence]]:
    """Record, in this thread, the recurrence of each of these mixers from its last call.

    Edits of whole writes, erases and states (``hook_write`` and its like) and swapped writes are no part of
    it. A recording inside another one has its own mixers, and the outer one sees nothing meanwhile.

    Args:
        mixers: values of ``model.mixers``.
    """
    recorded: dict[nn.Module, Recurrence] = {}
    token = _RECORDING.set((frozenset(mixers), recorded))
    try:
        yield recorded
    finally:
        _RECORDING.reset(token)


def record(mixer: nn.Module, recurrence: Recurrence) -> None:
    """Keep a mixer's recurrence, if it is recorded."""
    recording = _RECORDING.get()
    if recording is not None and mixer in recording[0]:
        recording[1][mixer] = recurrence


@torch.no_grad()
def later_reads_of_head(
    model: HookedRecurrent,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    head: int,
    distances: Sequence[int],
) -> Float[Tensor, "batch pos distance d_k"]:
    """The reads of a head's writes by later tokens: W_t^T r_{t,h} is what W_t adds to S^T q at t + h.

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
    with record_recurrences([model.mixers[layer]]) as recorded:
        model(tokens, prepend_bos=False, return_type=None, stop_at_layer=layer + 1)
    return later_reads(recorded[model.mixers[layer]].heads(head), distances)[:, :, 0]
