"""Reading a prompt: which features of one SAE, or of many, are active at each of its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.files.whole_files import write_whole
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.activity import Activity
from writesae_lens.experiments.features.meets import promoted_tokens
from writesae_lens.experiments.features.sides import features_by_side
from writesae_lens.experiments.firings import atom_factors, is_codes
from writesae_lens.experiments.options import Count
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import check_unhooked
from writesae_lens.figures import new_figure
from writesae_lens.saes.rank1 import leading_pairs
from writesae_lens.use import shading
from writesae_lens.use.activations import Active, activities
from writesae_lens.use.labels import labels_of
from writesae_lens.use.prompts import Prompt, SAEs, prompt_tokens, saes_by_site

COLUMNS = (
    "layer",
    "head",
    "position",
    "token",
    "text",
    "feature",
    "side",
    "coefficient",
    "label",
    "promotes",
)
_N_PROMOTED = 5
_MOST_LABELLED = 80  # tokens that still have room for their text below a picture


class Reading(ExperimentResult):
    """A prompt as some SAEs read it: a result that notebooks and shells show as coloured text."""

    def show(self) -> None:
        """Print the prompt, coloured cell by cell, with the features that are most active in each."""
        print(shading.as_text(self, shading.has_colours()))  # noqa: T201

    def _repr_html_(self) -> str:
        return shading.as_html(self)

    def page(self) -> str:
        """One self-contained HTML page: click a token for its features, a feature to shade the text by it."""
        return shading.as_page(self)

    def save(self, folder: str | Path) -> Path:
        """As any result, with the page as read.html beside the records."""
        folder = super().save(folder)
        html = self.page()
        write_whole(folder / "read.html", lambda beside: beside.write_text(html, encoding="utf-8"))
        return folder


@experiment(
    "read",
    question="Which features are active at each token of a prompt?",
    row="a cell, token and active feature",
    of_prompt=True,
)
def read_prompt(model: HookedRecurrent, saes: SAEs, prompt: Prompt, n_features: Count = 4) -> Reading:
    """The features that are active at each token of a prompt, of all SAEs from one forward pass.

    A notebook shows the result as coloured text, ``result.show()`` prints it in a shell, and
    ``result.save(folder)`` also writes it as a page, read.html.

    Args:
        model: the model.
        saes: an SAE, or several of different cells; on writes or on states.
        prompt: a text, or token ids ``[pos]``.
        n_features: of each SAE (of codes: of each side) so many features a token, those with the largest
            coefficients.

    Returns:
        a result. ``records`` has one row per cell, token and active feature, the strongest first: layer,
        head, position, token (id), text (of the token; None without a tokenizer), feature, side ("atom",
        "key", "value"), coefficient, label (`add_labels`; else empty), promotes (JSON list of the tokens, as
        text, that a content points along most, by the direct path through W_O and the unembedding; empty for
        key codes, which are addresses. Of an atom: for a read of the sign that reads at its tokens have).
        ``summary`` has prompt, tokens and texts (of all tokens), cells ("layer:head"), sites ("write" or
        "state" of each), n_active_features, and n_shown_features: how many of these have a row.

    Raises:
        WriteSAEError: an SAE does not fit the model, two belong to one cell, or the prompt is empty, more
            than one, or neither text nor ids of the model's vocabulary.
        HookedModelError: anything is hooked, by an open `steering` for example; or the prompt is a text and
            the model has no tokenizer.
    """
    by_site = saes_by_site(model, saes)
    cells = [site.cell for site in by_site]
    if twice := next((cell for n, cell in enumerate(cells) if cell in cells[:n]), None):
        raise WriteSAEError(
            f"two SAEs belong to layer {twice.layer} head {twice.head}, on its state and on its writes: read "
            "them in calls of their own"
        )
    check_unhooked(model)
    tokens = prompt_tokens(model, by_site.values(), prompt)
    ids = tokens[0].tolist()
    texts = _texts(model, ids)
    whole = prompt if isinstance(prompt, str) else None if texts is None else model.tokenizer.decode(ids)
    run = Run("read", model, list(by_site.values()), tokens, locals(), prompt=whole)
    found = list(activities(model, by_site, tokens))
    parts = [_of_cell(model, by_site[active.site], active, n_features) for active in found]
    records = pd.concat(parts, ignore_index=True)
    records["token"] = [ids[position] for position in records.position]
    records["text"] = [None if texts is None else texts[position] for position in records.position]
    shown = len(records[["layer", "head", "feature"]].drop_duplicates())
    n_active = sum(len(of.activity.feature[of.activity.coefficient > 0].unique()) for of in found)
    summary = {
        "tokens": ids,
        "texts": texts,
        "cells": [f"{site.cell.layer}:{site.cell.head}" for site in by_site],
        "sites": [site.kind for site in by_site],
        "n_active_features": n_active,
        "n_shown_features": shown,
    }
    where = f"{len(by_site)} cells" if len(by_site) > 1 else f"the cell {summary['cells'][0]}"
    each = "token and side" if any(map(is_codes, by_site.values())) else "token"
    headline = (
        f"{len(ids)} tokens, {n_active} features active in {where}; "
        f"{shown} shown, at most {n_features} a {each}"
    )
    result = run.result(records.reindex(columns=list(COLUMNS)), summary, headline)
    return Reading(result.name, result.records, result.summary)


def _of_cell(model: HookedRecurrent, sae: SAE[Any], active: Active, n_features: int) -> pd.DataFrame:
    """The rows of one SAE, without their tokens."""
    cell, activity, labels = active.site.cell, active.activity, labels_of(sae)
    sides = features_by_side(sae)
    position, feature, coefficient, side = _strongest(activity, sides, n_features)
    shown = sorted(set(feature.tolist()) - set(sides.get("key", ())))
    promoted = dict(zip(shown, _promoted(model, sae, active, shown), strict=True))
    return pd.DataFrame(
        {
            "layer": cell.layer,
            "head": cell.head,
            "position": position,
            "feature": feature,
            "side": side,
            "coefficient": coefficient,
            "label": [labels.get(int(x), "") for x in feature],
            "promotes": [promoted.get(int(x), "") for x in feature],
        }
    )


def _strongest(activity: Activity, sides: Mapping[str, range], n_features: int) -> tuple[Any, ...]:
    """Position, feature, coefficient and side of the strongest features a token and side, in this order."""
    on = activity.coefficient > 0
    entries = pd.DataFrame(
        {
            "position": activity.position[on].cpu().numpy().astype(int),
            "feature": activity.feature[on].cpu().numpy().astype(int),
            "coefficient": activity.coefficient[on].double().cpu().numpy(),
        }
    )
    first = sides["value"].start if "value" in sides else 0
    entries["is_key"] = entries.feature < first
    entries = entries.sort_values(
        ["position", "is_key", "coefficient", "feature"], ascending=[True, False, False, True]
    )
    entries = entries.groupby(["position", "is_key"], sort=False).head(n_features)
    names = np.where(entries.is_key, "key", "value" if "value" in sides else "atom")
    return entries.position.to_numpy(), entries.feature.to_numpy(), entries.coefficient.to_numpy(), names


@torch.no_grad()
def _promoted(model: HookedRecurrent, sae: SAE[Any], active: Active, features: list[int]) -> list[str]:
    """The tokens that atoms or value codes promote, as JSON lists of texts (or of ids)."""
    if not features:
        return []
    tokens, _ = promoted_tokens(model, active.site.cell, _contents(sae, active, features), _N_PROMOTED)
    texts = [_texts(model, row) or row for row in tokens.tolist()]
    return [json.dumps(row, ensure_ascii=False) for row in texts]


def _contents(sae: SAE[Any], active: Active, features: list[int]) -> Float[Tensor, "feature d_v"]:
    """Contents of value codes, or of atoms with the sign of the reads at the tokens where each is active."""
    cell, activity, codes = active.site.cell, active.activity, sae
    numbers = torch.tensor(features, device=activity.feature.device)
    if is_codes(sae):
        of_codes: Any = codes
        return of_codes.dec_value[numbers - of_codes.cfg.n_key].float()
    atoms = leading_pairs(atom_factors(sae, numbers, cell.d_k, cell.d_v))
    key, value = (side[:, 0] for side in atoms)
    met = active.read.float() @ key.T
    here = torch.stack([activity.of_feature(feature) for feature in features], dim=1).float()
    sign = torch.where((met * here).sum(0) < 0, -1.0, 1.0)
    return value * sign[:, None]


def _texts(model: HookedRecurrent, ids: list[int]) -> list[str] | None:
    """Each token's text; those that are part of a character only are named by their id."""
    if model.tokenizer is None:
        return None
    texts = [str(model.tokenizer.decode([number])) for number in ids]
    return [x if x and "\ufffd" not in x else f"token {n}" for x, n in zip(texts, ids, strict=True)]


@figure("read")
def plot_read(result: ExperimentResult) -> Figure:
    """How strongly each cell's most active feature is active at each token, over its most in the prompt."""
    cells, names = result.summary["cells"], shading.token_names(result)
    values = np.stack([shading.strengths(result, cell) for cell in cells])
    width = min(2.0 + 0.22 * len(names), 16.0)
    figure, (axis,) = new_figure(width, 1.6 + 0.24 * len(cells), 1)
    image = axis.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=1)
    axis.set_yticks(range(len(cells)), cells)
    axis.set_ylabel("layer:head")
    if len(names) <= _MOST_LABELLED:
        axis.set_xticks(range(len(names)), [shading.visible(x) for x in names], rotation=90, fontsize=8)
    else:
        axis.set_xlabel("position")
    axis.set_title("Most active feature, over its cell's largest in the prompt", fontsize=11, loc="left")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure
