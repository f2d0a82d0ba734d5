"""Swapped writes: matrices to put in the place of a cell's native writes, and the KLs that they cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor, nn

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, run_lower_layers
from hooked_models.edited_runs import BRANCHES_AT_ONCE, residual_with_swapped_writes
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, rounding_kl
from writesae_lens.divergences import divergence, logits_floor
from writesae_lens.experiments.firings import Firings, atom_factors, is_codes
from writesae_lens.experiments.passes import check_finite
from writesae_lens.saes.rank1 import Factors
from writesae_lens.saes.sae import MatrixSAE

Random = Literal["gaussian", "atom", "orthogonal", "native_marginals"]
RANDOM: tuple[Random, ...] = get_args(Random)
# Logits that are in memory at once; the floor of rounding as a multiple of the expected KL.
_LOGITS_AT_ONCE, _TIMES_EXPECTED = 2**25, 4


def zeros_like(swap: Factors) -> Factors:
    """Zero matrices, as factors of rank 1."""
    return Factors(swap.key[:, :1] * 0, swap.value[:, :1] * 0)


def scaled(swap: Factors, size: Float[Tensor, " firing"]) -> Factors:
    """Each matrix times its own number."""
    return Factors(swap.key * size[:, None, None], swap.value)


def summed(*swaps: Factors) -> Factors:
    """The sum of several matrices at each firing."""
    return Factors(torch.cat([s.key for s in swaps], dim=1), torch.cat([s.value for s in swaps], dim=1))


def joined(*swaps: Factors) -> Factors:
    """All matrices in one batch, first to last, padded to the largest rank among them."""
    rank = max(s.key.shape[1] for s in swaps)
    padded = [[nn.functional.pad(f, (0, 0, 0, rank - f.shape[1])) for f in s] for s in swaps]
    return Factors(torch.cat([p[0] for p in padded]), torch.cat([p[1] for p in padded]))


def with_norm(swap: Factors, norm: Float[Tensor, " firing"]) -> Factors:
    """The same directions with these Frobenius norms (zero matrices stay zero)."""
    return scaled(swap, norm / swap.norm().clamp(min=1e-30))


def random_like(
    kind: str,
    sae: SAE[Any],
    every: Firings,
    kept: Int[Tensor, " firing"],
    cell: Cell,
    rng: torch.Generator,
) -> Factors:
    """One random matrix a firing, of any norm.

    Args:
        kind: gaussian: rank 1, standard normal factors; atom: another atom of the dictionary, or as many
            other codes of the same sides at the same coefficients; orthogonal: rank 1, key and value
            orthogonal to those of the native write; native_marginals: rank 1, each coordinate of key and
            value drawn from that coordinate's values at the other firings of the passage (a control that has
            the scale of every channel).
        every: all firings of the passage.
        kept: indices of the firings that the matrices are for.
    """
    firings = every.subset(kept)
    count, device = len(firings.atom), firings.atom.device
    if kind == "atom" and is_codes(sae):
        return _other_codes(sae, firings, rng)
    if kind == "atom":
        shift = torch.randint(1, max(2, sae.cfg.d_sae), (count,), generator=rng).to(device)
        return atom_factors(sae, (firings.atom + shift) % sae.cfg.d_sae, cell.d_k, cell.d_v)
    factors = []
    for side in (every.write_key.float(), every.write_value.float()):
        own = side[kept]
        if kind == "native_marginals":
            further = torch.randint(1, max(len(side), 2), own.shape, generator=rng)
            factors.append(side.gather(0, ((kept.cpu()[:, None] + further) % len(side)).to(device)))
            continue
        x = torch.randn(own.shape, generator=rng).to(device)
        if kind == "orthogonal":
            unit = nn.functional.normalize(own, dim=-1)
            x = x - (x * unit).sum(-1, keepdim=True) * unit
        factors.append(x)
    return Factors(factors[0][:, None], factors[1][:, None])


def _other_codes(sae: SAE[Any], firings: Firings, rng: torch.Generator) -> Factors:
    """Stand-ins in which all codes of a side are moved on by one random number, around its end."""
    assert isinstance(sae, MatrixSAE)
    assert firings.features is not None
    assert firings.activations is not None
    features, acts = firings.features, firings.activations.new_zeros(len(firings.atom), sae.cfg.d_sae)
    for side in (sae.key_codes, sae.value_codes):
        further = torch.randint(1, max(2, len(side)), (len(features), 1), generator=rng).to(features.device)
        other = (features - side.start + further) % len(side) + side.start
        of_side = (features >= side.start) & (features < side.stop)
        acts.scatter_add_(1, other, firings.activations.masked_fill(~of_side, 0))
    return Factors(*(f.float() for f in sae.stand_in_of(acts)))


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Logits at some firings of a passage, natively and with swapped writes, in float32 at least.

    Args:
        base: native logits.
        patched: those with each condition's matrix in the write's place.
        floor: the KL that rounding alone gives, nats (`floor_of`).
    """

    base: Float[Tensor, "firing d_vocab"]
    patched: Float[Tensor, "condition firing d_vocab"]
    floor: Float[Tensor, " firing"]

    def divergences(self, kl: str = "patched_base") -> Float[Tensor, "condition firing"]:
        """KL of each condition, nats.

        Raises:
            WriteSAEError: one is not finite, as then the logits are not.
        """
        kls = torch.stack([divergence(p, self.base, kl) for p in self.patched])
        check_finite("logits", kls)
        return kls


