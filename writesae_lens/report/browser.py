"""The data of the page's browser of atoms, as compact JSON that report.js reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens.experiments.features.sides import firings_by_feature
from writesae_lens.figures import KL_FLOOR
from writesae_lens.report.atoms import Profiles
from writesae_lens.report.columns import Column
from writesae_lens.report.effects import Effects
from writesae_lens.report.samples import AFTER, BEFORE, GROUPS

# The distributions on an atom's page are drawn from at most so many of its firings.
_MOST_FIRINGS = 300


def browser_data(
    model: HookedRecurrent,
    table: pd.DataFrame,
    columns: Sequence[Column],
    profiles: Profiles,
    effects: Effects,
    samples: Mapping[int, Mapping[str, Any]],
    replacement: pd.DataFrame,
    met: pd.DataFrame | None,
    labels: Mapping[int, str],
) -> dict[str, Any]:
    """Everything that the browser shows: numbers with few digits, directions as bytes.

    Args:
        model: for the texts of tokens.
        table: of `writesae_lens.report.columns.table_of_atoms`.
        columns: its columns.
        profiles: of all features; their tokens are shown for atoms without measured effects.
        effects: of the atoms that fire.
        samples: of `writesae_lens.report.samples.samples`.
        replacement: records of `replacement_test`.
        met: of `writesae_lens.experiments.features.meets.met_by_distance`; None for atoms.
        labels: of the features that have one.
    """
    rows = [
        [rounded(value, column.digits) for column, value in zip(columns, row, strict=True)]
        for row in table.itertuples(index=False, name=None)
    ]
    return {
        "d_k": profiles.key.shape[1],
        "d_v": profiles.value.shape[1],
        "columns": [column.key for column in columns],
        "rows": rows,
        "key": _as_bytes(profiles.key),
        "value": _as_bytes(profiles.value),
        "read": _numbers(profiles.read_share, 2),
        "rank1": _numbers(profiles.rank1_share, 2),
        **token_data(model, profiles, effects),
        "near": profiles.neighbours.tolist(),
        "cosines": _numbers(profiles.cosines, 3),
        "samples": samples,
        "labels": labels,
        "firings": _firings_by_atom(firings_by_feature(replacement)),
        "distances": [] if met is None else [int(x) for x in met.columns],
        "met": {} if met is None else {int(code): np.round(row, 3).tolist() for code, row in _known(met)},
    }


def token_data(model: HookedRecurrent, profiles: Profiles, effects: Effects) -> dict[str, Any]:
    """The tokens that features promote and suppress, measured where they fire, else by the direct path.

    Args:
        model: for the texts of tokens.
        profiles: of all features.
        effects: of those that fire, of as many tokens.

    Returns:
        for each feature ``tokens`` and ``logits``; ``measured``, of those that fire the number of firings,
        agreement and control; and ``texts`` of the tokens by id.
    """
    tokens, logits = profiles.tokens.tolist(), _numbers(profiles.logits, 3)
    for row, atom in enumerate(effects.atom.tolist()):
        tokens[atom], logits[atom] = effects.tokens[row].tolist(), _numbers(effects.shift[row], 3)
    measured = zip(
        effects.atom.tolist(),
        effects.n.tolist(),
        _numbers(effects.agreement, 2),
        _numbers(effects.control, 3),
        strict=True,
    )
    token_ids = sorted({i for row in tokens for i in row})
    tokenizer = model.tokenizer
    texts = {i: "" if tokenizer is None else str(tokenizer.decode([i])) for i in token_ids}
    # Tokens that are only part of a character are shown by their id.
    texts = {i: text if text and "\ufffd" not in text else f"token {i}" for i, text in texts.items()}
    return {
        "texts": texts,
        "tokens": tokens,
        "logits": logits,
        "measured": {atom: [n, agreement, control] for atom, n, agreement, control in measured},
    }


def _known(met: pd.DataFrame) -> list[tuple[Any, Any]]:
    """Codes that some read meets, and their shares by distance."""
    known = met.dropna()
    return list(zip(known.index, known.to_numpy(), strict=True))


def as_json(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element, whatever markup the texts contain."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def text_data(words: Mapping[str, Any], length: int) -> dict[str, Any]:
    """What contexts.js reads of the text that contexts are cut from.

    Args:
        words: of `writesae_lens.report.samples.token_texts`.
        length: tokens of a passage.
    """
    groups = [name for name, _, _ in GROUPS]
    return {**words, "length": length, "before": BEFORE, "after": AFTER, "groups": groups}


def _firings_by_atom(records: pd.DataFrame) -> dict[int, list[list[Any]]]:
    """Lists of cosines, log10 of the KLs with the atom and without the write, and whether the atom wins."""
    columns = pd.DataFrame(
        {
            "atom": records.atom,
            "cosine": records.cosine.round(3),
            "with": np.log10(records.kl_atom.clip(lower=KL_FLOOR)).round(2),
            "without": np.log10(records.kl_delete.clip(lower=KL_FLOOR)).round(2),
            "wins": (records.kl_atom < records.kl_delete).astype(int),
        }
    )
    firings = {}
    for atom, group in columns.groupby("atom"):
        some = group if len(group) <= _MOST_FIRINGS else group.sample(_MOST_FIRINGS, random_state=0)
        firings[int(str(atom))] = [some[name].tolist() for name in ("cosine", "with", "without", "wins")]
    return firings


def rounded(value: Any, digits: int | None) -> Any:
    """A cell of the table: a text, a whole number (0 digits), a short number, or None where there is none."""
    if isinstance(value, str):
        return value
    if digits is None or value is None or not np.isfinite(value):
        return None
    return int(value) if digits == 0 else float(f"{value:.{digits}g}" if digits > 2 else f"{value:.3f}")


def _numbers(values: Tensor, digits: int) -> list[Any]:
    return np.round(values.cpu().double().numpy(), digits).tolist()


def _as_bytes(vectors: Tensor) -> str:
    """Rows as signed bytes in base 64, each scaled to its largest entry: enough for pictures."""
    scaled = vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1e-30) * 127
    return base64.b64encode(scaled.round().cpu().numpy().astype(np.int8).tobytes()).decode()
