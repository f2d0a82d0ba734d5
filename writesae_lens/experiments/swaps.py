"""Swapped writes: matrices to put in the place of a cell's native writes, and the KLs that they cause."""

from __future__ import annotations

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
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import rounding_kl
from writesae_lens.experiments.firings import Firings, atom_factors, is_codes
from writesae_lens.experiments.passes import LOGITS_PER_PASS, check_finite, wide
from writesae_lens.saes.rank1 import Factors
from writesae_lens.saes.sae import MatrixSAE

Random = Literal["gaussian", "atom", "orthogonal", "native_marginals"]
RANDOM: tuple[Random, ...] = get_args(Random)
# Of the floor of rounding: units in the last place of a logit, and multiples of the expected KL.
_UNITS, _TIMES_EXPECTED = 6, 4


def zeros_like(swap: Factors) -> Factors:
    """Zero matrices, as factors of rank 1."""
    return Factors(swap.key[:, :1] * 0, swap.value[:, :1] * 0)


def scaled(swap: Factors, size: Float[Tensor, " firing"]) -> Factors:
    """Each matrix times its own number."""
    return Factors(swap.key * size[:, None, None], swap.value)


def summed(*swaps: Factors) -> Factors:
    """The sum of several matrices at each firing."""
    return Factors(torch.cat([s.key for s in swaps], dim=1), torch.cat([s.value for s in swaps], dim=1))


def one_after_another(*swaps: Factors) -> Factors:
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


def swapped_logits(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    swaps: Sequence[Factors],
    erase: bool = True,
) -> Iterator[tuple[Float[Tensor, "firing d_vocab"], Float[Tensor, "condition firing d_vocab"]]]:
    """Logits at the firings, natively and with each condition's matrix in the write's place, in batches.

    They are in float32 at least, whatever the model's dtype.

    Args:
        swaps: for each condition a matrix for every firing, of any rank.
        erase: whether the token's native erase still happens.

    Raises:
        WriteSAEError: the logits are not finite.
    """
    every = one_after_another(*swaps)
    keys, values = (f.unflatten(0, (len(swaps), len(positions))) for f in every)
    step = max(1, LOGITS_PER_PASS // model.cfg.d_vocab // len(swaps))
    for start in range(0, len(positions), step):
        here = slice(start, start + step)
        at = positions[here]
        base, patched = model.run_with_swapped_writes(
            tokens,
            cell.layer,
            cell.head,
            at.repeat(len(swaps)),
            keys[:, here].flatten(0, 1),
            values[:, here].flatten(0, 1),
            erase,
        )
        check_finite("logits", base, patched)
        yield base[at], patched.unflatten(0, (len(swaps), -1))


def divergences(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " firing"],
    swaps: Sequence[Factors],
    kl: str = "patched_base",
    erase: bool = True,
) -> tuple[Float[Tensor, "condition firing"], Float[Tensor, " firing"]]:
    """KL of each condition at each firing, and the KL that rounding alone gives there, in nats.

    A KL that is not above that floor says nothing about the swap. The floor is the sum of `logits_floor` and
    `residual_floor`. The arguments are those of `swapped_logits`.
    """
    kls, floors = [], []
    for base, patched in swapped_logits(model, cell, tokens, positions, swaps, erase):
        kls.append(torch.stack([divergence(p, base, kl) for p in patched]))
        floors.append(logits_floor(base))
    return torch.cat(kls, dim=1), torch.cat(floors) + residual_floor(model, cell, tokens, positions)


def divergence(
    patched: Float[Tensor, "firing d_vocab"], base: Float[Tensor, "firing d_vocab"], kl: str = "patched_base"
) -> Float[Tensor, " firing"]:
    """KL in nats. It is second order in the shift of the logits, so small KLs need float64 sums."""
    values = []
    for p, b in zip(patched.split(64), base.split(64), strict=True):
        values.append(divergence_of(log_probabilities(p), log_probabilities(b), kl))
    return torch.cat(values)


def divergence_of(
    log_patched: Float[Tensor, "firing d_vocab"], log_base: Float[Tensor, "firing d_vocab"], kl: str
) -> Float[Tensor, " firing"]:
    """`divergence` of log-probabilities."""
    log_p, log_b = (log_base, log_patched) if kl == "base_patched" else (log_patched, log_base)
    return (log_p.exp() * (log_p - log_b)).sum(-1).clamp(min=0)


def logits_floor(base: Float[Tensor, "firing d_vocab"]) -> Float[Tensor, " firing"]:
    """KL in nats, to second order, if every logit is wrong by six units in its last place, independently.

    Half the variance of such errors under the predicted distribution, sum_j p_j (1 - p_j) (6 eps l_j)^2 / 2:
    about 1e-11 in float32. One unit is what two passes differ by that do the same sums in another order; six
    are more than any of 4,600 swaps of writes that reach no logit gave, on the shipped models.
    """
    values = []
    for b in base.split(64):
        p = b.softmax(-1)
        values.append((p * (1 - p) * (_UNITS * torch.finfo(b.dtype).eps * b).square()).sum(-1) / 2)
    return torch.cat(values)


def residual_floor(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], positions: Int[Tensor, " firing"]
) -> Float[Tensor, " firing"]:
    """Four times the KL that the rounding of the residual stream is expected to give; 0 from 32 bits on.

    Rounding exceeds four times its expectation in fewer than 1 of 20 cases. See
    `hooked_models.unembedding.rounding_kl`.
    """
    return _TIMES_EXPECTED * rounding_kl(model, tokens, cell.layer, positions)


def above_floor(records: pd.DataFrame, column: str = "kl_delete") -> NDArray[np.bool_]:
    """Whether each row's KL is above what rounding alone gives there, its ``kl_floor``.

    Results of earlier versions have no floor: there it is 0.
    """
    floor = records["kl_floor"].to_numpy() if "kl_floor" in records else 0.0
    return records[column].to_numpy() > floor


def floor_note(n_at_floor: int) -> str:
    """What a headline says of the rows that are left out; nothing where there are none."""
    return f"; {n_at_floor} at the floor of rounding left out" if n_at_floor else ""


def log_probabilities(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Log-softmax, in float64 where the device has it."""
    return wide(logits).log_softmax(-1)