def floor_of(
    model: HookedRecurrent,
    cell: Cell,
    base: Float[Tensor, "place d_vocab"],
    residual: Float[Tensor, "place d_model"],
) -> Float[Tensor, " place"]:
    """The KL that rounding alone gives, nats: a KL that is not above it says nothing about an edit.

    It is the sum of `writesae_lens.divergences.logits_floor` and of four times what the rounding of the
    residual stream is expected to give (`hooked_models.unembedding.rounding_kl`), which rounding exceeds in
    fewer than 1 of 20 cases.

    Args:
        model: the model.
        cell: where the edit is.
        base: native logits.
        residual: the native residual stream after the last layer, of which they are.
    """
    return logits_floor(base) + _TIMES_EXPECTED * rounding_kl(model, residual, cell.layer)


@torch.no_grad()
def swapped_residuals(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    swaps: Sequence[Factors],
    erase: bool = True,
    lower: LowerLayers | None = None,
) -> Iterator[
    tuple[Int[Tensor, " some"], Float[Tensor, "pos d_model"], Float[Tensor, "condition some d_model"]]
]:
    """The last residual stream of a passage, and at its firings with each condition's matrix written.

    All firings run at once, unless there are more than memory holds; then which they are is said first, by
    their indices. The layers below the cell's run once. The arguments are those of `swapped_logits`.
    """
    every = joined(*swaps)
    keys, values = (f.unflatten(0, (len(swaps), len(positions))) for f in every)
    if lower is None:
        lower = run_lower_layers(model, tokens[None], cell.layer, use_cache=False)
    at_once = max(1, BRANCHES_AT_ONCE // len(swaps))
    for some in torch.arange(len(positions), device=positions.device).split(at_once):
        native, branches = residual_with_swapped_writes(
            model,
            tokens,
            cell,
            positions[some].repeat(len(swaps)),
            keys[:, some].flatten(0, 1),
            values[:, some].flatten(0, 1),
            erase,
            lower,
        )
        yield some, native, branches.unflatten(0, (len(swaps), -1))


@torch.no_grad()
def swapped_logits(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    swaps: Sequence[Factors],
    erase: bool = True,
    lower: LowerLayers | None = None,
) -> Iterator[Swapped]:
    """Logits at the firings, natively and with each condition's matrix in the write's place, in batches.

    Logits are made of the firings and their branches alone, for as many firings at a time as memory holds.

    Args:
        model: the model.
        cell: the cell.
        tokens: one passage.
        positions: of the firings; they may repeat.
        swaps: for each condition a matrix for every firing, of any rank.
        erase: whether the token's native erase still happens.
        lower: what the layers below the cell's make of the passage, where it is known.
    """
    for some, native, branches in swapped_residuals(model, cell, tokens, positions, swaps, erase, lower):
        yield from unembedded(model, cell, positions[some], native, branches)


@torch.no_grad()
def unembedded(
    model: HookedRecurrent,
    cell: Cell,
    positions: Int[Tensor, " firing"],
    native: Float[Tensor, "pos d_model"],
    branches: Float[Tensor, "condition firing d_model"],
) -> Iterator[Swapped]:
    """The logits of last residual streams at firings, for as many firings at a time as memory holds.

    Args:
        model: the model.
        cell: where the writes are swapped.
        positions: of the firings, as numbers of rows of ``native``; they may repeat.
        native: residual streams of the native text.
        branches: those with each condition's matrix written.
    """
    cut = max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab // (1 + len(branches)))
    for part in torch.arange(len(positions), device=positions.device).split(cut):
        at, of = positions[part].unique(return_inverse=True)
        base = logits_of(model, native[at])
        floor = floor_of(model, cell, base, native[at])
        yield Swapped(base[of], logits_of(model, branches[:, part]), floor[of])


def divergences(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    swaps: Sequence[Factors],
    kl: str = "patched_base",
    erase: bool = True,
    lower: LowerLayers | None = None,
) -> tuple[Float[Tensor, "condition firing"], Float[Tensor, " firing"]]:
    """KL of each condition at each firing, and the KL that rounding alone gives there, in nats.

    The arguments are those of `swapped_logits`.

    Raises:
        WriteSAEError: the logits are not finite.
    """
    kls, floors = [], []
    for swapped in swapped_logits(model, cell, tokens, positions, swaps, erase, lower):
        kls.append(swapped.divergences(kl))
        floors.append(swapped.floor)
    return torch.cat(kls, dim=1), torch.cat(floors)


def above_floor(records: pd.DataFrame, column: str = "kl_delete") -> NDArray[np.bool_]:
    """Whether each row's KL is above what rounding alone gives there, its ``kl_floor``.

    Results of earlier versions have no floor: there it is 0.
    """
    floor = records["kl_floor"].to_numpy() if "kl_floor" in records else 0.0
    return records[column].to_numpy() > floor


def floor_note(n_at_floor: int) -> str:
    """What a headline says of the rows that are left out; nothing where there are none."""
    return f"; {n_at_floor} at the floor of rounding left out" if n_at_floor else ""
