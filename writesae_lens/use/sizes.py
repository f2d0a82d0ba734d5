"""How large a feature is when it fires: its median coefficient where it is active in a text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import fingerprint, fingerprint_model, fingerprint_sae
from writesae_lens.experiments.passages import find_passages
from writesae_lens.use.activations import activities
from writesae_lens.use.native import without_hooks

# Tokens that one forward pass reads.
_TOKENS_PER_PASS = 2048
# Sizes that were measured, by model, SAE and text, so that a loop over sizes does not measure them again.
_MEASURED: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
_MOST_MEASURED = 256


def firing_sizes(
    model: HookedRecurrent,
    saes: Mapping[Site, SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str | None = None,
) -> dict[Site, Float[Tensor, " d_sae"]]:
    """The median coefficient of every feature where it is active; NaN for features that never are.

    They are those of the native model: hooks, of an open `steering` for example, are off meanwhile.

    Args:
        model: the model.
        saes: by the write or state that they were trained on.
        tokens: passages or a text (None: the test part of the shipped text, for a model that ships).

    Raises:
        WriteSAEError: there is no text for a model that does not ship, or it is too short.
        HookedModelError: an SAE is attached to the model.
    """
    if tokens is None:
        if model.cfg.model_name not in zoo.SHIPPED:
            raise WriteSAEError(
                f"sizes are in units of a feature's own coefficients, and {model.cfg.model_name} ships with "
                "no text to measure them on: give tokens (passages or a text), or unit='absolute'"
            )
        tokens = zoo.text("test")
    sizes: dict[Site, Tensor] = {}
    missing: dict[tuple[int | None, bool], dict[Site, SAE[Any]]] = {}
    of_model = fingerprint_model(model)
    of_text = tokens if isinstance(tokens, str) else fingerprint(torch.as_tensor(tokens))
    keys = {site: (of_model, fingerprint_sae(sae), str(site), of_text) for site, sae in saes.items()}
    for site, sae in saes.items():
        if keys[site] in _MEASURED:
            _MEASURED.move_to_end(keys[site])
            sizes[site] = _MEASURED[keys[site]]
        else:  # SAEs that read a text in the same passages share the passes
            cut = sae.cfg.metadata.context_size, bool(sae.cfg.metadata.prepend_bos)
            missing.setdefault(cut, {})[site] = sae
    for group in missing.values():
        with without_hooks(model):
            found = _measure(model, group, tokens)
        sizes |= found
        _MEASURED.update({keys[site]: size for site, size in found.items()})
    while len(_MEASURED) > _MOST_MEASURED:
        _MEASURED.popitem(last=False)
    return {site: sizes[site] for site in saes}


def _measure(
    model: HookedRecurrent, saes: Mapping[Site, SAE[Any]], tokens: Int[Tensor, "passage pos"] | str
) -> dict[Site, Float[Tensor, " d_sae"]]:
    """The medians of SAEs that read a text in the same passages."""
    try:
        passages = find_passages(model, next(iter(saes.values())), tokens, None).as_subclass(Tensor)
    except WriteSAEError as error:  # a context size, which the message may speak of, is no option here
        message = str(error).replace("a smaller context_size", "tokens as passages [passage, pos]")
        raise WriteSAEError(message) from error
    found: dict[Site, list[pd.DataFrame]] = {site: [] for site in saes}
    for part in passages.split(max(1, _TOKENS_PER_PASS // passages.shape[1])):
        for site, active, _ in activities(model, saes, part):
            on = active.coefficient > 0
            sizes = active.coefficient[on].double().cpu().numpy()
            found[site].append(pd.DataFrame({"feature": active.feature[on].cpu().numpy(), "size": sizes}))
    medians = {}
    for site, sae in saes.items():
        by_feature = pd.concat(found[site]).groupby("feature")["size"].median()
        sizes = by_feature.reindex(range(sae.cfg.d_sae)).to_numpy(copy=True)
        medians[site] = torch.as_tensor(sizes, dtype=torch.float32, device=passages.device)
    return medians
