"""Bodies of the commands that run several steps: ``demo``, ``report`` and ``reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from writesae_lens import demo
from writesae_lens import reproduce as paper
from writesae_lens.cli.subjects import Subject, load, parse_cell, warnings_as_lines
from writesae_lens.errors import WriteSAEError, interruptible
from writesae_lens.report import again
from writesae_lens.report.atlas import make_atlas
from writesae_lens.report.cell_table import CellTable, is_sweep
from writesae_lens.report.page import make_report, saved_results
from writesae_lens.report.side_by_side import make_side_by_side

_RESUMES = "the same command goes on where it stopped"


def run_demo(
    model: str, out: Path, cell: str | None, d_sae: int | None, k: int | None, training_tokens: int, seed: int
) -> None:
    """Run the demo, and print the page and the headline of its replacement test."""
    with interruptible("run it again: the demo starts from the beginning"):
        result = demo.run_demo(out, model, parse_cell(cell), d_sae, k, training_tokens, seed)
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(result.headline)


def write_report(
    subject: Subject, result_folders: list[Path], out: Path, seed: int, given: Sequence[str]
) -> None:
    """Write the report of an SAE and its saved results, the page of two SAEs, or the atlas of a sweep.

    Args:
        subject, result_folders, out, seed: of the report.
        given: names of the options that the user gave; an atlas refuses those that are not for it.

    Raises:
        WriteSAEError: there are more than two SAEs, one is given twice, or a sweep stands beside another.
    """
    references = subject.saes
    if sweeps := [reference for reference in references if is_sweep(Path(reference))]:
        if len(references) > 1:
            raise WriteSAEError(f"{sweeps[0]} is the folder of a sweep, whose page is its own: give it alone")
        _write_atlas(Path(references[0]), out if "out" in given else None, given)
        return
    if len(references) > 2 or len(set(references)) < len(references):
        raise WriteSAEError(
            f"a page is of one SAE or of two different ones of a cell: --sae is given {len(references)} times"
        )
    results = [result for folder in result_folders for result in saved_results(folder)]
    loaded = load(subject)
    lines = again.of_report(loaded.model, loaded.saes, loaded.passages, references, out, seed, result_folders)
    about: dict[str, Any] = {"seed": seed, "command": lines.command, "code": lines.python}
    with interruptible(_RESUMES), warnings_as_lines():
        if len(references) > 1:
            saes = dict(zip(references, loaded.saes, strict=True))
            page = make_side_by_side(out, loaded.model, saes, loaded.passages, results, **about)
        else:
            (reference,), (sae,) = references, loaded.saes
            training = Path(reference) if Path(reference).is_dir() else None
            about |= {"training": training, "reference": reference}
            page = make_report(out, loaded.model, sae, loaded.passages, results, **about)
    typer.echo(f"report: {page}")


def _write_atlas(folder: Path, out: Path | None, given: Sequence[str]) -> None:
    """Write the atlas of a sweep's folder; print its page and headline."""
    if others := [f"--{name.replace('_', '-')}" for name in given if name not in ("sae", "out")]:
        raise WriteSAEError(
            f"{folder} is the folder of a sweep, and {others[0]} does not apply to it: its page shows what "
            "the sweep measured"
        )
    typer.echo(f"atlas: {make_atlas(folder, out)}")
    typer.echo(CellTable.read(folder).headline)


def list_configurations() -> None:
    """Print the configurations of the paper that can be run."""
    for name, configuration in paper.CONFIGS.items():
        typer.echo(f"{name:22}{configuration.about}")


def estimate(
    config: str,
    model: str | None,
    training_tokens: int | None,
    dtype: str,
    recipe: Literal["recommended", "paper"],
    experiments: str | None,
    device: str,
) -> None:
    """Print the sizes, memory and time of a configuration."""
    names = None if experiments is None else experiments.split(",")
    typer.echo(paper.estimate(config, model, training_tokens, dtype, recipe, names, device))


def reproduce(
    config: str,
    model: str | None,
    recipe: Literal["recommended", "paper"],
    out: Path | None,
    training_tokens: int | None,
    experiments: str | None,
    device: str,
    dtype: str,
    seed: int,
) -> None:
    """Run a configuration of the paper, and print its table."""
    names = None if experiments is None else experiments.split(",")
    folder = out or Path(f"reproduce-{config}")
    with interruptible(_RESUMES), warnings_as_lines():
        table = paper.reproduce(config, folder, model, recipe, training_tokens, names, device, dtype, seed)
    typer.echo(paper.as_markdown(table))
    typer.echo(f"saved: {folder / 'table.md'}")
