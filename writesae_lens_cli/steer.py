"""The command steer: continuations of a prompt with chosen features written beside the model's own writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from writesae_lens_cli.app import USE, app
from writesae_lens_cli.options import Device, Model, Prompt, PromptFile, SAEs, Seed


@app.command(rich_help_panel=USE)
def steer(
    sae: SAEs,
    feature: Annotated[
        list[str],
        typer.Option(
            metavar="[LAYER:HEAD:]FEATURE[+VALUE]",
            help="A feature, or a pair of a key code and a value code (12+600); of several SAEs with its "
            "cell (1:3:12). May be given more than once.",
        ),
    ],
    prompt: Prompt = None,
    text: PromptFile = None,
    size: Annotated[
        list[float] | None,
        typer.Option(
            help="In units of the feature's own size where it fires; one for all features, or one each. "
            "Default: 3.",
            show_default=False,
        ),
    ] = None,
    dose: Annotated[
        list[float] | None,
        typer.Option(
            help="Factors of the sizes, for the dose curve. Default: 0.5, 1, 2 and 4.", show_default=False
        ),
    ] = None,
    n_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 40,
    n_continuations: Annotated[
        int, typer.Option(min=1, help="Continuations of each dose and condition.")
    ] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    promoted: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID|TEXT",
            help="Token whose probability is followed. Default: the five that the features promote most.",
            show_default=False,
        ),
    ] = None,
    unit: Annotated[
        Literal["firing", "absolute"],
        typer.Option(help="Unit of the sizes: the feature's median coefficient, or plain coefficients."),
    ] = "firing",
    sizes_text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text on which the features' own sizes are measured; default: the test part of the "
            "shipped text.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, summary and figure.")] = Path(
        "writesae-steer"
    ),
    model: Model = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Continue a prompt natively, steered by features, and by random features of the same norm.

    The dose curve shows KL, the promoted tokens' probability and perplexity as the sizes grow. Features that
    are active in a text are listed by writesae-lens read.

    writesae-lens steer --sae my_sae --feature NUMBER --prompt "Once upon a time"
    """
    from writesae_lens.cli.reading import run_steer

    options = {"n_tokens": n_tokens, "n_continuations": n_continuations, "temperature": temperature}
    options |= {"unit": unit, "seed": seed} | ({"doses": tuple(dose)} if dose else {})
    prompts = prompt, text, sizes_text
    run_steer(sae, feature, size or [3.0], promoted or [], prompts, out, model, device, options)
