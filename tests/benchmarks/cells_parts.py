"""Which part of a stand-in's error is to blame: its key, its value, its size, or the choice of features.

One part of every stand-in is put right, and what it then recovers is measured as in `replacement_test`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import measures
from writesae_lens.experiments import ExperimentResult, swaps
from writesae_lens.experiments.firings import Firings, find_firings, is_codes, native_of, stand_in
from writesae_lens.experiments.later import later_divergences
from writesae_lens.experiments.pursuit import Pursuit
from writesae_lens.experiments.subjects import find_site
from writesae_lens.saes.rank1 import Factors, inner

AS_TRAINED = "as trained"
KEY, VALUE, SIZE, PURSUIT = "key exact", "value exact", "size exact", "choice and size by pursuit"
UNTRAINED_PURSUIT = "pursuit, untrained codes"
CONDITIONS = (KEY, VALUE, SIZE, PURSUIT)


@torch.no_grad()
def parts_of_the_error(
    model: HookedRecurrent, sae: SAE[Any], passages: Int[Tensor, "passage pos"], result: ExperimentResult
) -> dict[str, dict[str, float | None]]:
    """What stand-ins of rank 1 recover as trained and with one part put right, on the firings of a test.

    Args:
        model: the model.
        sae: the SAE that was tested.
        passages: that it was tested on.
        result: of a `replacement_test` with a horizon.

    Returns:
        condition to ``median_recovered`` and ``recovered``, at the own position, ``_later`` and ``_both``.
        Conditions: as trained; key exact, the native key times the coded value; value exact; size exact, the
        stand-in's projection onto the write; and of codes: choice and size by orthogonal matching pursuit
        (as many of the same codes a side), beside the test's own pursuit with untrained codes.
    """
    site, parts = find_site(model, sae), []
    for number, of_passage in result.records.groupby("passage"):
        passage = passages[int(number)]  # type: ignore[arg-type]
        firings = find_firings(model, sae, site, passage)
        tested = torch.as_tensor(of_passage.position.to_numpy(copy=True), device=firings.position.device)
        some = firings.subset(torch.isin(firings.position, tested))
        kls = _measure(model, sae, site.cell, passage, some, result.summary["horizon"])
        parts.append(of_passage.reset_index(drop=True).join(kls))
    records = pd.concat(parts, ignore_index=True)
    names = {AS_TRAINED: "atom"} | {name: name for name in CONDITIONS if f"kl_{name}" in records}
    names |= {UNTRAINED_PURSUIT: "pursuit"} if measures.measured(records, "pursuit") else {}
    return {name: measures.standing(records, column) for name, column in names.items()}


def conditions_of(sae: SAE[Any], firings: Firings, cell: Cell) -> dict[str, Factors]:
    """The stand-ins of firings with one part put right."""
    native, own = native_of(firings), stand_in(sae, firings, cell)
    key, value = own.key[:, 0], own.value[:, 0]
    if not is_codes(sae):  # an atom's norm belongs to neither side: give it to the value, as a code's
        value = value * key.norm(dim=-1, keepdim=True)
        key = normalize(key, dim=-1)
    unit = normalize(native.key[:, 0], dim=-1)
    sign = torch.where((unit * key).sum(-1) < 0, -1.0, 1.0)[:, None]
    unit, content = sign * unit, sign * native.value[:, 0] * native.key[:, 0].norm(dim=-1, keepdim=True)
    size = inner(native, own) / own.norm().square().clamp(min=1e-30)
    conditions = {
        KEY: Factors(unit[:, None], value[:, None]),
        VALUE: Factors(key[:, None], content[:, None]),
        SIZE: swaps.scaled(own, size),
    }
    if is_codes(sae):
        codes = (x.detach().float() for x in (sae.dec_key, sae.dec_value))
        conditions[PURSUIT] = Pursuit(*codes, sae.cfg.k_key, sae.cfg.k_value).of(native)
    return conditions


def _measure(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    firings: Firings,
    horizon: int,
) -> pd.DataFrame:
    """KLs of one passage's firings with every condition, own and later, in columns as a test's records."""
    conditions = conditions_of(sae, firings, cell)
    patches, at = list(conditions.values()), (tokens, firings.position)
    own = swaps.divergences(model, cell, *at, patches)[0]
    later = later_divergences(model, cell, *at, native_of(firings), patches, horizon)[0]
    columns = {f"kl_{name}": x for name, x in zip(conditions, own, strict=True)}
    columns |= {f"kl_{name}_later": x for name, x in zip(conditions, later, strict=True)}
    return pd.DataFrame({name: x.double().cpu().numpy() for name, x in columns.items()})
