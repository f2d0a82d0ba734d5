"""Markdown tables of what a recipe recovers on every cell of a model, from the summaries of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# At the own position, over the following tokens, and both together: suffixes of a summary's keys.
WHERE = ("", "_later", "_both")


class Column(NamedTuple):
    """A column of the table: some figures of a summary, each in a format."""

    title: str
    figures: tuple[str, ...]
    percent: bool = True


def _everywhere(name: str) -> tuple[str, ...]:
    return tuple(name + where for where in WHERE)


COLUMNS = (
    Column("median recovered: own / later / both", _everywhere("median_recovered")),
    Column("pooled", _everywhere("recovered")),
    Column("lookup, median", _everywhere("lookup.median_recovered")),
    Column("lookup, pooled", _everywhere("lookup.recovered")),
    Column("untrained codes by pursuit, median", _everywhere("pursuit.median_recovered")),
    Column("mean key, median", _everywhere("mean_key.median_recovered")),
    Column("mean value, median", _everywhere("mean_value.median_recovered")),
    Column("win rate: own / both", ("win_rate", "win_rate_both")),
    Column("at matched norm", ("win_rate_matched_norm",)),
    Column("chain / ceiling / ratio", ("strict_chain_rate", "chain_ceiling", "chain_over_ceiling")),
    Column("own share", ("own_share",)),
    Column("bits to name the codes: this / pursuit", ("bits", "pursuit.bits"), percent=False),
    Column("free dimensions / of a write", ("free_dimensions", "free_dimensions_of_a_write"), percent=False),
    Column("coverage", ("coverage",)),
    Column("at the floor: own / later / both", _everywhere("n_at_floor"), percent=False),
)


class Target(NamedTuple):
    """A figure, or how far it is ahead of another one, and the least that it should be."""

    title: str
    figure: str
    wanted: float
    ahead_of: str | None = None


TARGETS = (
    *(Target(f"median recovered{w.replace('_', ', ')}", f"median_recovered{w}", 0.8) for w in WHERE),
    *(Target(f"pooled recovered{w.replace('_', ', ')}", f"recovered{w}", 0.85) for w in WHERE),
    *(
        Target(
            f"median{w.replace('_', ', ')}: ahead of the lookup",
            f"median_recovered{w}",
            0.2,
            f"lookup.median_recovered{w}",
        )
        for w in WHERE
    ),
    *(
        Target(
            f"pooled{w.replace('_', ', ')}: ahead of the lookup",
            f"recovered{w}",
            0.2,
            f"lookup.recovered{w}",
        )
        for w in WHERE
    ),
    Target("chain over its ceiling", "chain_over_ceiling", 0.9),
    Target("win rate, both", "win_rate_both", 0.924),
)


def flat(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a replacement test's summary by name, those of its baselines as ``name.figure``."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float)) or v is None}
    for baseline in summary.get("baselines") or ():
        numbers |= {f"{baseline['name']}.{k}": v for k, v in baseline.items() if isinstance(v, (int, float))}
    return numbers


def cells_table(summaries: Mapping[tuple[int, int], Mapping[str, Any]]) -> str:
    """A row a cell, layer-0 cells with an asterisk, and the mean over cells last.

    A mean of fewer cells, where some have no figure, says of how many.
    """
    rows = [[f"{layer}:{head}{'' if layer else ' *'}"] for layer, head in summaries]
    numbers = [flat(summary) for summary in summaries.values()]
    for column in COLUMNS:
        for row, of_cell in zip(rows, numbers, strict=True):
            row.append(_text([of_cell.get(figure) for figure in column.figures], column.percent))
    mean = [_means(numbers, column.figures, column.percent) for column in COLUMNS]
    return markdown(["cell", *(column.title for column in COLUMNS)], [*rows, [f"mean of {len(rows)}", *mean]])


def targets_table(summaries: Mapping[tuple[int, int], Mapping[str, Any]]) -> str:
    """What was aimed at: the mean over cells, the worst cell, and how many cells reach it."""
    rows = []
    for target in TARGETS:
        values = {cell: _difference(flat(summary), target) for cell, summary in summaries.items()}
        known = {cell: value for cell, value in values.items() if value is not None}
        if not known:
            rows.append([target.title, f"{target.wanted:.1%}", "", "", f"0 of {len(values)}"])
            continue
        worst = min(known, key=lambda cell: known[cell])
        reached = sum(value >= target.wanted for value in known.values())
        rows.append(
            [
                target.title,
                f"{target.wanted:.1%}",
                f"{np.mean(list(known.values())):.1%}"
                + (f" ({len(known)})" if len(known) < len(values) else ""),
                f"{known[worst]:.1%} ({worst[0]}:{worst[1]})",
                f"{reached} of {len(values)}",
            ]
        )
    return markdown(["figure", "aimed at", "mean", "worst cell", "cells that reach it"], rows)


def parts_table(parts: Mapping[tuple[int, int], Mapping[str, Mapping[str, float | None]]]) -> str:
    """Median recovered where a part of each stand-in is replaced by the native write's, a row a cell.

    Args:
        parts: of each cell, condition to figures (`cells_parts.parts_of_the_error`).
    """
    names = list(dict.fromkeys(name for of_cell in parts.values() for name in of_cell))
    figures = _everywhere("median_recovered")
    rows = []
    for (layer, head), of_cell in parts.items():
        texts = [_text([of_cell.get(name, {}).get(f) for f in figures], True) for name in names]
        rows.append([f"{layer}:{head}{'' if layer else ' *'}", *texts])
    means = [_means([of.get(name, {}) for of in parts.values()], figures, True) for name in names]
    return markdown(["cell", *names], [*rows, [f"mean of {len(rows)}", *means]])


def stability_table(summaries: Mapping[tuple[int, int], Mapping[str, Any]]) -> str:
    """Shares of features that other seeds have too, a row a cell, beside the same of the controls."""
    columns = [
        Column(title, tuple(f"{of}{name}" for of in ("", "lookup_", "random_")))
        for title, name in (
            ("above 0.7: SAEs / lookups / random", "share_above_07"),
            ("above 0.9", "share_above_09"),
            ("median cosine", "median_cosine"),
        )
    ]
    numbers = [flat(summary) for summary in summaries.values()]
    rows = [
        [f"{layer}:{head}", *(_text([of_cell.get(f) for f in c.figures], True) for c in columns)]
        for (layer, head), of_cell in zip(summaries, numbers, strict=True)
    ]
    mean = [f"mean of {len(rows)}", *(_means(numbers, c.figures, True) for c in columns)]
    return markdown(["cell", *(c.title for c in columns)], [*rows, mean])


def _means(numbers: Sequence[Mapping[str, float | None]], figures: Sequence[str], percent: bool) -> str:
    """Means of some figures over the cells that have them, with their number where it is not all."""
    texts = []
    for figure in figures:
        known = [x for of_cell in numbers if (x := of_cell.get(figure)) is not None]
        few = f" ({len(known)})" if 0 < len(known) < len(numbers) else ""
        texts.append(_text([float(np.mean(known)) if known else None], percent) + few)
    return " / ".join(texts)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(numbers: Mapping[str, float | None], target: Target) -> float | None:
    value = numbers.get(target.figure)
    other = 0.0 if target.ahead_of is None else numbers.get(target.ahead_of)
    return None if value is None or other is None else value - other


def _text(values: Sequence[float | None], percent: bool) -> str:
    def one(x: float | None) -> str:
        if x is None:
            return "-"
        return f"{100 * x:.0f}" if percent else f"{x:,.0f}" if x == int(x) else f"{x:.1f}"

    return " / ".join(one(x) for x in values)
