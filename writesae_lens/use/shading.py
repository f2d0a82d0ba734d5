"""A prompt as coloured text: for shells, for notebooks, and as a page."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import sys
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from writesae_lens.experiments.features.sides import NAMES
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.report.again import Again
from writesae_lens.report.browser import as_json
from writesae_lens.report.template import fill_in

# Backgrounds of the 256-colour palette from weak to strong, each with the ink that is legible on it.
_RAMP = ((153, 16), (111, 16), (68, 231), (25, 231))
_WEAKEST = 0.1
# Features that are listed below each cell's text, of each side.
_LISTED = 3
# Characters that would move the cursor or turn the direction of the text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def has_colours() -> bool:
    """Whether standard output is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def visible(text: str) -> str:
    """A token's text with line breaks and tabs as signs, and without other control characters."""
    return _CONTROLS.sub("", text.replace("\n", "↵").replace("\t", "⇥"))


def token_names(result: ExperimentResult) -> list[str]:
    """What each token is shown as: its text, or its id where there is no tokenizer."""
    texts = result.summary["texts"]
    return [f"{number} " for number in result.summary["tokens"]] if texts is None else texts


def of_cell(result: ExperimentResult, cell: str) -> pd.DataFrame:
    """The records of a cell, "layer:head"; what a saved result has no text for is empty, as before."""
    layer, head = map(int, cell.split(":"))
    of_cell: Any = result.records[(result.records.layer == layer) & (result.records["head"] == head)]
    return of_cell.fillna({"label": "", "promotes": "", "text": ""})


def _rows(records: pd.DataFrame) -> list[Any]:
    """The rows as named tuples."""
    return list(records.itertuples())


def strengths(result: ExperimentResult, cell: str) -> Float[np.ndarray, " pos"]:
    """The largest coefficient at each token over the largest of all, of the cell's atoms or value codes.

    The site's kind does not matter: an SAE on writes and one on states of a cell are never read together.
    """
    records, values = of_cell(result, cell), np.zeros(len(result.summary["tokens"]))
    largest = records[records.side != "key"].groupby("position").coefficient.max()
    values[largest.index.to_numpy(dtype=int)] = largest.to_numpy()
    return values / max(values.max(initial=0.0), 1e-30)


def as_text(result: ExperimentResult, coloured: bool) -> str:
    """The prompt cell by cell, and below each the features that are most active there.

    Args:
        result: of `read_prompt`.
        coloured: whether to shade the tokens by ANSI sequences.
    """
    names, parts = token_names(result), []
    for cell in result.summary["cells"]:
        shade = strengths(result, cell)
        text = "".join(
            _painted(name, strength) if coloured else for_shell(name)
            for name, strength in zip(names, shade, strict=True)
        )
        parts.append("\n".join([f"{cell}  {text}", *_feature_lines(of_cell(result, cell))]))
    return "\n\n".join(parts)


def for_shell(text: str) -> str:
    """A text with its line breaks and tabs, without other control characters."""
    return _CONTROLS.sub("", text)


def _painted(text: str, strength: float) -> str:
    if strength < _WEAKEST:
        return for_shell(text)
    background, ink = _RAMP[min(len(_RAMP) - 1, int(strength * len(_RAMP)))]
    lines = for_shell(text).split("\n")
    return "\n".join(f"\x1b[48;5;{background};38;5;{ink}m{x}\x1b[0m" if x else "" for x in lines)


def _feature_lines(records: pd.DataFrame) -> list[str]:
    """The strongest features of each side: size, label, where, and what they promote."""
    lines = []
    for side, group in records.groupby("side", sort=False):
        strongest = group.sort_values("coefficient", ascending=False, kind="stable")
        for row in _rows(strongest.drop_duplicates("feature").head(_LISTED)):
            label = f" {visible(str(row.label))}" if row.label else ""
            where = f"position {row.position}" if not row.text else f"{visible(str(row.text))!r}"
            times = int((group.feature == row.feature).sum())
            more = f" and {times - 1} more" if times > 1 else ""
            promotes = promoted(row.promotes)
            along = f"; promotes {' '.join(repr(visible(x)) for x in promotes)}" if promotes else ""
            name = NAMES[str(side)]
            lines.append(f"    {name} {row.feature}{label}: {row.coefficient:.3g} at {where}{more}{along}")
    return lines


