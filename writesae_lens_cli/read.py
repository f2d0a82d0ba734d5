"""The command read: a prompt through the features of one SAE or of many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae_lens_cli.app import USE, app
from writesae_lens_cli.options import Device, Model, Prompt, PromptFile, SAEs


@app.command(rich_help_panel=USE)
def read(
    sae: SAEs,
    prompt: Prompt = None,
    text: PromptFile = None,
    n_features: Annotated[
        int, typer.Option(min=1, help="Features of each SAE (of codes: of each side) at a token, at most.")
    ] = 4,
    out: Annotated[Path, typer.Option(help="Folder for records, summary, figure and page.")] = Path(
        "writesae-read"
    ),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Show which features are active at each token of a prompt: coloured text, records, and a page.

    The page, read.html, shades the text by cell and feature; a click on a token lists its features.

    writesae-lens read --sae my_sweep --prompt "The old man went to the sea"
    """
    from writesae_lens.cli.reading import run_read

    run_read(sae, prompt, text, n_features, out, model, device)
