"""The table behind an atlas: every cell of a sweep's folder, what was measured there, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hooked_models.errors import one_line
from hooked_models.files.json_files import read_json
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.result import RECORDS, SUMMARY, read_table
from writesae_lens.report.cell_figures import MAP, SHARE, TEXT, Meaning, meaning_of
from writesae_lens.saes.whole import CONFIG
from writesae_lens.statistics import share
from writesae_lens.sweep.store import CELLS, FAILED, SWEEP, CellKey, name_of

# The figure that the headline is about and that the page shows first, and its untrained baseline.
_FIRST, _BASELINE = "replace_median_recovered", "replace_lookup_median_recovered"
_KEY = ["layer", "head"]
_SIZES = ["d_k", "d_v"]
_SAE_FOLDER = re.compile(r"L(\d{1,6})H(\d{1,6})")


@dataclass(frozen=True)
class CellTable:
    """Every cell that a sweep's folder knows of.

    Args:
        about: what sweep.json says.
        figures: a column each figure of cells.csv and of the map, indexed by (layer, head); cells without a
            row there have missing values.
        finished: cells with a row in cells.csv.
        trained: cells with an SAE.
        failed: by cell, the steps that failed and their reasons.
        mapped: whether the folder has a map of the model's memory.
    """

    about: dict[str, Any]
    figures: pd.DataFrame
    finished: Sequence[CellKey]
    trained: Sequence[CellKey]
    failed: dict[CellKey, list[tuple[str, str]]] = field(default_factory=dict)
    mapped: bool = False

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.about.get("model", "a model"))

    @property
    def first(self) -> str | None:
        """The figure that is shown first."""
        measures = [name for name in self.measures if not name.endswith("_seconds")]
        return _FIRST if _FIRST in measures else next(iter([*measures, *self.measures]), None)

    @property
    def is_tested(self) -> bool:
        """Whether there is any figure but times."""
        return self.first is not None and not self.first.endswith("_seconds")

    @property
    def measures(self) -> list[str]:
        """Figures that are numbers, without the sizes of cells and the ends of intervals."""
        left_out = {*_SIZES, *(end for ends in self.intervals.values() for end in ends)}
        return [n for n in self.figures if self.meaning(n).unit != TEXT and n not in left_out]

    @property
    def intervals(self) -> dict[str, tuple[str, str]]:
        """The columns that hold the ends of a figure's interval, by the figure."""
        ends = {name: (f"{name}_low", f"{name}_high") for name in self.figures}
        return {name: pair for name, pair in ends.items() if set(pair) <= set(self.figures)}

    def meaning(self, column: str) -> Meaning:
        """What a figure means; columns that hold other things than numbers are texts."""
        meaning, values = meaning_of(column), self.figures[column]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            return meaning if meaning.unit != TEXT else meaning._replace(unit="")
        return meaning._replace(unit=TEXT)

    @property
    def headline(self) -> str:
        """How many cells are finished, and the first figure over them: its median, its ends, its baseline."""
        failures = f" ({len(self.failed)} failed)" if self.failed else ""
        of_all = f"{len(self.finished)} of {len(self.figures)} cells of {self.model}"
        first = self.first
        if first is None or not self.is_tested:
            there = "the same sweep with --experiments replace runs one"
            return f"{of_all} are trained{failures}. No experiment was run on them: {there}."
        have = "has" if len(self.finished) == 1 else "have"
        text = f"{of_all} {have} results{failures}"
        known = self.figures.dropna(subset=[first])
        if not len(known):
            return f"{text}."
        meaning, values, cells = (
            self.meaning(first),
            np.asarray(known[first], dtype=float),
            _keys(known.index),
        )

        def said(value: Any) -> str:
            return share(value) if meaning.unit == SHARE else f"{value:.3g} {meaning.unit}".strip()

        low, high = (f"{said(values[n])} ({name_of(cells[n])})" for n in (values.argmin(), values.argmax()))
        between = f"worst {low}, best {high}" if first == _FIRST else f"lowest {low}, highest {high}"
        text += f". {meaning.label.capitalize()}: {said(np.median(values))} in the median cell, {between}"
        if first == _FIRST and _BASELINE in self.figures:
            both = self.figures[[first, _BASELINE]].dropna().to_numpy()
            if len(both):
                text += (
                    f"; the untrained lookup of equal size {said(np.median(both[:, 1]))}, "
                    f"beaten in {(both[:, 0] > both[:, 1]).sum()} of {len(both)} cells"
                )
        return f"{text}."

    @classmethod
    def read(cls, folder: Path) -> CellTable:
        """Read a sweep's folder.

        Raises:
            WriteSAEError: no cell is finished, or one of the tables is damaged or of another model.
        """
        if not (folder / CELLS).is_file():
            reasons = f" ({FAILED} has the reasons)" if (folder / FAILED).is_file() else ""
            raise WriteSAEError(
                f"no cell of the sweep in {folder} is finished{reasons}: run the same sweep again"
            )
        about = read_json(folder / SWEEP) if (folder / SWEEP).is_file() else {}
        if not isinstance(about, dict):
            raise WriteSAEError(f"{folder / SWEEP} is no JSON object: it does not say what was swept")
        cells = _read_cells(folder / CELLS)
        parts, mapped = [cells], (folder / MAP / RECORDS).is_file()
        if mapped:
            parts.append(_read_map(folder / MAP, about))
        failed = _read_failed(folder / FAILED) if (folder / FAILED).is_file() else {}
        trained = _trained(folder)
        keys = sorted({*failed, *trained, *(key for part in parts for key in part.index)})
        index = pd.MultiIndex.from_tuples(keys, names=_KEY)
        figures = parts[0].reindex(index)
        for part in parts[1:]:
            for size in set(_SIZES) & set(part):
                missing = figures[size] if size in figures else pd.Series(np.nan, index)
                figures[size] = missing.fillna(part[size])
            figures = figures.join(part.drop(columns=_SIZES, errors="ignore"))
        return cls(about, figures, _keys(cells.index), trained, failed, mapped)


