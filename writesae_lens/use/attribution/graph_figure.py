"""The picture of an attribution graph: features by position and layer, and arrows between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from writesae_lens.figures import ATOM, DELETE, INK, new_figure
from writesae_lens.use.attribution.attributing import each_row

if TYPE_CHECKING:
    from writesae_lens.use.attribution.graph import AttributionGraph

# Edges between features that are drawn, the strongest.
_MOST_EDGES = 40


def plot_graph(graph: AttributionGraph) -> Figure:
    """Nodes by position (those without a node are left out) and layer, and arrows for the strongest edges."""
    nodes, edges = graph.nodes, graph.edges
    columns = {p: n for n, p in enumerate(sorted({*nodes.position, graph.about["position"]}))}
    levels = {layer: n for n, layer in enumerate(sorted(nodes.layer.unique()))}
    drawing, (axis,) = new_figure(max(7.0, 1.5 * len(columns) + 1), 1.9 * len(levels) + 2.2, 1)
    places, beside = {}, nodes.groupby(["layer", "position"]).cumcount()
    counts = nodes.groupby(["layer", "position"]).node.transform("count")
    most = max(float(nodes.attribution.abs().max()), 1e-12) if len(nodes) else 1.0
    for row, n, count in zip(each_row(nodes), beside, counts, strict=True):
        x, y = float(columns[row.position]), levels[row.layer] + 0.7 * ((n + 0.5) / count - 0.5)
        places[row.node] = x, y
        colour = ATOM if row.attribution > 0 else DELETE
        axis.plot(x, y, "o", ms=4 + 9 * abs(row.attribution) / most, color=colour, zorder=3)
        name = f"H{row.head} {row.side[0]}{row.feature} {row.label}".strip().replace("$", r"\$")
        axis.annotate(
            name[:28], (x, y), (8, 0), textcoords="offset points", fontsize=7, va="center", zorder=4
        )
    top = len(levels) - 0.1
    places["logit"] = columns[graph.about["position"]] + 0.6, top
    _draw_edges(axis, places, edges)
    title = f"{graph.about['target_text']!r} − {graph.about['alternative_text']!r}".replace("$", r"\$")
    axis.annotate(title, places["logit"], (0, 6), textcoords="offset points", ha="center", fontsize=9)
    texts = nodes.drop_duplicates("position").set_index("position").text
    names = [f"{texts.get(p) or ''}\n{p}".replace("$", r"\$") for p in columns]
    axis.set_xticks(range(len(columns)), names, fontsize=8)
    axis.set_yticks(range(len(levels)), [f"layer {layer}" for layer in levels], fontsize=9)
    axis.set(xlim=(-0.4, len(columns)), ylim=(-0.6, top + 0.35))
    axis.grid(axis="x", color="#eeeeee")
    return drawing


def _draw_edges(axis: Any, places: dict[str, tuple[float, float]], edges: pd.DataFrame) -> None:
    """Arrows, as thick as their attributions; those to the logits paler."""
    between = edges[edges.target != "logit"].head(_MOST_EDGES)
    for rows, alpha in ((edges[edges.target == "logit"], 0.2), (between, 0.75)):
        most = max(float(rows.attribution.abs().max()), 1e-12) if len(rows) else 1.0
        for row in each_row(rows):
            arrow = FancyArrowPatch(
                places[row.source],
                places[row.target],
                arrowstyle="-|>",
                mutation_scale=8,
                connectionstyle="arc3,rad=0.08",
                lw=0.3 + 2.2 * abs(row.attribution) / most,
                color=ATOM if row.attribution > 0 else DELETE,
                alpha=alpha,
                zorder=2,
                shrinkA=4,
                shrinkB=5,
            )
            axis.add_patch(arrow)
    axis.plot(*places["logit"], "s", ms=6, color=INK, zorder=3)
