"""The commands that train: train and sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hooked_models.errors import HookedModelError
from writesae_lens_cli.app import SHARE, app
from writesae_lens_cli.options import DryRun, Site


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=SHARE)
def train(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any flag of SAELens's runner: --model_name, --dataset_path, --d_sae, --k, --lr, "
            "--training_tokens, --output_path, --log_to_wandb, ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            help="Cells to train on, LAYER:HEAD with * for all and commas between, such as 1:*; in place of "
            "--hook_name.",
            show_default=False,
        ),
    ] = None,
    site: Site = "write",
    win_rate: Annotated[
        int,
        typer.Option(
            min=0, help="Passages of a quick replacement test at every W&B evaluation; 0: no such test."
        ),
    ] = 0,
    wandb_run_per_cell: Annotated[
        bool,
        typer.Option(
            "--wandb-run-per-cell",
            help="With --log_to_wandb true: also log each cell as a W&B run of its own.",
        ),
    ] = False,
    dry_run: DryRun = False,
    saelens_help: Annotated[bool, typer.Option("--saelens-help", help="List SAELens's flags.")] = False,
) -> None:
    """Train WriteSAEs with SAELens's runner; several cells train from one forward pass.

    For example: writesae-lens train --model_name tiny-gdn --cells "1:*" --training_tokens 200000
    --output_path my_saes. Flags that are not given have the values of the recommended recipe.
    """
    if not saelens_flags and cells is None and not saelens_help:
        raise HookedModelError(
            "nothing to train: give --model_name and --cells, see writesae-lens train --help"
        )
    from writesae_lens.cli.training import estimate_run, run_training
    from writesae_lens.saelens.history import reached

    arguments = ["--help"] if saelens_help else saelens_flags or []
    if dry_run and not saelens_help:
        typer.echo(estimate_run(arguments, cells, site))
        return
    for folder in run_training(arguments, cells, site, win_rate, wandb_run_per_cell):
        typer.echo(f"trained: {folder} ({reached(folder)})")


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=SHARE)
def sweep(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Flags of train: --model_name, --training_tokens, --context_size, --dataset_path, --d_sae, "
            "--device, --seed (default 0), ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str, typer.Option(help="Cells, LAYER:HEAD with * for all and commas between, such as 1,3:*.")
    ] = "*:*",
    site: Site = "write",
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text; its last tenth is for the tests, and all of it if --dataset_path names a text "
            "to train on; default: the shipped text.",
            show_default=False,
        ),
    ] = None,
    experiments: Annotated[
        str, typer.Option(help="Experiments to run on each cell, commas between; none: '-'.")
    ] = "replace",
    max_passages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passages that each experiment reads, at most; default: as its own command.",
            show_default=False,
        ),
    ] = None,
    reports: Annotated[bool, typer.Option("--reports", help="Also write each cell's report page.")] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="This machine, or Ray: the cluster of RAY_ADDRESS, else one started for the sweep."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with a model of its own; with cuda one a GPU.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of a worker; default: the cores over the workers.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="GiB of a worker for model and training; default: what is free.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder, or an address of fsspec such as s3://bucket/sweep.")
    ] = "writesae-sweep",
    dry_run: DryRun = False,
) -> None:
    """Train an SAE on every cell of a model, run experiments on each, and write one table.

    For example: writesae-lens sweep --model_name tiny-gdn --workers 2 --out my_sweep. The same command goes
    on where a stopped run was, and tries again what failed. Then writesae-lens report --sae my_sweep makes
    one page of it.
    """
    from writesae_lens.cli.sweeping import run_sweep

    run_sweep(
        saelens_flags or [],
        cells=cells,
        site=site,
        text=text,
        experiments=[] if experiments == "-" else experiments.split(","),
        max_passages=max_passages,
        reports=reports,
        engine=engine,
        workers=workers,
        threads=threads,
        memory=memory,
        out=out,
        dry_run=dry_run,
    )
