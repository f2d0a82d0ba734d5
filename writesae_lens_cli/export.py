"""The commands that take features out of SAEs, and labels back in: export and label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae_lens_cli.app import USE, app
from writesae_lens_cli.options import SEVERAL, ContextSize, Device, MaxPassages, Model, SAEs, Seed, Text


@app.command(rich_help_panel=USE)
def export(
    sae: SAEs,
    text: Text = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Folder of features.jsonl.")] = Path("writesae-export"),
    neuronpedia: Annotated[
        str | None,
        typer.Option(
            help="Name of a Neuronpedia source set (writesae-2k): also write Neuronpedia's layout.",
            show_default=False,
        ),
    ] = None,
    n_contexts: Annotated[
        int, typer.Option(min=1, help="Contexts of each kind: strongest, random, without the feature.")
    ] = 8,
    before: Annotated[int, typer.Option(min=0, help="Tokens of a context before the firing.")] = 16,
    after: Annotated[int, typer.Option(min=0, help="Tokens of a context after the firing.")] = 8,
    n_tokens: Annotated[
        int, typer.Option(min=1, help="Promoted tokens of a feature, and suppressed ones.")
    ] = 10,
    max_firings: Annotated[
        int, typer.Option(min=1, help="Firings of a feature at which its effect is measured.")
    ] = 8,
    max_passages: MaxPassages = 64,
    context_size: ContextSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Write features as JSON lines: contexts, tokens that they promote, density, histogram, norm, label."""
    from writesae_lens.cli.exporting import run_export
    from writesae_lens.cli.subjects import Subject

    subject = Subject(sae, None, model, text, context_size, max_passages, device)
    options = {"n_contexts": n_contexts, "before": before, "after": after, "n_tokens": n_tokens}
    run_export(subject, out, **options, max_firings=max_firings, neuronpedia=neuronpedia, seed=seed)


@app.command(rich_help_panel=USE)
def label(
    sae: Annotated[list[str], typer.Option(help=f"Folder that SAELens wrote. {SEVERAL}")],
    labels: Annotated[
        Path,
        typer.Option(
            help="CSV, JSON or JSON lines of columns feature and label; for several SAEs layer, head too."
        ),
    ],
) -> None:
    """Give features labels, which every page and table then shows; they are kept in the SAE's cfg.json."""
    from writesae_lens.cli.exporting import run_label

    run_label(sae, labels)