def _keys(index: Iterable[Any]) -> list[CellKey]:
    """Rows of an index by layer and head, as plain numbers."""
    return [(int(layer), int(head)) for layer, head in index]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return any((folder / name).is_file() for name in (CELLS, SWEEP))


def _read(path: Path) -> pd.DataFrame:
    """A table with a row for cells, by columns layer and head.

    Raises:
        WriteSAEError: it does not read as one.
    """
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise WriteSAEError(f"{path} does not read as a table: {one_line(error)}") from error
    for column in _KEY:
        numbers = table[column].to_numpy() if column in table else np.array(["missing"])
        if not np.issubdtype(numbers.dtype, np.integer) or numbers.min(initial=0) < 0:
            raise WriteSAEError(f"{path} is no table of cells: its column {column!r} has no whole numbers")
    return table


def _read_cells(path: Path) -> pd.DataFrame:
    """A table with a row a cell, indexed by layer and head."""
    table = _read(path)
    twice = table.loc[table.duplicated(_KEY), _KEY].to_numpy()
    if len(twice):
        layer, head = twice[0]
        raise WriteSAEError(f"{path} has two rows of layer {layer}, head {head}: expected one a cell")
    table = table.set_index(_KEY)
    numbers = table.select_dtypes("number")
    return table.assign(**{name: numbers[name].where(np.isfinite(numbers[name])) for name in numbers})


def _read_map(folder: Path, about: dict[str, Any]) -> pd.DataFrame:
    """The records of a map, indexed by layer and head, with names that say so.

    Raises:
        WriteSAEError: it is damaged, or of another model.
    """
    summary = read_json(folder / SUMMARY)
    model = summary.get("model") if isinstance(summary, dict) else None
    if model != about.get("model", model):
        raise WriteSAEError(f"the map in {folder} is of {model}, the sweep of {about['model']}: remove one")
    records = _read_cells(folder / RECORDS)
    return records.rename(columns=lambda name: name if name in _SIZES else f"{MAP}_{name}")


def _read_failed(path: Path) -> dict[CellKey, list[tuple[str, str]]]:
    failed: dict[CellKey, list[tuple[str, str]]] = {}
    table = _read(path)
    if not {"step", "reason"} <= set(table):
        raise WriteSAEError(f"{path} is no table of failures: it lacks the columns step and reason")
    for layer, head, step, reason in zip(table.layer, table["head"], table.step, table.reason):
        failed.setdefault((int(layer), int(head)), []).append((str(step), str(reason)))
    return failed


def _trained(folder: Path) -> list[CellKey]:
    """Cells whose SAE is in the folder."""
    names = (path.parent.name for path in folder.glob(f"L*H*/{CONFIG}"))
    return sorted((int(m[1]), int(m[2])) for m in map(_SAE_FOLDER.fullmatch, names) if m)
