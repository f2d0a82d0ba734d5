"""KL divergences of two next-token distributions, from their logits, and what rounding alone gives.

A KL is second order in the shift of the logits: log-probabilities in float32 would lose it where it is small,
and in float64 cost twice as much. Here it is computed from the logits' difference d, in float32 without loss.
With the mean m = E_p[d] under the first distribution p, and u = d - m,

    KL(p || q) = log E_p[exp(-u)] = log(1 + E_p[expm1(-u) + u])

a sum of terms none of which is negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Logits that are compared at once: what fits a processor's cache best, and bounds memory.
_AT_ONCE = 2**22
# Rows compared by log-probabilities in float64: KLs above so many nats, where exp may overflow;
# and shifts whose mean, squared, is above so many times the KL, of which it is no part but which it rounds.
_LARGE, _OFFSET = 4.0, 2.0**9
# Shifts below this many nats are small.
_SMALL = 2.0**-4
# Of the floor of rounding: units in the last place of a logit.
_UNITS = 6


class Comparison(NamedTuple):
    """Two distributions compared, a number a row.

    Args:
        kl: KL(first || second), nats.
        log_normalizers: log of the sum of exp of the first logits, less that of the second.
    """

    kl: Float[Tensor, " row"]
    log_normalizers: Float[Tensor, " row"]


def wide(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """In float64 where the device has it (MPS does not), else in float32."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def divergence(
    patched: Float[Tensor, "row d_vocab"], base: Float[Tensor, "row d_vocab"], kl: str = "patched_base"
) -> Float[Tensor, " row"]:
    """KL in nats of patched and base logits, right to a relative 1e-5 for effects of any size.

    Args:
        patched, base: logits in float32 at least, row by row.
        kl: "patched_base" for KL(patched || base), "base_patched" for KL(base || patched).
    """
    return compare(base, patched).kl if kl == "base_patched" else compare(patched, base).kl


def compare(first: Float[Tensor, "row d_vocab"], second: Float[Tensor, "row d_vocab"]) -> Comparison:
    """KL(first || second), and how their normalizers differ; NaN or inf where a logit is not finite."""
    step = max(1, _AT_ONCE // first.shape[-1])
    parts = [_compare(*rows) for rows in zip(first.split(step), second.split(step), strict=True)]
    return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compare(first: Tensor, second: Tensor) -> Comparison:
    # Sums over the vocabulary are sums of products, which torch adds up in pairs, not scalar products.
    weight = (first - first.amax(-1, keepdim=True)).exp_()
    total = weight.sum(-1)
    shift = first - second
    mean = (weight * shift).sum(-1) / total
    shift -= mean[:, None]
    mean, kl = wide(mean), torch.log1p(wide((weight * _convex(shift)).sum(-1) / total))
    exact = (~(kl < _LARGE) | (mean.square() > _OFFSET * kl)).nonzero().squeeze(-1)
    if len(exact):
        log_p, log_q = wide(first[exact]).log_softmax(-1), wide(second[exact]).log_softmax(-1)
        kl[exact] = (log_p.exp() * (log_p - log_q)).sum(-1)
        mean[exact] = (log_p.exp() * (wide(first[exact]) - wide(second[exact]))).sum(-1)
    kl = kl.clamp(min=0)
    return Comparison(kl, mean - kl)


def _convex(shift: Tensor) -> Tensor:
    """expm1(-u) + u; by its series in rows where every shift is so small that the two terms would cancel."""
    small = shift.abs().amax(-1) < _SMALL
    if not small.any():
        return torch.expm1(-shift).add_(shift)
    if small.all():
        return shift.square().mul_(0.5 - shift * (1 / 6 - shift * (1 / 24 - shift / 120)))
    values = torch.empty_like(shift)
    values[small], values[~small] = _convex(shift[small]), _convex(shift[~small])
    return values


def log_probability_change(
    patched: Float[Tensor, "row d_vocab"], base: Float[Tensor, "row d_vocab"], token: int
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """How much log p of one token rises from base to patched logits, nats; and KL(patched || base)."""
    kl, log_normalizers = compare(patched, base)
    return wide(patched[:, token] - base[:, token]) - log_normalizers, kl


def logits_floor(base: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL in nats, to second order, if every logit is wrong by six units in its last place, independently.

    Half the variance of such errors under the predicted distribution, sum_j p_j (1 - p_j) (6 eps l_j)^2 / 2:
    about 1e-11 in float32. One unit is what two passes differ by that do the same sums in another order; six
    are more than any of 4,600 swaps of writes that reach no logit gave, on the shipped models.
    """
    values = []
    for b in base.split(max(1, _AT_ONCE // base.shape[-1])):
        p = b.softmax(-1)
        variance = (p * (1 - p) * b.square()).sum(-1)
        values.append(variance * (_UNITS * torch.finfo(b.dtype).eps) ** 2 / 2)
    return torch.cat(values)
