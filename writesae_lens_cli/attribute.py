"""The command attribute: which written features made the model prefer a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae_lens_cli.app import USE, app
from writesae_lens_cli.options import Device, Model, Prompt, PromptFile, SAEs


@app.command(rich_help_panel=USE)
def attribute(
    sae: SAEs,
    target: Annotated[
        str,
        typer.Option(help='The token, by id or text; many start with a space: " sea".', metavar="ID|TEXT"),
    ],
    prompt: Prompt = None,
    text: PromptFile = None,
    alternative: Annotated[
        str | None,
        typer.Option(
            help="The token that it is compared with; default: the most likely other one.",
            metavar="ID|TEXT",
            show_default=False,
        ),
    ] = None,
    position: Annotated[
        int, typer.Option(help="Token of the prompt after which the two are compared; -1: the last one.")
    ] = -1,
    steps: Annotated[
        int, typer.Option(min=0, help="Points on the path of the integrated attributions; 0: none of these.")
    ] = 12,
    n_check: Annotated[
        int, typer.Option(min=0, help="Features that are taken out of their writes, each by itself.")
    ] = 20,
    n_nodes: Annotated[int, typer.Option(min=0, help="Features in the graph; 0: no graph.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for records, summary, figures and graph.")] = Path(
        "writesae-attribute"
    ),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Find which written features, at which tokens and heads, made the model prefer a token to another.

    For example: writesae-lens attribute --sae my_sweep --prompt "The old man went to the" --target " sea".
    The largest ones are taken out of their writes to check, and their graph is saved as graph.json.
    """
    from writesae_lens.cli.attributing import run_attribute

    options = {"position": position, "steps": steps, "n_check": n_check}
    run_attribute(sae, prompt, text, target, alternative, options, n_nodes, out, model, device)
