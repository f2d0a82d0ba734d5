"""Labels of features: names that people or language models give, kept in the SAE's own metadata."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.json_files import LARGEST, read_json
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import is_whole, shown
from writesae_lens.experiments.result import read_table
from writesae_lens.experiments.subjects import check_sae

KEY = "feature_labels"
_COLUMNS = ("layer", "head", "feature", "label")
_CELL = re.compile(r"blocks\.(\d+)\..*\.(\d+)")
# Bytes of labels: a cfg.json with more than twice as many is not read again.
_LARGEST = LARGEST // 2


def labels_of(sae: SAE[Any]) -> dict[int, str]:
    """The labels of an SAE's features by number, in rising order; features without one are left out.

    Raises:
        WriteSAEError: the metadata has something else in their place (its file was written by hand).
    """
    stored = sae.cfg.metadata.get(KEY) or {}
    try:
        found = _by_number(stored)
    except (AttributeError, TypeError, ValueError) as error:
        raise WriteSAEError(
            f"the SAE's metadata has {shown(stored)} as {KEY}: expected {{feature: label}}"
        ) from error
    return dict(sorted(_checked(found, sae.cfg.d_sae, "the SAE's metadata").items()))


def add_labels(
    sae_or_saes: SAE[Any] | Sequence[SAE[Any]], labels: Mapping[int, str] | pd.DataFrame | str | Path
) -> None:
    """Give features of one SAE, or of several, labels, in place of those that they have.

    Labels are part of ``sae.cfg.metadata``: `save_model`, `push` and loading keep them, and whatever names a
    feature shows its label.

    Args:
        sae_or_saes: one SAE, or several, each on a cell of its own.
        labels: ``{feature: label}`` for one SAE; or a table, or a CSV, JSON or JSON-lines file of one, with
            the columns feature and label, for several SAEs also layer and head. Other columns, and rows with
            an empty label, are passed over; where no row has a label, nothing changes. What
            `export_features` and `label_features` write will do, and for one SAE a JSON file
            ``{"feature": "label"}``.

    Raises:
        WriteSAEError: a file does not read or lacks a column; a feature is unknown, no whole number or stands
            twice; a label is no text; a row is of a cell that none of the SAEs is on; two SAEs are on one
            cell. Then no label is changed.
    """
    saes = [sae_or_saes] if isinstance(sae_or_saes, SAE) else list(sae_or_saes)
    for sae in saes:
        check_sae(sae)
    if not saes:
        raise WriteSAEError("there are no SAEs to label: give one at least")
    source = labels if isinstance(labels, (str, Path)) else "the labels"
    if isinstance(labels, (str, Path)):
        labels = _read(labels)
    every = []
    for sae, own in zip(saes, _by_sae(saes, labels, str(source)), strict=True):
        every.append({str(feature): label for feature, label in sorted((labels_of(sae) | own).items())})
        if (size := len(json.dumps(every[-1]))) > _LARGEST:
            raise WriteSAEError(
                f"labels of {size:,} bytes are more than the {_LARGEST:,} that an SAE's cfg.json has room for"
            )
    for sae, stored in zip(saes, every, strict=True):
        sae.cfg.metadata[KEY] = stored


def _read(path: str | Path) -> Mapping[int, Any] | pd.DataFrame:
    """The labels in a CSV, JSON or JSON-lines file, as `add_labels` takes them.

    Raises:
        WriteSAEError: the file does not read.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            return read_table(path)
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                return _table(json.loads(line) for line in lines if line.strip())
        if path.suffix == ".json":
            content = read_json(path)
            if isinstance(content, list):
                return _table(content)
            return _by_number(content)
    except (HookedModelError, OSError, ValueError, AttributeError, TypeError) as error:
        raise WriteSAEError(f"{path} does not read as a table of labels: {one_line(error)[:160]}") from error
    raise WriteSAEError(f"{path} has no ending that says what it is: .csv, .json and .jsonl are read")


def _by_number(stored: Mapping[str, Any]) -> dict[int, Any]:
    """Labels by number, of those that a JSON object has by text.

    Raises:
        ValueError: a name is no whole number, or two are the same one ("1" and "01").
    """
    found: dict[int, Any] = {}
    for name, label in stored.items():
        if not str(name).isdecimal():
            raise ValueError(f"feature {shown(name)} must be a whole number")
        if int(name) in found:
            raise ValueError(f"feature {int(name)} stands twice")
        found[int(name)] = label
    return found


