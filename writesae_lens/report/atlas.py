"""The atlas: one self-contained HTML page about every cell of a model, from the folder of a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from hooked_models import zoo
from hooked_models.files.whole_files import write_whole
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS
from writesae_lens.experiments.result import SUMMARY
from writesae_lens.locks import locked
from writesae_lens.report import again
from writesae_lens.report.browser import as_json
from writesae_lens.report.cell_figures import group_of
from writesae_lens.report.cell_table import CellTable, is_sweep
from writesae_lens.report.page import PAGE
from writesae_lens.report.template import fill_in
from writesae_lens.sweep.store import CellKey, name_of

ATLAS = "atlas.html"
# Steps of sweep.json that the subtitle names, and failures that a notice spells out.
_MOST_NAMED = 3


def make_atlas(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write atlas.html: a grid of all cells in the colours of any figure, a scatter plot and a table of them.

    The page is one file that needs no network. Its links to pictures and to cells' reports are relative, and
    lead to files of the sweep's folder. Figures of the model's memory map stand beside those of the sweep
    where the folder has one in map/ (a saved result of ``writesae-lens map``).

    Args:
        folder: of a sweep, with cells.csv.
        out: folder of the page (None: the sweep's).

    Returns:
        the path of the page.

    Raises:
        WriteSAEError: the folder is none of a sweep, no cell is finished, or a table in it is damaged.
    """
    folder = Path(folder)
    if not is_sweep(folder):
        raise WriteSAEError(f"{folder} is no folder of a sweep: it has neither cells.csv nor sweep.json")
    table, out = CellTable.read(folder), folder if out is None else Path(out)
    html = _render(table, folder, out)
    with locked(out):
        write_whole(out / ATLAS, lambda beside: beside.write_text(html, encoding="utf-8"))
    return out / ATLAS


def _render(table: CellTable, folder: Path, out: Path) -> str:
    """The page's HTML: atlas.html, filled in."""
    return fill_in(
        "atlas.html",
        title=f"Atlas of {table.model}",
        subtitle=_subtitle(table),
        headline=table.headline,
        notices=_notices(table),
        mapped=table.mapped,
        again=_again(folder, out),
        data=as_json(_data(table, folder, out)),
    )


def _again(folder: Path, out: Path) -> again.Again:
    """How to make the page again from what the folder holds then."""
    elsewhere = None if out == folder else str(out)
    line = again.command("report", [("--sae", folder), ("--out", elsewhere)])
    arguments = ", ".join(again.quoted(str(path)) for path in (folder, elsewhere) if path is not None)
    return again.Again(line, f"from writesae_lens.report import make_atlas\n\nmake_atlas({arguments})")


def _subtitle(table: CellTable) -> str:
    """What was swept, as sweep.json has it."""
    about = table.about
    layers = {layer for layer, _ in table.figures.index}
    parts = [f"{len(table.figures):,} cells in {len(layers):,} layer{'s' * (len(layers) != 1)}"]
    if isinstance(about.get("architecture"), str):
        parts.append(about["architecture"])
    if isinstance(about.get("training_tokens"), int):
        parts.append(f"SAEs trained on {about['training_tokens']:,} writes")
    if table.is_tested and isinstance(about.get("text"), str):
        parts.append(f"tested on {about['text']}")
    return ", ".join(parts)


def _notices(table: CellTable) -> list[str]:
    """What is missing: failed cells, with the first reasons, and cells that are not finished."""
    notices = []
    if table.failed:
        named = [
            f"{name_of(cell)} at {step} ({reason})"
            for cell, failures in list(table.failed.items())[:_MOST_NAMED]
            for step, reason in failures[:1]
        ]
        others = len(table.failed) - len(named)
        more = f"; and {others:,} more" if others else ""
        n = f"{len(table.failed):,} cell{'s' * (len(table.failed) != 1)} failed"
        notices.append(f"{n}: {'; '.join(named)}{more}. The same sweep tries them again.")
    waiting = set(table.trained) - set(table.finished) - set(table.failed)
    if waiting:
        n = f"{len(waiting):,} cell{'s are' if len(waiting) != 1 else ' is'}"
        notices.append(f"{n} trained and not tested yet: the same sweep goes on with them.")
    return notices


def _data(table: CellTable, folder: Path, out: Path) -> dict[str, Any]:
    """Everything that atlas.js shows."""
    intervals, figures = table.intervals, table.figures
    ends = {end for pair in intervals.values() for end in pair}
    columns = _in_order([name for name in figures if name not in ends])
    measures = table.measures
    trained, finished = set(table.trained), set(table.finished)
    cells = []
    for key, values in zip(figures.index, figures.to_dict("records"), strict=True):
        layer, head = (int(number) for number in key)
        cells.append(
            {
                "layer": layer,
                "head": head,
                "name": name_of((layer, head)),
                "values": [_plain(values[name]) for name in columns],
                "intervals": {
                    columns.index(name): [_plain(values[end]) for end in pair]
                    for name, pair in intervals.items()
                    if not any(pd.isna(values[end]) for end in pair)
                },
                "failed": table.failed.get((layer, head), []),
                "trained": (layer, head) in trained,
                "finished": (layer, head) in finished,
                **_files(table.model, (layer, head), folder, out),
            }
        )
    return {
        "columns": [
            {
                "key": name,
                "group": group_of(name),
                "measure": name in measures,
                **table.meaning(name)._asdict(),
            }
            for name in columns
        ],
        "questions": {
            name: experiment.question
            for name, experiment in (EXPERIMENTS | OF_MODELS).items()
            if name in map(group_of, columns)
        },
        "mapped": table.mapped,
        "first": None if table.first is None else columns.index(table.first),
        "cells": cells,
    }


def _in_order(columns: list[str]) -> list[str]:
    """Columns by what they are of, facts about the cell last; in each group times come last."""
    groups = list(dict.fromkeys(filter(None, map(group_of, columns))))
    return sorted(columns, key=lambda name: ([*groups, ""].index(group_of(name)), name.endswith("_seconds")))


def _files(model: str, cell: CellKey, folder: Path, out: Path) -> dict[str, Any]:
    """Links to a cell's report and pictures, and the command that makes the report."""
    name = name_of(cell)
    report, results = folder / "reports" / name, folder / "results" / name
    pictures = sorted(results.glob("*/*.png"))
    tested = [("--results", results)] if any(results.glob(f"*/{SUMMARY}")) else []
    command = again.command("report", [("--sae", folder / name), *tested, ("--out", report)])
    return {
        "report": _link(report / PAGE, out) if (report / PAGE).is_file() else None,
        "command": command if model in zoo.SHIPPED else f"{command} --text FILE",
        "pictures": [[path.parent.name, path.stem, _link(path, out)] for path in pictures],
    }


def _link(path: Path, out: Path) -> str:
    """The address of a file from a page in ``out``."""
    return quote(Path(os.path.relpath(path, out)).as_posix())


def _plain(value: Any) -> float | str | None:
    """A value as JSON has it: numbers with six digits, which is more than the page shows."""
    if pd.isna(value):
        return None
    return (
        float(f"{value:.6g}")
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else str(value)
    )
