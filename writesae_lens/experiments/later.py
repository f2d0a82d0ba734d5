"""Effects of a swapped write on later tokens: KLs over the positions that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.experiments.passes import check_finite, native_factors, wide
from writesae_lens.experiments.swaps import (
    divergence_of,
    log_probabilities,
    logits_floor,
    one_after_another,
    residual_floor,
    summed,
)
from writesae_lens.saes.rank1 import Factors, factor_rank1

# Firings within as many tokens are run together, from one cache of what comes before the first of them.
_SPAN = 16
# Tokens that one pass reads over all its rows (each has a copy of the cache), and logits unembedded at once.
_TOKENS_PER_PASS, _LOGITS_AT_ONCE = 2**11, 2**22


@torch.no_grad()
def later_divergences(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    native: Factors,
    swaps: Sequence[Factors],
    horizon: int,
    kl: str = "patched_base",
    erase: bool = True,
) -> tuple[Float[Tensor, "condition firing"], Float[Tensor, " firing"]]:
    """KL of each condition over the tokens after each firing, and the KL that rounding alone gives, in nats.

    Both are sums over the next ``horizon`` positions; the firing's own is not among them. Every KL equals
    that of a full forward pass with hooks on ``hook_write`` and ``hook_erase``. The passes share what they
    can: the native text before some firings is read once, and the difference of the swapped and the native
    write is added to it (the state is linear in its writes), for many firings and conditions in one batch.

    Args:
        model: the model.
        cell: the cell.
        tokens: one passage.
        positions: of the firings, in ascending order, each with ``horizon`` tokens after it.
        native: the native writes there.
        swaps: for each condition a matrix for every firing, of any rank.
        horizon: how many positions after the firing count.
        kl: direction of the KL divergence, as in `swaps.divergences`.
        erase: whether the token's native erase still happens.

    Raises:
        WriteSAEError: the logits are not finite.
    """
    minus = [Factors(-native.key, native.value)]
    if not erase and model.mixers[cell.layer].erases:
        minus.append(_minus_erases(model, cell, tokens, positions))
    changes = one_after_another(*(summed(swap, *minus) for swap in swaps))
    n, count = len(swaps), len(positions)
    # Row by row, all conditions of one firing after another.
    keys, values = (f.unflatten(0, (n, count)).transpose(0, 1).flatten(0, 1) for f in changes)
    kls, floors = [], []
    for firings, start, cache in _shared_prefixes(model, tokens, positions):
        window = tokens[start : int(positions[firings][-1]) + horizon + 1]
        rows = torch.arange(firings.start * n, firings.stop * n, device=tokens.device)
        for part in rows.split(max(1, _TOKENS_PER_PASS // len(window) - 1)):
            residual = _run(
                model, cell, window, positions[part // n] - start, keys[part], values[part], cache
            )
            found = _divergences(model, residual, positions[part // n] - start, horizon, kl)
            kls.append(found[0])
            floors.append(found[1])
    floor = torch.cat(floors)[::n] + _residual_floors(model, cell, tokens, positions, horizon)
    return torch.cat(kls).unflatten(0, (count, n)).T, floor


def _minus_erases(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], positions: Int[Tensor, " firing"]
) -> Factors:
    """Minus what the cell erases natively at some positions, as factors of rank 1."""
    name = model.hook_name(cell.layer, "erase", cell.head)
    erased = native_factors(model, cell, tokens, [name])[3][name][0, positions]
    factors = factor_rank1(-erased, cell.d_k, cell.d_v)
    assert factors is not None, "an erase a b^T S is of rank 1"
    return factors


def _shared_prefixes(
    model: HookedRecurrent, tokens: Int[Tensor, " pos"], positions: Int[Tensor, " firing"]
) -> Iterator[tuple[slice, int, Any]]:
    """Firings that lie close together: their indices, the position of the first, the cache before it."""
    places, cache, read, first = positions.tolist(), None, 0, 0
    while first < len(places):
        start = places[first]
        stop = first + sum(place < start + _SPAN for place in places[first:])
        if start > read:
            cache = model.new_cache() if cache is None else cache
            run_to_residual(model, tokens[None, read:start], past_key_values=cache, use_cache=True)
            read = start
        yield slice(first, stop), start, cache
        first = stop


def _run(
    model: HookedRecurrent,
    cell: Cell,
    window: Int[Tensor, " pos"],
    positions: Int[Tensor, " row"],
    keys: Float[Tensor, "row rank d_k"],
    values: Float[Tensor, "row rank d_v"],
    cache: Any,
) -> Float[Tensor, "native_and_row pos d_model"]:
    """The last residual stream of a native row, and of a row for each change.

    The native row is read in the same batch, so that both are rounded alike.
    """
    with_native = [torch.cat([torch.zeros_like(x[:1]), x]) for x in (positions, keys, values)]
    return residual_with_added_writes(model, window, cell, *with_native, past_key_values=cache)


def _divergences(
    model: HookedRecurrent,
    residual: Float[Tensor, "native_and_row pos d_model"],
    positions: Int[Tensor, " row"],
    horizon: int,
    kl: str,
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """KL and its floor for each row, summed over the ``horizon`` positions after the row's own."""
    base = logits_of(model, residual[0])
    check_finite("logits", base)
    log_base, floors = log_probabilities(base), wide(logits_floor(base))
    after = positions[:, None] + torch.arange(1, horizon + 1, device=positions.device)  # [row, later]
    sums = []
    rows = torch.arange(len(positions), device=positions.device)
    for part in rows.split(max(1, _LOGITS_AT_ONCE // base.shape[-1] // horizon)):
        patched = logits_of(model, residual[part[:, None] + 1, after[part]])
        check_finite("logits", patched)
        for logits, first in zip(patched, (positions[part] + 1).tolist(), strict=True):
            compared = log_probabilities(logits), log_base[first : first + horizon]
            sums.append(divergence_of(*compared, kl).sum())
    return torch.stack(sums), floors[after].sum(-1)


def _residual_floors(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    horizon: int,
) -> Float[Tensor, " firing"]:
    """What the rounding of the residual stream adds to the floor (`swaps.residual_floor`), summed."""
    every = residual_floor(model, cell, tokens, torch.arange(len(tokens), device=tokens.device))
    return wide(every)[1:].unfold(0, horizon, 1).sum(-1)[positions]
