"""Untrained codes by matching pursuit: what sparse coding alone recovers, without any training.

Codes are unit keys and unit values of training writes. Each side of a write is coded by orthogonal matching
pursuit: step by step the code along which most of what is left lies is added, and all chosen ones are fitted
again by least squares. Coefficients have either sign, so the sign of a write's factors does not matter.

It is not the encoder of an SAE. An SAE scores every code once, by a linear function of its input, and
features that SAELens reads must be encoded so; pursuit looks at the input again at each step, for as many
products as the SAE takes times the number of active codes. Where it recovers more than a trained dictionary
at as many bits, training has bought the cheap encoder, not better codes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from writesae_lens.saes.rank1 import Factors

# Writes that are coded at once: bounds memory. Of a code, the share outside the span of earlier ones that is
# taken for rounding.
_AT_ONCE, _IN_SPAN = 4096, 1e-4
_COUNTED = 2048


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """Dictionaries of codes for both sides, and how many of them code a write.

    Args:
        keys: unit key codes ``[code, d_k]``.
        values: unit value codes ``[code, d_v]``.
        k_key, k_value: steps of the pursuit a side.
    """

    keys: Float[Tensor, "code d_k"]
    values: Float[Tensor, "other_code d_v"]
    k_key: int
    k_value: int

    @staticmethod
    def of_writes(
        train: Factors, n_key: int, n_value: int, k_key: int, k_value: int, rng: torch.Generator
    ) -> Pursuit:
        """Codes that are keys of some writes and values of others, all where there are fewer.

        Args:
            train: writes of rank 1; those that are zero give no code.
            n_key, n_value: numbers of codes a side.
            k_key, k_value: steps of the pursuit a side.
            rng: of the choice.
        """
        train = train[(train.norm() > 0).nonzero().squeeze(-1)]
        chosen = [torch.randperm(len(train.key), generator=rng)[:n] for n in (n_key, n_value)]
        key, value = (
            normalize(side[of.to(side.device), 0], dim=-1) for side, of in zip(train, chosen, strict=True)
        )
        return Pursuit(key, value, k_key, k_value)

    def of(self, native: Factors) -> Factors:
        """The coded unit key times the coded value, which carries the norm, of writes of rank 1."""
        key, value = (coded for coded, _ in self._sides(native))
        return Factors(key[:, None], value[:, None])

    def bits(self, native: Factors, rng: torch.Generator) -> float:
        """Bits to name the codes of a write, counted as `experiments.features.guards` does for an SAE.

        They are counted on 2,048 of the writes, chosen at random, where there are more.
        """
        some = torch.randperm(len(native.key), generator=rng)[:_COUNTED].to(native.key.device)
        native, total = native[some], 0.0
        for _, chosen in self._sides(native):
            uses = chosen.flatten().bincount().double()
            total += float(-torch.xlogy(uses, uses / uses.sum()).sum()) / math.log(2)
        return total / len(native.key)

    def _sides(self, native: Factors) -> list[tuple[Tensor, Tensor]]:
        norm = native.key[:, 0].norm(dim=-1, keepdim=True)
        key, value = normalize(native.key[:, 0], dim=-1), native.value[:, 0] * norm
        return [
            matching_pursuit(key, self.keys, self.k_key),
            matching_pursuit(value, self.values, self.k_value),
        ]


@torch.no_grad()
def matching_pursuit(
    x: Float[Tensor, "write d"], codes: Float[Tensor, "code d"], k: int
) -> tuple[Float[Tensor, "write d"], Int[Tensor, "write active"]]:
    """What orthogonal matching pursuit makes of each x, and the codes that it chose, in order.

    Args:
        x: one side of some writes.
        codes: of any norms.
        k: how many codes to choose; no more than there are codes, or dimensions.
    """
    units = normalize(codes, dim=-1)
    parts = [_pursue(part, units, min(k, *units.shape)) for part in x.split(_AT_ONCE)]
    coded, chosen = (torch.cat(side) for side in zip(*parts, strict=True))
    return coded, chosen


def _pursue(x: Tensor, units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left = x.clone()
    chosen = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    basis = x.new_zeros(len(x), 0, x.shape[1])  # orthonormal, of the span of the chosen codes
    for _ in range(k):
        scores = (left @ units.T).abs().scatter(1, chosen, -1.0)
        new = scores.argmax(1, keepdim=True)
        chosen = torch.cat([chosen, new], dim=1)
        direction = units[new[:, 0]]
        for _ in range(2):  # once more, for what rounding left
            direction = direction - (basis.mT @ (basis @ direction[..., None]))[..., 0]
        norm = direction.norm(dim=-1, keepdim=True)
        direction = torch.where(norm > _IN_SPAN, direction / norm.clamp(min=_IN_SPAN), 0.0)
        basis = torch.cat([basis, direction[:, None]], dim=1)
        left = left - (left * direction).sum(-1, keepdim=True) * direction
    return x - left, chosen
