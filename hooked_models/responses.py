"""How outputs and states answer to edits, the recurrence of a change; and how later tokens read a write.

The state is linear in the writes, so a change of them obeys the recurrence without its writes::

    D_t = T_t D_{t-1} + difference_t

Where a state is *set*, what came before no longer matters: there T_t counts as 0, and the difference is
that of the states. This module knows tensors only; axis letters are those of `recurrence`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_models.recurrence import (
    CHUNK_SIZE,
    LOG_ZERO,
    Recurrence,
    Trajectory,
    full_precision,
    per_channel,
)


def respond(
    recurrence: Recurrence,
    difference: Float[Tensor, "batch pos head d_k d_v"],
    state_is_set: Bool[Tensor, "batch pos head"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Tensor, "batch pos head d_v"], Float[Tensor, "batch head d_k d_v"]]:
    """How outputs and final state change when the writes, or states, of some tokens change.

    Args:
        recurrence: the native inputs; k and v are not used.
        difference: new minus native write, or state where it is set, any rank.
        state_is_set: positions whose state is set rather than written to (None: nowhere).
        chunk_size: tokens per chunk.

    Returns:
        the change of the outputs ``[batch, pos, head, d_v]`` and of the final state.
    """
    inside, between = _respond(recurrence, difference, state_is_set, chunk_size, read=True)
    return inside + between.read(recurrence.q), between.final_state


def respond_states(
    recurrence: Recurrence, difference: Float[Tensor, "batch pos head d_k d_v"]
) -> Float[Tensor, "batch pos head d_k d_v"]:
    """How every state changes when the writes change by ``difference``; see `respond`."""
    inside, between = _respond(recurrence, difference, None, CHUNK_SIZE, read=False)
    return inside + between.states()


@full_precision
def later_reads(
    recurrence: Recurrence, distances: Sequence[int]
) -> Float[Tensor, "batch pos head distance d_k"]:
    """How later tokens read each write: r_{t,h} = T_{t+1}^T ... T_{t+h}^T q_{t+h}.

    What W_t contributes to the output h tokens on is W_t^T r_{t,h}, so r stands for that read as q_t does for
    the token's own (h = 0). Each read is pulled back once through the largest distance, all positions at a
    time: one elementwise pass over ``[batch, pos, head, d_k]`` a token.

    Args:
        recurrence: of one call that starts without a state, or of the heads of interest (`Recurrence.heads`).
            Its positions are what distances count, padding too: a read that falls on padding is zero.
        distances: h >= 0, in any order.

    Returns:
        the reads, zero where the passage has ended; in the engine's dtype.
    """
    dtype, length = recurrence.dtype, recurrence.q.shape[1]
    rec = recurrence.map(lambda x: x.to(dtype)).with_erase_vector()
    decay, reads = per_channel(rec.g).exp(), rec.q
    found = rec.q.new_zeros(*rec.q.shape[:3], len(distances), rec.q.shape[-1])
    for h in range(max(distances, default=-1) + 1):
        if h >= length:
            break
        if h:  # the read of s, seen from the write at s - h: T_{s-h+1} comes next
            here = slice(1, length - h + 1)
            reads = reads[:, 1:]
            pulled = decay[:, here] * reads
            if rec.a is not None and rec.b is not None:
                pulled.addcmul_(rec.b[:, here], (rec.a[:, here] * reads).sum(-1, keepdim=True))
            reads = pulled
        for place, distance in enumerate(distances):
            if distance == h:
                found[:, : length - h, :, place] = reads
    return found


@full_precision
def _respond(
    recurrence: Recurrence, difference: Tensor, state_is_set: Tensor | None, chunk_size: int, read: bool
) -> tuple[Tensor, Trajectory]:
    """The response in two parts, whose sum is the whole.

    Returns:
        D_t^T q_t (with ``read``) or D_t as far as the position's own chunk causes it, and the trajectory of
        what earlier chunks cause.
    """
    dtype = torch.promote_types(recurrence.dtype, difference.dtype)
    recurrence = recurrence.map(lambda x: x.to(dtype)).with_erase_vector()
    g, a, b = per_channel(recurrence.g), recurrence.a, recurrence.b
    if state_is_set is not None:
        g = g.masked_fill(state_is_set[..., None], LOG_ZERO)
        a = recurrence.without_erase(state_is_set).a
    batch, length, heads, d_k, d_v = difference.shape
    size = max(1, min(chunk_size, length))
    pad = -length % size
    difference = difference.to(dtype)
    if pad:
        difference = torch.nn.functional.pad(difference, (0, 0, 0, 0, 0, 0, 0, pad))

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, N, C, H, D]
        padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, pad))
        return padded.unflatten(1, (-1, size))

    # 1. Inside the chunks, which all step together: D_t = T_t D_{t-1} + difference_t from D_0 = 0.
    steps = difference.unflatten(1, (-1, size))  # [B, N, C, H, K, V]
    q, decay = chunked(recurrence.q), chunked(g).exp()
    left, right = (None, None) if a is None or b is None else (chunked(a), chunked(b))
    change = steps[:, :, 0]  # [B, N, H, K, V]
    collected = []
    for c in range(size):
        if c:
            carried = decay[:, :, c, ..., None] * change
            if left is not None and right is not None:
                erased = right[:, :, c, :, None] @ change
                carried = carried + left[:, :, c, ..., None] * erased
            change = carried + steps[:, :, c]
        collected.append((q[:, :, c, :, None] @ change).squeeze(-2) if read else change)
    inside = torch.stack(collected, dim=2).flatten(1, 2)[:, :length]

    # 2. Between the chunks: the carry of a recurrence that writes nothing, fed with each chunk's last D.
    silent = Recurrence(
        q=recurrence.q,
        g=g.squeeze(-1) if g.shape[-1] == 1 else g,
        k=difference.new_zeros(batch, length, heads, d_k),
        v=difference.new_zeros(batch, length, heads, d_v),
        a=a,
        b=b,
    )
    return inside, Trajectory(silent, inflow=change.transpose(1, 2), chunk_size=size)