def _table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The columns that matter here: those of an export have much else."""
    return pd.DataFrame([{name: row[name] for name in _COLUMNS if name in row} for row in rows])


def cell_of(sae: SAE[Any]) -> tuple[int, int]:
    """Layer and head of an SAE, from its metadata.

    Raises:
        WriteSAEError: it names none.
    """
    metadata = sae.cfg.metadata
    match = _CELL.fullmatch(metadata.hook_name or "")
    cell = (metadata.layer, metadata.head) if match is None else (int(match[1]), int(match[2]))
    if None in cell:
        raise WriteSAEError(f"the SAE names no cell in its metadata (hook_name={metadata.hook_name!r})")
    return cell


def _by_sae(
    saes: Sequence[SAE[Any]], labels: Mapping[Any, Any] | pd.DataFrame, source: str
) -> list[dict[int, str]]:
    """The labels that are meant for each SAE, checked."""
    if isinstance(labels, Mapping):
        if len(saes) > 1:
            raise WriteSAEError(
                f"{source} name no cells: for several SAEs give a table with columns {', '.join(_COLUMNS)}"
            )
        found = {f: label for f, label in labels.items() if not _is_empty(label)}
        return [_checked(found, saes[0].cfg.d_sae, source)]
    if not isinstance(labels, pd.DataFrame):
        raise WriteSAEError(f"labels are a mapping, a table or a file, got {shown(labels)}")
    needed = _COLUMNS if len(saes) > 1 or {"layer", "head"} & set(labels) else _COLUMNS[2:]
    if missing := [name for name in needed if name not in labels]:
        raise WriteSAEError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {' and '.join(missing)}: it has "
            f"{', '.join(map(str, labels.columns[:8])) or 'none'}"
        )
    rows: Any = labels.loc[np.array([not _is_empty(x) for x in labels.label], dtype=bool), list(needed)]
    if rows.isna().to_numpy().any():
        raise WriteSAEError(f"{source} has a row with a label that lacks its {' or '.join(needed[:-1])}")
    rows = rows.assign(**{name: _whole(name, rows[name], source) for name in needed[:-1]})
    if len(needed) == 2:
        return [_of_rows(rows, saes[0], source)]
    cells = [cell_of(sae) for sae in saes]
    if twice := [cell for cell, n in Counter(cells).items() if n > 1]:
        raise WriteSAEError(f"two SAEs are on layer {twice[0][0]} head {twice[0][1]}: label one at a time")
    own = list(zip(rows.layer, rows["head"], strict=True))
    if other := [cell for cell in own if cell not in cells]:
        raise WriteSAEError(
            f"{source} has labels of layer {other[0][0]} head {other[0][1]}, which none of the SAEs is on"
        )
    return [
        _of_rows(rows.loc[np.array([x == cell for x in own], dtype=bool)], sae, source)
        for cell, sae in zip(cells, saes, strict=True)
    ]


def _whole(name: str, column: pd.Series, source: str) -> pd.Series:
    """A column's numbers; an empty cell of another row has made fractions of whole ones (1 is 1.0 then).

    Raises:
        WriteSAEError: some are texts.
    """
    texts = [x for x in column if isinstance(x, str)]
    if texts:
        wrong = next((x for x in texts if not x.strip().isdecimal()), texts[0])
        raise WriteSAEError(f"{source}: {name} {shown(wrong)} must be a whole number, not a text")
    whole = [int(x) if isinstance(x, float) and x.is_integer() else x for x in column]
    return pd.Series(whole, index=column.index, dtype=object)


def _of_rows(rows: pd.DataFrame, sae: SAE[Any], source: str) -> dict[int, str]:
    """The labels of one SAE's rows."""
    twice = rows.feature[rows.feature.duplicated()]
    if len(twice):
        raise WriteSAEError(f"{source} has feature {twice.iloc[0]} twice")
    return _checked(dict(zip(rows.feature, rows.label, strict=True)), sae.cfg.d_sae, source)


def _checked(labels: Mapping[Any, Any], d_sae: int, source: str) -> dict[int, str]:
    """The labels on one line each; features that the SAE does not have, and labels that are no text, refused.

    A number, which is what a table makes of a label such as 1984, is taken for its text.
    """
    for feature, label in labels.items():
        if isinstance(feature, str):
            raise WriteSAEError(f"{source}: feature {shown(feature)} must be a whole number, not a text")
        if not is_whole(feature) or not 0 <= feature < d_sae:
            raise WriteSAEError(
                f"{source}: feature {shown(feature)} does not exist: the SAE has 0 to {d_sae - 1}"
            )
        if not isinstance(label, (str, Real)):
            raise WriteSAEError(f"{source}: the label of feature {feature} is no text but {shown(label)}")
    return {int(feature): " ".join(str(label).split()) for feature, label in labels.items()}


def _is_empty(label: Any) -> bool:
    return label is None or label != label or not str(label).strip()  # an empty cell is NaN
