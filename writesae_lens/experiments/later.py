"""Effects of a swapped write on later tokens: KLs over the positions that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, run_lower_layers
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.divergences import divergence, wide
from writesae_lens.experiments.passes import check_finite, native_factors
from writesae_lens.experiments.swaps import floor_of, joined, summed
from writesae_lens.saes.rank1 import Factors, factor_rank1

# Firings within as many tokens are run together, from one cache of what comes before the first of them.
_SPAN = 16
# Tokens that one pass reads over all its rows (each has a copy of the cache), and logits unembedded at once.
_TOKENS_PER_PASS, _LOGITS_AT_ONCE = 2**11, 2**25


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
    lower: LowerLayers | None = None,
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
        lower: what the layers below the cell's make of the passage, where it is known.

    Raises:
        WriteSAEError: the logits are not finite.
    """
    if lower is None:
        lower = run_lower_layers(model, tokens[None], cell.layer, use_cache=False)
    minus = [Factors(-native.key, native.value)]
    if not erase and model.mixers[cell.layer].erases:
        minus.append(_minus_erases(model, cell, tokens, positions))
    n, count = len(swaps), len(positions)
    changes = joined(*(summed(swap, *minus) for swap in swaps))
    by_firing = Factors(*(f.unflatten(0, (n, count)).transpose(0, 1).flatten(0, 1) for f in changes))
    heads = torch.full_like(positions, cell.head)
    distances = range(1, horizon + 1)
    kls, floors = _followed(model, cell, tokens, positions, heads, by_firing, distances, kl, lower)
    return kls.sum(-1).unflatten(0, (count, n)).T, floors.sum(-1)[::n]


@torch.no_grad()
def deletion_divergences(
    model: HookedRecurrent,
    layer: int,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " write"],
    heads: Int[Tensor, " write"],
    native: Factors,
    horizon: int,
    lower: LowerLayers | None = None,
) -> tuple[Float[Tensor, "write distance"], Float[Tensor, "write distance"]]:
    """KL of deleting each of some writes of a layer, at any heads, and the KL that rounding alone gives.

    Each is for the write's own token and the ``horizon`` tokens after it, in nats: the KL of the distribution
    with the write deleted from the native one, as full forward passes with a hook on ``hook_write`` give it.
    The heads share the passes.

    Args:
        model: the model.
        layer: the writes' layer.
        tokens: one passage.
        positions: of the writes, in ascending order, each with ``horizon`` tokens after it.
        heads: of the writes.
        native: the writes, as factors of rank 1.
        horizon: how many positions after a write count.
        lower: what the layers below this one make of the passage, where it is known.

    Raises:
        WriteSAEError: the logits are not finite.
    """
    if lower is None:
        lower = run_lower_layers(model, tokens[None], layer, use_cache=False)
    deleted = Factors(-native.key, native.value)
    at = (model, model.cell(layer, 0), tokens, positions, heads, deleted)
    return _followed(*at, range(horizon + 1), "patched_base", lower)


def _followed(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    heads: Int[Tensor, " firing"],
    changes: Factors,
    distances: range,
    kl: str,
    lower: LowerLayers | None,
) -> tuple[Float[Tensor, "row distance"], Float[Tensor, "row distance"]]:
    """KL of each row, and the KL that rounding alone gives, at some distances after its firing.

    ``changes`` is what each row adds to the native writes, all rows of one firing after another.
    """
    n = len(changes.key) // len(positions)
    kls, floors = [], []
    for firings, start, cache in _shared_prefixes(model, tokens, positions):
        stop = int(positions[firings][-1]) + distances.stop
        window = tokens[start:stop]
        below = None if lower is None else lower.window(start, stop)
        rows = torch.arange(firings.start * n, firings.stop * n, device=tokens.device)
        for part in rows.split(max(1, _TOKENS_PER_PASS // len(window) - 1)):
            at = positions[part // n] - start
            # A native row is read in the same batch, so that both are rounded alike.
            edits = (at, changes.key[part], changes.value[part], heads[part // n])
            *with_native, of_rows = (torch.cat([torch.zeros_like(x[:1]), x]) for x in edits)
            residual = residual_with_added_writes(
                model, window, cell, *with_native, past_key_values=cache, lower=below, heads=of_rows
            )
            found = _divergences(model, cell, residual, at, distances, kl)
            kls.append(found[0])
            floors.append(found[1])
    return torch.cat(kls), torch.cat(floors)


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


def _divergences(
    model: HookedRecurrent,
    cell: Cell,
    residual: Float[Tensor, "native_and_row pos d_model"],
    positions: Int[Tensor, " row"],
    distances: range,
    kl: str,
) -> tuple[Float[Tensor, "row distance"], Float[Tensor, "row distance"]]:
    """KL and its floor for each row at some distances from the row's position."""
    after = positions[:, None] + torch.tensor(distances, device=positions.device)  # [row, distance]
    first = int(after.min())
    read = residual[0, first : int(after.max()) + 1]
    kls, floors = wide(torch.zeros_like(after, dtype=read.dtype)), []
    # Some positions at a time, with all rows that count them: the native logits there are made once.
    for start in range(first, first + len(read), step := _positions_at_once(model, len(positions))):
        base = logits_of(model, residual[0, start : start + step])
        floors.append(floor_of(model, cell, base, residual[0, start : start + step]))
        rows, distance = ((after >= start) & (after < start + step)).nonzero(as_tuple=True)
        at = after[rows, distance]
        patched = logits_of(model, residual[rows + 1, at])
        kls[rows, distance] = divergence(patched, base[at - start], kl)
    check_finite("logits", kls)
    return kls, wide(torch.cat(floors))[after - first]


def _positions_at_once(model: HookedRecurrent, n_rows: int) -> int:
    """At how many positions the logits of all rows may be in memory."""
    return max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab // (n_rows + 1))
