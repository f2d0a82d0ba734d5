"""Which part of a stand-in's error is to blame: its key, its value, its size, or the choice of features.

One part of every stand-in is put right, and what it then recovers is measured as in `replacement_test`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.experiments import swaps
from writesae_lens.experiments.firings import Firings, find_firings, is_codes, native_of, stand_in
from writesae_lens.experiments.later import later_divergences
from writesae_lens.experiments.replace import thin
from writesae_lens.experiments.subjects import find_site
from writesae_lens.saes.rank1 import Factors, inner

AS_TRAINED = "as trained"


@torch.no_grad()
def parts_of_the_error(
    model: HookedRecurrent,
    sae: SAE[Any],
    passages: Int[Tensor, "passage pos"],
    horizon: int,
    max_firings: int,
    seed: int,
) -> dict[str, dict[str, float | None]]:
    """What stand-ins of rank 1 recover as trained and with one part put right, on the firings of a test.

    Returns:
        condition to ``median_recovered`` and ``recovered``, at the own position, ``_later`` and ``_both``.
        Conditions: as trained; key exact, the native key times the coded value; value exact; size exact, the
        stand-in's projection onto the write; and of codes: choice and size by orthogonal matching pursuit
        (as many of the same codes a side, chosen one by one with their best coefficients).
    """
    site = find_site(model, sae)
    every = [find_firings(model, sae, site, passage) for passage in passages]
    found: list[dict[str, NDArray[np.float64]]] = []
    kept = thin(every, 0, max_firings, None, seed, passages.shape[1] - 1 - horizon)
    for passage, firings, index in zip(passages, every, kept, strict=True):
        if len(index):
            found.append(_measure(model, sae, site.cell, passage, firings.subset(index), horizon))
    columns = {name: np.concatenate([part[name] for part in found], axis=-1) for name in found[0]}
    return _recovered(columns)


def conditions_of(sae: SAE[Any], firings: Firings) -> dict[str, Factors]:
    """The stand-ins of firings, as they are and with one part put right."""
    native, own = native_of(firings), stand_in(firings)
    key, value = own.key[:, 0], own.value[:, 0]
    if not is_codes(sae):  # an atom's norm belongs to neither side: give it to the value, as a code's
        value = value * key.norm(dim=-1, keepdim=True)
        key = normalize(key, dim=-1)
    unit = normalize(native.key[:, 0], dim=-1)
    sign = torch.where((unit * key).sum(-1) < 0, -1.0, 1.0)[:, None]
    unit, content = sign * unit, sign * native.value[:, 0] * native.key[:, 0].norm(dim=-1, keepdim=True)
    size = inner(native, own) / own.norm().square().clamp(min=1e-30)
    conditions = {
        AS_TRAINED: own,
        "key exact": Factors(unit[:, None], value[:, None]),
        "value exact": Factors(key[:, None], content[:, None]),
        "size exact": swaps.scaled(own, size),
    }
    if is_codes(sae):
        sides = ((unit, sae.dec_key, sae.cfg.k_key), (content, sae.dec_value, sae.cfg.k_value))
        pursued = [matching_pursuit(x, codes.float(), k)[:, None] for x, codes, k in sides]
        conditions["choice and size by pursuit"] = Factors(*pursued)
    return conditions


def matching_pursuit(
    x: Float[Tensor, "firing d"], codes: Float[Tensor, "code d"], k: int
) -> Float[Tensor, "firing d"]:
    """The sum of k codes near to each x: each in turn the one nearest to what is left, all fitted again."""
    units = normalize(codes, dim=-1)
    chosen = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    fitted = torch.zeros_like(x)
    for _ in range(k):
        scores = (x - fitted) @ units.T
        chosen = torch.cat([chosen, scores.scatter(1, chosen, -torch.inf).argmax(1, keepdim=True)], dim=1)
        active = units[chosen].mT  # [firing, d, active]
        fitted = (active @ torch.linalg.lstsq(active, x[..., None]).solution)[..., 0]
    return fitted


def _measure(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    firings: Firings,
    horizon: int,
) -> dict[str, NDArray[np.float64]]:
    """KLs of one passage's firings, own and later: of the deletion, of every condition, and the floor."""
    native, conditions = native_of(firings), conditions_of(sae, firings)
    patches = [swaps.zeros_like(native), *conditions.values()]
    at = tokens, firings.position
    own, own_floor = swaps.divergences(model, cell, *at, patches)
    later, later_floor = later_divergences(model, cell, *at, native, patches, horizon)
    kls = torch.stack([own, later]).double().cpu().numpy()  # [where, condition, firing]
    floor = torch.stack([own_floor.double(), later_floor.double()]).cpu().numpy()
    return {"floor": floor} | {name: kls[:, n] for n, name in enumerate(("delete", *conditions))}


def _recovered(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float | None]]:
    """Medians and pooled shares over the firings above the floor of rounding."""

    def everywhere(x: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {"": x[0], "_later": x[1], "_both": x.sum(axis=0)}

    floor, deleted = everywhere(columns["floor"]), everywhere(columns["delete"])
    result: dict[str, dict[str, float | None]] = {}
    for name in columns.keys() - {"floor", "delete"}:
        result[name] = {}
        for where, kl in everywhere(columns[name]).items():
            moves = deleted[where] > floor[where]
            pooled, median = statistics.recovered(kl[moves], deleted[where][moves])
            result[name] |= {f"median_recovered{where}": median, f"recovered{where}": pooled}
    return {name: result[name] for name in columns if name in result}
