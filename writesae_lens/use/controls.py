"""The control of steering: other features of the same SAEs, drawn at random, at the same norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.experiments.features.sides import features_by_side, side_of
from writesae_lens.experiments.firings import atom_factors, is_codes
from writesae_lens.use.additions import Chosen
from writesae_lens.use.sizes import firing_sizes


def random_features(
    model: HookedRecurrent,
    saes: Mapping[Site, SAE[Any]],
    amounts: Mapping[Chosen, float],
    tokens: Int[Tensor, "passage pos"] | str | None,
    unit: str,
    rng: torch.Generator,
) -> dict[Chosen, float]:
    """For each steered feature another one of its side, with the coefficient at which the norms are equal.

    Args:
        model: the model.
        saes: by the write that they were trained on.
        amounts: the steered features' coefficients.
        tokens, unit: as in `steering`. In units of firing sizes the others are active in that text.
        rng: of the draws.

    Returns:
        coefficients of as many features; none if some SAE's side has no other feature left.
    """
    sites = {one.site for one in amounts}
    sizes = None if unit == "absolute" else firing_sizes(model, {site: saes[site] for site in sites}, tokens)
    norms = {site: _norms(saes[site], site) for site in sites}
    taken = {(one.site, feature) for one in amounts for feature in one.features}
    drawn: dict[Chosen, float] = {}
    for one, amount in amounts.items():
        others = []
        for feature in one.features:
            side = features_by_side(saes[one.site])[side_of(saes[one.site], feature)]
            allowed = [x for x in side if (one.site, x) not in taken and float(norms[one.site][x]) > 0]
            if sizes is not None:
                allowed = [x for x in allowed if not math.isnan(float(sizes[one.site][x]))]
            if not allowed:
                return {}
            others.append(allowed[int(torch.randint(len(allowed), (), generator=rng))])
            taken.add((one.site, others[-1]))
        own, other = (math.prod(float(norms[one.site][x]) for x in group) for group in (one.features, others))
        drawn[Chosen(one.site, tuple(others))] = amount * own / other
    return drawn


@torch.no_grad()
def _norms(sae: SAE[Any], site: Site) -> Float[Tensor, " d_sae"]:
    """Norms of codes, or of atoms as matrices, on the CPU."""
    if is_codes(sae):
        codes: Any = sae
        return torch.cat([side.float().norm(dim=-1) for side in (codes.dec_key, codes.dec_value)]).cpu()
    every = torch.arange(sae.cfg.d_sae, device=next(sae.parameters()).device)
    return atom_factors(sae, every, site.cell.d_k, site.cell.d_v).norm().cpu()
