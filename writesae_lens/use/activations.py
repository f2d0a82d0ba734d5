"""What is active in some rows of text: the features of several SAEs, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.experiments.features.activity import Activity
from writesae_lens.experiments.firings import activity_of
from writesae_lens.experiments.passes import check_finite


class Active(NamedTuple):
    """What is active of one SAE, and the read vectors of its cell."""

    site: Site
    activity: Activity
    read: Float[Tensor, "pos d_k"]


@torch.no_grad()
def activities(
    model: HookedRecurrent, saes: Mapping[Site, SAE[Any]], tokens: Int[Tensor, "row pos"]
) -> Iterator[Active]:
    """What is active of every SAE, one SAE at a time; the model runs once for all of them.

    Args:
        model: the model.
        saes: by the write or state that they were trained on.
        tokens: rows of equal length, without padding. Positions are counted through all rows.

    Raises:
        WriteSAEError: activations or coefficients are not finite.
    """
    names = {name for site in saes for name in _hook_names(model, site)}
    _, cache = model.run_with_cache(
        tokens,
        names_filter=sorted(names),
        stop_at_layer=max(site.cell.layer for site in saes) + 1,
        return_cache_object=False,
        use_cache=False,
    )
    for site, sae in saes.items():
        cell = site.cell
        on_states = [model.state_hook_name(cell.layer, cell.head)] if site.kind == "state" else []
        states = [cache[name].flatten(0, 1) for name in on_states]
        factors = model.write_factor_hook_names(cell.layer)
        key, value, read = (cache[name][:, :, cell.head].flatten(0, 1) for name in factors)
        check_finite(f"{site.kind}s of layer {cell.layer} head {cell.head}", key, value, read, *states)
        yield Active(site, activity_of(sae, key, value, *states), read)


def _hook_names(model: HookedRecurrent, site: Site) -> tuple[str, ...]:
    """The factors of all heads' writes in a cell's layer, and of an SAE on states the head's state."""
    layer, head = site.cell.layer, site.cell.head
    states = (model.state_hook_name(layer, head),) if site.kind == "state" else ()
    return (*model.write_factor_hook_names(layer), *states)
