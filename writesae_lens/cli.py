"""Command line: ``writesae-lens demo | train | replace | models``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hooked_models.errors import HookedModelError
from writesae_lens.errors import WriteSAEError

# Everything heavy is imported inside the commands, so that --help answers at once.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders on the cache writes of recurrent language models.",
)

Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A shipped model.")] = "tiny-gdn",
    out: Annotated[Path, typer.Option(help="Folder for the SAE, records, figures and report.")] = Path(
        "writesae-demo"
    ),
    cell: Annotated[str | None, typer.Option(help="LAYER:HEAD; default: the shipped model's best.")] = None,
    d_sae: Annotated[int, typer.Option(min=1, help="Atoms in the dictionary.")] = 2048,
    k: Annotated[int, typer.Option(min=1, help="Atoms active per write.")] = 4,
    training_tokens: Annotated[int, typer.Option(min=10_000, help="Writes to train on.")] = 600_000,
    seed: Seed = 0,
) -> None:
    """Train a WriteSAE on a shipped model, put it through the replacement test, write a report."""
    from writesae_lens.demo import run_demo

    result = run_demo(out, model, _cell(cell), d_sae, k, training_tokens, seed)
    typer.echo(f"report: {out / 'report.html'}")
    _headline(result.summary)


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of SAELens's own: --model_name, --dataset_path, --d_sae, --k, --lr, --training_tokens, "
            "--output_path, --log_to_wandb, ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(help="LAYER:HEAD, * for all, commas between: 1:*; instead of --hook_name."),
    ] = None,
    site: Annotated[str, typer.Option(help="With --cells: train on each write, or each state.")] = "write",
    win_rate: Annotated[
        int, typer.Option(min=0, help="Passages for a quick replacement test at every W&B evaluation.")
    ] = 0,
    saelens_help: Annotated[bool, typer.Option("--saelens-help", help="List SAELens's flags.")] = False,
) -> None:
    """Train WriteSAEs with SAELens's runner; several cells train from one forward pass.

    For example: writesae-lens train --model_name tiny-gdn --cells "1:*" --d_sae 2048 --k 4 --lr 4e-3
    --context_size 256 --training_tokens 200000 --output_path my_saes
    """
    from writesae_lens.train import run_training

    if site not in ("write", "state"):
        raise WriteSAEError(f"--site is write or state, got {site!r}")
    if not saelens_flags and cells is None and not saelens_help:
        raise WriteSAEError("nothing to train: give --model_name and --cells, see writesae-lens train --help")
    arguments = ["--help"] if saelens_help else saelens_flags or []
    for folder in run_training(arguments, cells, site, win_rate):  # type: ignore[arg-type]
        typer.echo(f"trained: {folder}")


@app.command()
def replace(
    sae: Annotated[Path, typer.Option(help="Folder of an SAE in SAELens format.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the model's held-out text.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that the SAE names.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, figures and report.")] = Path(
        "writesae-replacement"
    ),
    scale: Annotated[
        str, typer.Option(help="Size of the atom: coefficient or matched_norm.")
    ] = "coefficient",
    replaces: Annotated[
        str, typer.Option(help="What the atom stands in for: write, or update (erase and write).")
    ] = "write",
    max_firings: Annotated[int, typer.Option(min=1, help="Firings to test, at most.")] = 5000,
    max_passages: Annotated[int, typer.Option(min=1, help="Passages to read, at most.")] = 32,
    context_size: Annotated[int | None, typer.Option(min=1, help="Tokens of a passage.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    resume: Annotated[bool, typer.Option(help="Keep finished passages in OUT, and go on from them.")] = False,
    seed: Seed = 0,
) -> None:
    """Run the replacement test of an SAE on a text."""
    from hooked_models import HookedRecurrent, zoo
    from writesae_lens.experiments import replacement_test
    from writesae_lens.experiments.inputs import as_passages
    from writesae_lens.report import write_report

    loaded = _load_sae(sae, device)
    name = model or loaded.cfg.metadata.model_name
    if name is None:
        raise WriteSAEError(f"{sae} does not say which model it belongs to: give --model")
    if text is None and name not in zoo.SHIPPED:
        raise WriteSAEError(f"{name} ships with no text: give --text FILE")
    content = zoo.held_out_text() if text is None else _read(text)
    booted = HookedRecurrent.boot_transformers(name, device=device)
    size = context_size or loaded.cfg.metadata.context_size
    bos = bool(loaded.cfg.metadata.prepend_bos)
    passages = as_passages(booted, content, size, bos)[-max_passages:]
    result = replacement_test(
        booted,
        loaded,
        passages,
        scale=scale,  # type: ignore[arg-type]
        replaces=replaces,  # type: ignore[arg-type]
        max_firings=max_firings,
        seed=seed,
        progress_folder=str(out / "progress") if resume else None,
    )
    result.save(out)
    write_report(out / "report.html", booted, result, passages)
    typer.echo(f"report: {out / 'report.html'}")
    _headline(result.summary)


@app.command()
def models(
    model: Annotated[str | None, typer.Option(help="List this model's cells.")] = None,
) -> None:
    """List the shipped models, or a model's cells and their hook names."""
    from hooked_models import HookedRecurrent, zoo

    if model is None:
        for name in zoo.SHIPPED:
            typer.echo(name)
        return
    booted = HookedRecurrent.boot_transformers(model, device="cpu")
    for cell in booted.cells:
        hook = booted.write_hook_name(cell.layer, cell.head)
        typer.echo(f"{cell.layer}:{cell.head}\t{cell.d_k} x {cell.d_v}\t{cell.architecture}\t{hook}")


def _cell(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    layer, _, head = text.partition(":")
    if not (layer.isdigit() and head.isdigit()):
        raise WriteSAEError(f"a cell is written LAYER:HEAD, for example 1:0, got {text!r}")
    return int(layer), int(head)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WriteSAEError(f"could not read {path} as UTF-8 text: {error}") from error


def _load_sae(folder: Path, device: str) -> Any:
    from sae_lens import SAE
    from safetensors import SafetensorError

    import writesae_lens  # noqa: F401  (registers the architecture)

    missing = [n for n in ("cfg.json", "sae_weights.safetensors") if not (folder / n).is_file()]
    if missing:
        raise WriteSAEError(
            f"{folder} is no SAE folder: {' and '.join(missing)} not found in it; give the folder that "
            "SAELens wrote (in a demo's output: sae/)"
        )
    try:
        return SAE.load_from_disk(folder, device=device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise WriteSAEError(
            f"could not load the SAE in {folder}: {type(error).__name__}: {reason}"
        ) from error


def _headline(summary: dict[str, Any]) -> None:
    low, high = summary["win_rate_ci"]
    typer.echo(
        f"win rate {summary['win_rate']:.1%} ({low:.1%} to {high:.1%}), {summary['n_firings']} firings"
    )


def main() -> None:
    """Entry point: the packages' own errors, and the system's, are one line on stderr and status 2."""
    try:
        app()
    except (HookedModelError, OSError) as error:
        typer.echo(f"writesae-lens: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
