"""Figures of an attribution: the largest parts, where they were written, and what taking them out does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from writesae_lens.experiments.catalogue import figure
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.figures import ATOM, DELETE, INK, new_figure
from writesae_lens.use.attribution.attributing import each_row, named

_BARS = 20
# Positions whose tokens are written below the map.
_MOST_TOKENS = 48


@figure("attribute")
def plot_attribute(result: ExperimentResult) -> Figure:
    """The largest attributions as bars, and what is written at each layer and position in all."""
    drawing, (bars, places) = new_figure(13.0, 5.6, 2)
    _draw_bars(bars, result.records.head(_BARS).iloc[::-1])
    _draw_places(places, result)
    target, alternative = (result.summary[f"{name}_text"] for name in ("target", "alternative"))
    drawing.suptitle(f"logit({target!r}) − logit({alternative!r})", fontsize=12, x=0.01, ha="left")
    return drawing


def _draw_bars(axis: Any, rows: pd.DataFrame) -> None:
    """A bar for each record, and a cross where its ablation was measured."""
    at = np.arange(len(rows))
    colours = [ATOM if x > 0 else DELETE for x in rows.attribution]
    axis.barh(at, rows.attribution, color=colours, height=0.7, label="attributed")
    if rows.ablated.notna().any():
        axis.plot(rows.ablated, at, "x", color=INK, ms=5, label="ablated")
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    names = (named(row).replace("$", r"\$") for row in each_row(rows))
    axis.set_yticks(at, [f"{name[:56]}…" if len(name) > 57 else name for name in names], fontsize=8)
    axis.axvline(0, color=INK, lw=0.8)
    axis.set_xlabel("change of the logit difference")
    axis.set_title("Largest parts of single writes", fontsize=11, loc="left")


def _draw_places(axis: Any, result: ExperimentResult) -> None:
    """The sum of one side's features and the errors, at each layer and position."""
    rows: Any = result.records[result.records.side != "key"]
    is_derivative = rows.integrated.isna().all()
    table = rows.pivot_table(
        index="layer",
        columns="position",
        values="attribution" if is_derivative else "integrated",
        aggfunc="sum",
        fill_value=0,
    )
    most = max(float(table.abs().to_numpy().max(initial=0)), 1e-12)
    image = axis.imshow(table, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
    axis.set_yticks(range(len(table)), list(table.index))
    axis.set(xlabel="position", ylabel="layer")
    texts = rows.drop_duplicates("position").set_index("position").text
    if len(table.columns) <= _MOST_TOKENS and texts.notna().all():
        names = [texts[p].replace("$", r"\$").replace("\n", "⏎") for p in table.columns]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    what = "attributions" if is_derivative else "integrated"
    axis.set_title(f"Where it was written: sum of {what} over heads", fontsize=11, loc="left")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


@figure("attribute", "attribute_ablations")
def plot_ablations(result: ExperimentResult) -> Figure:
    """What features are attributed against what taking them out of their writes does."""
    drawing, (axis,) = new_figure(4.6, 4.4, 1)
    rows = result.records[result.records.ablated.notna()]
    if len(rows):
        ends = np.array(
            [rows[["attribution", "ablated"]].min().min(), rows[["attribution", "ablated"]].max().max()]
        )
        axis.plot(ends, ends, color="#bbbbbb", lw=1)
        axis.plot(rows.attribution, rows.ablated, "o", color=ATOM, ms=5)
    axis.set(xlabel="attributed", ylabel="ablated")
    r = result.summary["ablation_correlation"]
    title = (
        "no ablations" if not len(rows) else f"{len(rows)} features" + ("" if r is None else f", r = {r:.3f}")
    )
    axis.set_title(title, fontsize=11, loc="left")
    return drawing
