"""The command ``writesae-lens train``: SAELens's own flags, on the cells of a recurrent model.

Every flag of SAELens's parser means what it means there. This command adds three things: ``--cells`` names
heads instead of a hook, sizes come from the model, and flags that are not given have the values of
`train_cells`, which are those of the recommended recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_lens import LanguageModelSAERunnerConfig

from hooked_models import HookedModelError, HookedRecurrent
from hooked_models.errors import one_line
from hooked_models.hooked_recurrent import Cell, Site
from writesae_lens.cells import parse_cells
from writesae_lens.errors import WriteSAEError
from writesae_lens.reproduce.estimates import estimate_training
from writesae_lens.saelens.registration import MODEL_CLASS_NAME
from writesae_lens.saelens.runner import RUNNER_DEFAULTS, sized, train_cells
from writesae_lens.saelens.upstream import parse_flags
from writesae_lens.saes.config import ARCHITECTURE, RECOMMENDED_SCHEDULE, WriteSAETrainingConfig

# Flags that have other defaults here than in SAELens.
DEFAULTS = {
    "--architecture": ARCHITECTURE,
    "--model_class_name": MODEL_CLASS_NAME,
    "--log_to_wandb": "false",
} | {f"--{name}": str(value) for name, value in RUNNER_DEFAULTS.items() if name != "checkpoint_path"}
# Flags that do nothing unless a run is logged to W&B, which it is not by default.
_OF_WANDB = ("log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "log_weights_to_wandb")
_OF_WANDB += ("wandb_project", "run_name", "wandb_entity", "wandb_log_frequency", "eval_every_n_wandb_logs")
_OF_WANDB += ("n_eval_batches", "eval_batch_size_prompts")
_FLAGS_ARE_LISTED = "writesae-lens train --saelens-help lists the flags"


def run_training(
    arguments: Sequence[str],
    cells: str | None = None,
    site: Literal["write", "state"] = "write",
    win_rate_passages: int = 0,
    wandb_run_per_cell: bool = False,
) -> list[Path]:
    """Train as the command line asks.

    Args:
        arguments: flags of SAELens's parser.
        cells: as in `parse_cells`; None takes the cell of ``--hook_name``.
        site: with ``cells``: train on the writes, or on the states.
        win_rate_passages: log the replacement test's win rate on so many passages at every evaluation.
        wandb_run_per_cell: also log each cell as a W&B run of its own.

    Returns:
        folders of the trained SAEs, in SAELens's format.

    Raises:
        WriteSAEError: flags that do not go together, or no text to train on.
    """
    plan = _planned(arguments, cells)
    options = runner_options(plan.cfg, plan.given)
    return train_cells(
        plan.model,
        plan.chosen,
        sae=lambda cell: sized(plan.cfg.sae, cell),
        site=site,
        schedule={},  # the flags have it already
        win_rate_passages=win_rate_passages,
        wandb_run_per_cell=wandb_run_per_cell,
        **options,
    )


def runner_options(cfg: LanguageModelSAERunnerConfig[Any], given: dict[str, str]) -> dict[str, Any]:
    """Arguments of `train_cells` from SAELens's config, beside the SAEs and their cells."""
    options = {
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(LanguageModelSAERunnerConfig) if f.init
    }
    # SAELens has appended the run's id, and will again.
    options["checkpoint_path"] = cfg.checkpoint_path and str(Path(cfg.checkpoint_path).parent)
    for name in ("sae", "hook_name"):
        del options[name]
    if "--prepend_bos" not in given:
        del options["prepend_bos"]
    return options


def estimate_run(
    arguments: Sequence[str], cells: str | None = None, site: Literal["write", "state"] = "write"
) -> str:
    """The sizes, memory and time of a training, which is not run; the arguments are those of `run_training`.

    Raises:
        WriteSAEError: as `run_training`, but for a text that is missing.
    """
    plan = _planned(arguments, cells)
    sites = [plan.model.site(x) if isinstance(x, str) else Site(x, site) for x in plan.chosen]
    return estimate_training(
        plan.model,
        [site.cell for site in sites],
        [sized(plan.cfg.sae, site.cell) for site in sites],
        sites[0].kind,
        plan.cfg.training_tokens,
        plan.cfg.train_batch_size_tokens,
        plan.cfg.context_size,
        {name: getattr(plan.cfg, name) for name in ("store_batch_size_prompts", "n_batches_in_buffer")},
    )


class _Plan(NamedTuple):
    """A training as the command line asks for it: the model, its cells or their hook, SAELens's config."""

    model: HookedRecurrent
    chosen: list[Cell] | list[str]
    cfg: LanguageModelSAERunnerConfig[Any]
    given: dict[str, str]


