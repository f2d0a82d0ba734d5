"""The sides of a dictionary: its atoms, or of a dictionary of codes its key codes and its value codes."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor, nn

from writesae_lens.experiments import swaps
from writesae_lens.experiments.firings import is_codes
from writesae_lens.saes.codes import split
from writesae_lens.saes.rank1 import Factors

NAMES = {"atom": "atom", "key": "key code", "value": "value code"}
"""How headlines and figures call one feature of each side."""
PLURALS = {side: f"{name}s" for side, name in NAMES.items()}


def features_by_side(sae: SAE[Any]) -> dict[str, range]:
    """The features of each side: of "atom" alone, or of "key" and "value".

    Coefficients can be compared within a side only: those of key codes have no unit, those of value codes
    are in units of a write's norm.
    """
    if is_codes(sae):
        codes: Any = sae
        return {"key": codes.key_codes, "value": codes.value_codes}
    return {"atom": range(sae.cfg.d_sae)}


def side_of(sae: SAE[Any], feature: int) -> str:
    """The side that a feature belongs to: "atom", "key" or "value"."""
    return next(side for side, features in features_by_side(sae).items() if feature in features)


@torch.no_grad()
def side_cosines(
    sae: SAE[Any], side: str, codes: Int[Tensor, " firing"], writes: Factors
) -> Float[Tensor, " firing"]:
    """Cosines of codes with their own side of the writes that they take part in, signs as the codes see them.

    A write k v^T is also (-k) (-v)^T; `saes.codes.split` decides between the two, as in the encoder.

    Args:
        sae: an SAE of codes.
        side: "key" or "value".
        codes: numbers of features, one a write.
        writes: of rank 1.
    """
    parameters: Any = sae
    vectors = getattr(parameters, f"dec_{side}").float()
    seen = split(
        Factors(*(x.float() for x in writes)), parameters.sign_key.float(), parameters.sign_value.float()
    )
    own = seen.key if side == "key" else seen.value
    return nn.functional.cosine_similarity(
        own, vectors[codes - features_by_side(sae)[side].start], dim=-1, eps=1e-30
    )


def firings_by_feature(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each feature that a firing counts for: its atom, or its dominant key and value code.

    Args:
        records: of the replacement test (those of earlier versions have no ``key_code``: they are of atoms).

    Returns:
        the rows, with the feature's number as ``atom`` and its ``side``; of codes two for each firing.
    """
    if "key_code" not in records or not (records.key_code >= 0).any():
        return records.assign(side="atom")
    of_keys = records.assign(atom=records.key_code, side="key")
    return pd.concat([of_keys, records.assign(side="value")], ignore_index=True)


def randomized(sae: SAE[Any], features: Int[Tensor, " write"], own: Factors, rng: torch.Generator) -> Factors:
    """The random control of some features: for each of their matrices a random one of the same norm.

    For an atom a Gaussian rank-1 matrix; for a code a Gaussian vector in its place, with the other side as
    it is (a matrix that is random on both sides would hardly be read, and be no control of the code).

    Args:
        sae: the SAE.
        features: their numbers.
        own: their matrices; those of codes have rank 1.
        rng: where the numbers come from.
    """
    rows, device = len(features), own.key.device
    key, value = (torch.randn(rows, 1, f.shape[-1], generator=rng).to(device) for f in own)
    if is_codes(sae):
        is_key = (features < features_by_side(sae)["key"].stop).to(device)[:, None, None]
        key, value = torch.where(is_key, key, own.key), torch.where(is_key, own.value, value)
    return swaps.with_norm(Factors(key, value), own.norm())
