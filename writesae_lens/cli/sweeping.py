"""The body of ``writesae-lens sweep``: flags of ``train``, on every cell of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from hooked_models import zoo
from writesae_lens.cli.subjects import read_text
from writesae_lens.cli.training import flags_of, parse_runner_config, runner_options
from writesae_lens.errors import WriteSAEError
from writesae_lens.sweep import Plan, Sweep, plan_sweep, sweep
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
    cfg = parse_runner_config(arguments, given)
    training = runner_options(cfg, given)
    for name in SET_BY_THE_SWEEP & set(training):
        del training[name]
    content = None if text is None else read_text(text)
    if "--training_tokens" not in given:
        training["training_tokens"] = zoo.TRAINING_TOKENS
    every = {
        **training,
        **options,
        "context_size": cfg.context_size,
        "text": content,
        "sae": cfg.sae,
        "schedule": {},
    }
    if dry_run:
        only_running = ("engine", "threads", "reports")
        typer.echo(_plan({name: value for name, value in every.items() if name not in only_running}))
        return
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


def _plan(options: dict[str, Any]) -> Plan:
    return plan_sweep(**options)


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
