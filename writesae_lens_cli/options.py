"""Options that several commands have, each with one help line."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random choices.")]
Device = Annotated[str, typer.Option(help="Device of model and SAE: cpu, cuda, cuda:1, ...")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the sizes, memory and time that it would take; train nothing."),
]
Site = Annotated[Literal["write", "state"], typer.Option(help="Train on the writes or on the states.")]
SAE_REFERENCE = "An SAE: a folder that SAELens wrote, a published best.pt, or RELEASE:ID from the Hub."