def promoted(column: Any) -> list[str]:
    """The tokens in an entry of the column ``promotes``."""
    return [str(x) for x in json.loads(column)] if isinstance(column, str) and column else []


def as_html(result: ExperimentResult) -> str:
    """The prompt cell by cell for a notebook: shaded tokens, whose features show under the pointer."""
    names, parts = token_names(result), []
    for cell in result.summary["cells"]:
        tips = {position: _tip(group) for position, group in of_cell(result, cell).groupby("position")}
        spans = "".join(
            f'<span title="{html.escape(tips.get(at, ""))}" style="background: rgb(33 120 200 / '
            f'{60 * strength:.0f}%); white-space: pre-wrap">{_broken(name)}</span>'
            for at, (name, strength) in enumerate(zip(names, strengths(result, cell), strict=True))
        )
        parts.append(
            f'<div style="display: flex; gap: 1em; margin: .4em 0"><b style="min-width: 3em">{cell}</b>'
            f'<div style="font-family: monospace; line-height: 1.6">{spans}</div></div>'
        )
    return f"<div>{''.join(parts)}<div>{html.escape(result.headline)}</div></div>"


def _broken(text: str) -> str:
    """A token for HTML: a line break is shown, and made."""
    return html.escape(visible(text)).replace("↵", "↵<br>") if "\n" in text else html.escape(visible(text))


def _tip(records: pd.DataFrame) -> str:
    return "\n".join(
        f"{NAMES[str(row.side)]} {row.feature}: {row.coefficient:.3g}"
        + (f" {row.label}" if row.label else "")
        + (f" → {' '.join(visible(x) for x in promoted(row.promotes))}" if row.promotes else "")
        for row in _rows(records)
    )


def as_page(result: ExperimentResult) -> str:
    """The self-contained page of a result of `read_prompt`."""
    summary, cells = result.summary, []
    for cell, kind in zip(summary["cells"], summary["sites"], strict=True):
        records = of_cell(result, cell)
        features = {
            int(row.feature): [str(row.side), str(row.label or ""), promoted(row.promotes)]
            for row in _rows(records.drop_duplicates("feature"))
        }
        entries = [
            [int(row.position), int(row.feature), float(f"{row.coefficient:.4g}")] for row in _rows(records)
        ]
        shade = [round(float(x), 3) for x in strengths(result, cell)]
        cells.append({"name": cell, "kind": kind, "features": features, "entries": entries, "shade": shade})
    return fill_in(
        "read.html",
        title="A prompt, feature by feature",
        subtitle=f"{summary['model']}: {result.headline}",
        again=_again(summary),
        data=as_json({"tokens": [for_shell(x) for x in token_names(result)], "cells": cells}),
    )


def _again(summary: dict[str, Any]) -> Again:
    """The command and the call that make the page again, with FOLDER for each SAE: the result knows none."""
    prompt = summary["prompt"]
    loading = f"model = HookedRecurrent.boot_transformers({str(summary['model'])!r})"
    saes = f"saes = [SAE.load_from_disk(folder) for folder in FOLDERS]  # of {', '.join(summary['cells'])}"
    given = "torch.tensor(TOKENS)" if prompt is None else repr(prompt)
    reading = f'read_prompt(model, saes, {given}, n_features={summary["n_features"]}).save("writesae-read")'
    each = " ".join("--sae FOLDER" for _ in summary["cells"])
    command = f"writesae-lens read {each} --prompt {shlex.quote(str(prompt))} --out writesae-read"
    return Again("" if prompt is None else command, "\n".join([loading, saes, reading]))
