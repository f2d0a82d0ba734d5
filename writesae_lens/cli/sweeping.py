"""The body of ``writesae-lens sweep``: flags of ``train``, on every cell of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from hooked_models import zoo
from writesae_lens.cli.subjects import read_text, warnings_as_lines
from writesae_lens.cli.training import flags_of, parse_runner_config, runner_options
from writesae_lens.errors import WriteSAEError
from writesae_lens.sweep import Sweep, plan_sweep, sweep
from writesae_lens.sweep.run import SET_BY_THE_SWEEP

# Flags of train that a sweep has no use for, and why.
_REFUSED = {
    "--hook_name": "a sweep is named by --cells",
    "--output_path": "a sweep writes to --out",
    "--checkpoint_path": "a stopped sweep goes on from its finished cells",
    "--n_checkpoints": "a stopped sweep goes on from its finished cells",
    "--resume_from_checkpoint": "a stopped sweep goes on from its finished cells",
    "--from_pretrained_path": "it is for one cell",
    "--use_cached_activations": "it is for one cell",
    "--llm_device": "model and SAEs are on one device, --device",
}

# Where a sweep's own defaults are others than those of train's flags: experiments have the seed 0 too.
_DEFAULTS = {"--seed": "0", "--training_tokens": str(zoo.TRAINING_TOKENS)}


def run_sweep(arguments: Sequence[str], text: Path | None, dry_run: bool, **options: Any) -> None:
    """Run the sweep, or print what it would do.

    Raises:
        WriteSAEError: flags that a sweep does not take; cells failed, after all others are finished.
    """
    given = flags_of(arguments)
    for flag, why in _REFUSED.items():
        if flag in given:
            raise WriteSAEError(f"sweep takes no {flag}: {why}")
    if "--model_name" not in given:
        raise WriteSAEError("no model to sweep: give --model_name")
    if str(options.get("out")).startswith("memory:"):
        raise WriteSAEError("--out memory:// would be gone when the command ends: give a folder")
    every = {
        **_training_options(arguments, given),
        **options,
        "text": None if text is None else read_text(text),
    }
    if dry_run:
        only_running = ("engine", "threads", "reports")
        typer.echo(plan_sweep(**{name: value for name, value in every.items() if name not in only_running}))
        return
    with warnings_as_lines():
        done = sweep(**every)
    typer.echo(f"table: {done.out}/cells.csv ({len(done.cells)} cells)")
    if len(done.failed):
        first = done.failed.iloc[0]
        raise WriteSAEError(
            f"{len(done.failed[['layer', 'head']].drop_duplicates())} cells failed, the first, {first.layer}:"
            f"{first['head']}, in {first.step} ({first.reason[:120]}): see {done.out}/failed.csv; the same "
            "command tries them again"
        )
    typer.echo(headline(done))


def _training_options(arguments: Sequence[str], given: dict[str, str]) -> dict[str, Any]:
    """Arguments of `sweep` from flags of ``train``: the model, the SAE, and what is not as by default.

    What is left out has the same defaults in Python, so both go on in the other's folder.
    """
    defaults = [x for flag, value in _DEFAULTS.items() if flag not in given for x in (flag, value)]
    cfg = parse_runner_config([*arguments, *defaults], given)
    bare = ["--model_name", cfg.model_name, *(x for default in _DEFAULTS.items() for x in default)]
    usual = runner_options(parse_runner_config(bare, flags_of(bare)), {})
    training = {
        name: value
        for name, value in runner_options(cfg, given).items()
        if name not in SET_BY_THE_SWEEP and (name not in usual or usual[name] != value)
    }
    if "--act_store_device" not in given:  # SAELens's parser has made it that of the SAEs: the first GPU's
        training.pop("act_store_device", None)
    return {**training, "model_name": cfg.model_name, "sae": cfg.sae}


def headline(done: Sweep) -> str:
    """The first figure of the first experiment over all cells: median and worst, beside its lookup."""
    columns = [c for c in done.cells.columns if c.endswith("median_recovered_both")]
    figure = next(
        (c for c in ("replace_median_recovered_both", "replace_median_recovered") if c in columns), None
    )
    if figure is None:
        return f"{len(done.cells)} cells finished"
    values = done.cells[figure]
    worst = done.cells.loc[values.idxmin()]
    lookup = done.cells.get(figure.replace("replace_", "replace_lookup_"))
    beside = "" if lookup is None else f"; the lookup of equal size {lookup.median():.1%}"
    return (
        f"{len(done.cells)} cells: recovered, median over firings: {values.median():.1%} in the median cell, "
        f"{values.min():.1%} in the worst ({int(worst.layer)}:{int(worst['head'])}){beside}"
    )
