"""Options that several commands have, each with one help line."""

from __future__ import annotations

from pathlib import Path
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

SEVERAL = "Once for each SAE; a folder of several, such as a sweep's, stands for all of them."
SAEs = Annotated[list[str], typer.Option(help=f"{SAE_REFERENCE} {SEVERAL}")]
Model = Annotated[str | None, typer.Option(help="Default: the model that the SAE names.", show_default=False)]
Prompt = Annotated[str | None, typer.Option(help="The prompt.", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option(help="A UTF-8 file with the prompt, in its place.", show_default=False)
]
Text = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text to read; default: the test part of the shipped text.", show_default=False),
]
MaxPassages = Annotated[
    int, typer.Option(min=1, help="Passages to read, at most: the last ones of the text.")
]
ContextSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of a passage; default: as the SAE was trained, else 256.", show_default=False
    ),
]
