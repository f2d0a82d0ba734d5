"""The sides of a dictionary: its atoms, or of a dictionary of codes its key codes and its value codes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from writesae_lens.saes.rank1 import Factors


def is_codes(sae: SAE[Any]) -> bool:
    """Whether an SAE codes the two sides of a write by themselves, ``decoder="codes"``."""
    return getattr(sae, "is_codes", False)


def sides_of(sae: Any) -> dict[str, range]:
    """The features of each side: of "atom" alone, or of "key" and "value".

    Coefficients can be compared within a side only: those of key codes have no unit, those of value codes
    are in units of a write's norm.
    """
    if is_codes(sae):
        return {"key": sae.key_codes, "value": sae.value_codes}
    return {"atom": range(sae.cfg.d_sae)}


def side_of(sae: SAE[Any], feature: int) -> str:
    """The side that a feature belongs to."""
    return next(side for side, features in sides_of(sae).items() if feature in features)


def dominant_by_side(
    sae: SAE[Any], acts: Float[Tensor, "pos d_sae"]
) -> dict[str, tuple[Int[Tensor, " pos"], Float[Tensor, " pos"]]]:
    """The most active feature of each side at every position (-1: none is), and its coefficient."""
    found = {}
    for side, features in sides_of(sae).items():
        size, place = acts[:, features.start : features.stop].max(dim=-1)
        found[side] = torch.where(size > 0, place + features.start, -1), size.float()
    return found


@torch.no_grad()
def feature_vectors(sae: SAE[Any], side: str) -> Float[Tensor, "code d"]:
    """The vectors of a side's codes: key codes [n_key, d_k], value codes [n_value, d_v], as learned.

    Args:
        sae: an SAE of codes.
        side: "key" or "value".
    """
    return getattr(sae, f"dec_{side}").float()


@torch.no_grad()
def side_cosines(
    sae: SAE[Any], side: str, codes: Int[Tensor, " firing"], writes: Factors
) -> Float[Tensor, " firing"]:
    """Cosines of codes with their own side of the writes that they take part in, signs as the codes see them.

    A write k v^T is also (-k) (-v)^T; the codes see it with the key on the mean key's side.

    Args:
        sae: an SAE of codes.
        side: "key" or "value".
        codes: feature numbers, one a write.
        writes: of rank 1.
    """
    mean: Any = sae.mean_key
    key, value = writes.key[:, 0].float(), writes.value[:, 0].float()
    sign = torch.where((key * mean.float()).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    own = sign * (key if side == "key" else value)
    vectors = feature_vectors(sae, side)[codes - sides_of(sae)[side].start]
    return torch.nn.functional.cosine_similarity(own, vectors, dim=-1)
