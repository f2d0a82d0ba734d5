"""The commands that gather results: report and reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from writesae_lens_cli.app import REPORT, app
from writesae_lens_cli.options import (
    SAE_REFERENCE,
    ContextSize,
    Device,
    DryRun,
    MaxPassages,
    Model,
    Seed,
    Text,
)


@app.command(rich_help_panel=REPORT)
def report(
    context: typer.Context,
    sae: Annotated[
        list[str],
        typer.Option(
            help=f"{SAE_REFERENCE} Or the folder of a sweep. Given twice: two SAEs of a cell, side by side."
        ),
    ],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a saved result, or of several; may be given more than once.", show_default=False
        ),
    ] = None,
    text: Text = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Folder of the page; default of a sweep: its own.")] = Path(
        "writesae-report"
    ),
    max_passages: MaxPassages = 64,
    context_size: ContextSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Write one self-contained HTML page: overview, results, and a browser of all atoms or codes.

    The replacement test, the partition and the top contexts are run if they are not among the results given.
    The page of two SAEs of a cell has both side by side: measures, matched features, their contexts. The page
    of a sweep's folder is its atlas: all cells, coloured, plotted and tabulated by any figure.
    """
    from writesae_lens.cli.runs import write_report
    from writesae_lens.cli.subjects import Subject

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    subject = Subject(sae, None, model, text, context_size, max_passages, device)
    write_report(subject, results or [], out, seed, given)


@app.command(rich_help_panel=REPORT)
def reproduce(
    config: Annotated[
        str | None, typer.Option(help="A configuration of the paper; without it they are listed.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Another model in place of the paper's, such as tiny-gdn.", show_default=False),
    ] = None,
    recipe: Annotated[
        Literal["recommended", "paper"],
        typer.Option(help="This package's defaults, or the paper's training, formula and direction."),
    ] = "recommended",
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: reproduce-CONFIG.", show_default=False)
    ] = None,
    training_tokens: Annotated[
        int | None,
        typer.Option(
            min=10_000,
            help="Default: as many as in the paper; 350,000 on shipped models.",
            show_default=False,
        ),
    ] = None,
    experiments: Annotated[
        str | None, typer.Option(help="Experiments to run, commas between; default: all.", show_default=False)
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the model.")
    ] = "float32",
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Run a configuration of the paper: train, run every experiment, tabulate beside the paper's figures.

    An interrupted run goes on where it stopped when it is started again with the same OUT.
    """
    from writesae_lens.cli import runs

    if config is None:
        runs.list_configurations()
    elif dry_run:
        from hooked_models.files.loading import check_device

        check_device(device)
        runs.estimate(config, model, training_tokens, dtype, recipe, experiments, device)
    else:
        runs.reproduce(config, model, recipe, out, training_tokens, experiments, device, dtype, seed)