def _planned(arguments: Sequence[str], cells: str | None) -> _Plan:
    """What the command line asks for, with the model loaded.

    Raises:
        WriteSAEError: flags that do not go together.
    """
    given = flags_of(arguments)
    if cells is None and "--hook_name" not in given and "--help" not in given:
        raise WriteSAEError("nothing to train on: give --cells or --hook_name")
    if cells is not None and "--hook_name" in given:
        raise WriteSAEError("--cells and --hook_name both say what to train on: give one of them")
    if "--model_name" not in given and "--help" not in given:
        raise WriteSAEError("no model to train on: give --model_name")
    cfg = parse_runner_config(arguments, given)
    kwargs = dict(cfg.model_from_pretrained_kwargs or {})
    model = HookedRecurrent.boot_transformers(cfg.model_name, device=cfg.llm_device, **kwargs)
    chosen = [cfg.hook_name] if cells is None else parse_cells(model, cells)
    if len(chosen) == 1 and cfg.use_cached_activations and "--cached_activations_path" not in given:
        raise WriteSAEError("say where the cache is: --cached_activations_path")
    return _Plan(model, chosen, cfg, given)


def parse_runner_config(arguments: Sequence[str], given: dict[str, str]) -> LanguageModelSAERunnerConfig[Any]:
    """SAELens's config from the flags that are given, and this command's defaults for the others.

    Args:
        arguments: flags of SAELens's parser.
        given: the same, as `flags_of` gives them.

    Raises:
        WriteSAEError: SAELens refuses the flags, they would do nothing, or name another class of models.
    """
    idle = [f"--{name}" for name in _OF_WANDB if f"--{name}" in given and "--log_to_wandb" not in given]
    if idle:
        raise WriteSAEError(f"{', '.join(idle)} would do nothing: give --log_to_wandb true too")
    cfg = _parse(arguments, given)
    if cfg.model_class_name != MODEL_CLASS_NAME:
        raise WriteSAEError(
            f"this command trains on {MODEL_CLASS_NAME}; for {cfg.model_class_name} use "
            "python -m sae_lens.llm_sae_training_runner"
        )
    return cfg


def _parse(arguments: Sequence[str], given: dict[str, str]) -> LanguageModelSAERunnerConfig[Any]:
    if "--sae" in given:  # SAELens's other name for it
        given["--architecture"] = given["--sae"]
    defaults = dict(DEFAULTS)
    if given.get("--architecture", ARCHITECTURE) == ARCHITECTURE:
        if {"--d_k", "--d_v"} & set(given):
            raise WriteSAEError("d_k and d_v are the cell's own: leave --d_k and --d_v out")
        defaults |= _recipe(given)
        schedule = {f"--{name}": str(value) for name, value in RECOMMENDED_SCHEDULE.items()}
        if "--lr" in given:  # the last learning rate follows the first one, by SAELens's rule
            del schedule["--lr_end"]
        defaults |= schedule
    added = [x for flag, values in defaults.items() if flag not in given for x in (flag, *values.split())]
    usage = io.StringIO()  # SAELens's parser prints its usage in full before it says what is wrong
    try:
        with contextlib.redirect_stderr(usage):
            return parse_flags([*arguments, *added])
    except argparse.ArgumentError as error:
        raise WriteSAEError(f"{error}; {_FLAGS_ARE_LISTED}") from error
    except SystemExit as error:
        if not error.code:  # --help
            raise
        message = usage.getvalue().strip().rpartition("error: ")[2]
        raise WriteSAEError(f"{message}; {_FLAGS_ARE_LISTED}") from error
    except HookedModelError:
        raise
    except (ValueError, ArithmeticError, TypeError, KeyError) as error:  # of SAELens's configs
        raise WriteSAEError(
            f"SAELens refuses these flags ({type(error).__name__}: {one_line(error)}); {_FLAGS_ARE_LISTED}"
        ) from error


def _recipe(given: dict[str, str]) -> dict[str, str]:
    """The recommended recipe, or that of atoms where the flags ask for atoms, as flags."""
    codes = given.get("--decoder", "codes") == "codes"
    recipe = (WriteSAETrainingConfig.recommended if codes else WriteSAETrainingConfig.atoms)(d_k=1, d_v=1)
    # The parser wants the sides before the model is loaded: 1 stands there until `sized` puts in the cell's.
    flags = {
        f"--{field.name}": " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for field in dataclasses.fields(recipe)
        if isinstance(value := getattr(recipe, field.name), (str, int, float, tuple))
        and value != field.default
    }
    # Of codes each of these is the sum of the next two, which would overwrite a value given for it.
    for whole, *sides in (("--d_sae", "--n_key", "--n_value"), ("--k", "--k_key", "--k_value")):
        if whole in given:
            flags = {flag: value for flag, value in flags.items() if flag not in sides}
    return flags


def flags_of(arguments: Sequence[str]) -> dict[str, str]:
    """Flags and their values, in both forms: ``--flag value`` and ``--flag=value``."""
    return dict(_flags(arguments))


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            yield flag, value if equals else following
