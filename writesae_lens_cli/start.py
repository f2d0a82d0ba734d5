"""The commands of a first look: demo and models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae_lens_cli.app import START, app
from writesae_lens_cli.options import Seed


@app.command(rich_help_panel=START)
def demo(
    model: Annotated[str, typer.Option(help="One of the shipped models.")] = "tiny-gdn",
    out: Annotated[Path, typer.Option(help="Folder for the SAE, records, figures and report.")] = Path(
        "writesae-demo"
    ),
    cell: Annotated[
        str | None,
        typer.Option(
            help="Cell to train on, LAYER:HEAD; default: 1:1, 2:7 or 3:3, by model.", show_default=False
        ),
    ] = None,
    d_sae: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of codes, half of them for keys; default: the recommended recipe's.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Codes active on each write, half of them for keys; default: the recommended recipe's.",
            show_default=False,
        ),
    ] = None,
    training_tokens: Annotated[int, typer.Option(min=10_000, help="Number of writes to train on.")] = 350_000,
    seed: Seed = 0,
) -> None:
    """Train a WriteSAE on a shipped model, run the replacement test on it, write a report."""
    from writesae_lens.cli.runs import run_demo

    run_demo(model, out, cell, d_sae, k, training_tokens, seed)


@app.command(rich_help_panel=START)
def models(
    model: Annotated[
        str | None, typer.Option(help="List the cells of this model.", show_default=False)
    ] = None,
) -> None:
    """List the shipped models and the pretrained SAEs, or the cells of a model and their hook names."""
    from writesae_lens.cli import sharing

    if model is None:
        sharing.list_models()
    else:
        sharing.list_cells(model)
