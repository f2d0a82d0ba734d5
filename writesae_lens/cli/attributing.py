"""The body of ``writesae-lens attribute``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from writesae_lens.cli.subjects import load_saes, read_prompt_text, token_of, warnings_as_lines
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.locks import locked
from writesae_lens.use.attribution import AttributionGraph, attribute, attribution_graph
from writesae_lens.use.attribution.attributing import each_row, named
from writesae_lens.use.attribution.graph import LOGIT

# Rows of the table of features, and of that of edges.
_FEATURES, _EDGES = 16, 8


def run_attribute(
    references: list[str],
    prompt: str | None,
    text: Path | None,
    target: str,
    alternative: str | None,
    options: dict[str, Any],
    n_nodes: int,
    out: Path,
    model: str | None,
    device: str,
) -> None:
    """Attribute, save the result and its graph, print what is largest in both, then the headline."""
    content = read_prompt_text(prompt, text)
    loaded, saes = load_saes(references, model, device)
    other = None if alternative is None else token_of(alternative)
    with locked(out), warnings_as_lines():
        result = attribute(loaded, saes, content, token_of(target), other, **options)
        result.save(out)
        typer.echo(_features(result))
        if n_nodes:
            graph = attribution_graph(loaded, saes, result, n_nodes)
            graph.save(out / "graph.json")
            graph.plot().savefig(out / "graph.png", dpi=150)
            typer.echo(_edges(graph))
    typer.echo(f"\nsaved: {out}")
    typer.echo(result.headline)


def _features(result: ExperimentResult) -> str:
    """The largest attributions, a line each."""
    lines = [f"{'attributed':>10} {'ablated':>8} {'integrated':>10}  part of a write"]
    for row in each_row(result.records.head(_FEATURES)):
        numbers = zip((row.attribution, row.ablated, row.integrated), (10, 8, 10), strict=True)
        lines.append(" ".join(" " * n if x != x else f"{x:+{n}.3f}" for x, n in numbers) + f"  {named(row)}")
    return "\n".join(lines)


def _edges(graph: AttributionGraph) -> str:
    """The strongest edges between features, a line each."""
    edges = graph.edges[graph.edges.target != LOGIT].head(_EDGES)
    if not len(edges):
        return ""
    names = {row.node: named(row) for row in each_row(graph.nodes)}
    lines = [
        f"\n{'attributed':>10} {'share':>8}  edge: the share of the second's coefficient that the first makes"
    ]
    for row in each_row(edges):
        lines.append(f"{row.attribution:+10.3f} {row.share:8.1%}  {names[row.source]} -> {names[row.target]}")
    return "\n".join(lines)
