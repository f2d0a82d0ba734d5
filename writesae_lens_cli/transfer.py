"""The commands that download, convert and publish SAEs: pull, convert, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae_lens_cli.app import SHARE, app
from writesae_lens_cli.options import SAE_REFERENCE


@app.command(rich_help_panel=SHARE)
def pull(
    release: Annotated[
        str, typer.Argument(help="A release that `models` lists, or a repository, OWNER/NAME.")
    ],
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="SAEs of it; default: all of a release.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit; default: the published one.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what the cache has.")] = False,
) -> None:
    """Download published SAEs into the cache, check their files, and print what they are."""
    from writesae_lens.cli import sharing

    sharing.pull(release, ids, revision, force)


@app.command(rich_help_panel=SHARE)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published best.pt, or the folder that it is in.")],
    out: Annotated[Path, typer.Argument(help="Folder for cfg.json and sae_weights.safetensors.")],
    model: Annotated[
        str | None, typer.Option(help="Base model, if the path does not name it.", show_default=False)
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer, if the checkpoint does not name it.", show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, help="Head, if the checkpoint does not name it.", show_default=False)
    ] = None,
) -> None:
    """Save a published checkpoint in SAELens's format: safetensors and cfg.json."""
    from writesae_lens.cli import sharing

    sharing.convert(checkpoint, out, model, layer, head)


@app.command(rich_help_panel=SHARE)
def push(
    sae: Annotated[str, typer.Argument(help=SAE_REFERENCE)],
    repository: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; it is created if it does not exist.")
    ],
    sae_id: Annotated[
        str | None,
        typer.Option("--id", help="Folder in the repository; default: the SAE's cell.", show_default=False),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of its replacement test, for the model card.", show_default=False),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch to publish on.")] = "main",
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is created: make it private.")
    ] = False,
) -> None:
    """Publish an SAE on the Hugging Face Hub, with a model card."""
    from writesae_lens.cli import sharing

    sharing.push(sae, repository, sae_id, results, revision, private)
