"""Settings of a training run that SAELens would take without a word, or that end deep inside it.

SAELens checks few of its runners' settings: a run on no tokens saves an SAE that was not trained, an infinite
learning rate saves NaN, a model class that was forgotten ends in a list of 200 models. These checks are made
before a model is loaded (`writesae_lens.saelens.starting`), of runs on a `HookedRecurrent` and of runs that
were meant to be such; all others are left to SAELens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sae_lens.util import str_to_dtype

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.bridge import arguments
from hooked_models.errors import one_line
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError

MODEL_CLASS_NAME = "HookedRecurrent"
# Hooks that only the models of `hooked_models` have.
_OURS = re.compile(
    r"\.hook_(write|state|erase)(\.|$)|\.hook_(write_key|write_value|read|decay|recurrence_out|head_out)$"
)
# Settings of SAELens's runners that count something, with the least that makes sense.
_COUNTS = {
    "train_batch_size_tokens": 1,
    "context_size": 1,
    "store_batch_size_prompts": 1,
    "n_batches_in_buffer": 1,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "n_restart_cycles": 1,
    "dead_feature_window": 0,
    "feature_sampling_window": 1,
    "n_checkpoints": 0,
}
# Those that may be worked out with / and come as 50.0.
_STEPS = ("lr_warm_up_steps", "lr_decay_steps")
_SCHEDULES = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


def refuse_other_class(model_class_name: str, model_name: str, hook_names: Any) -> None:
    """Refuse to look for a model of ours in another model class.

    Raises:
        WriteSAEError: the model is a shipped one, or a hook has a name that only ours have.
    """
    if model_class_name == MODEL_CLASS_NAME:
        return
    ours = [name for name in hook_names or () if isinstance(name, str) and _OURS.search(name)]
    if model_name in zoo.SHIPPED or ours:
        what = f"{ours[0]} is a hook" if ours else f"{model_name} is a model"
        raise WriteSAEError(
            f'{what} of a recurrent model: set model_class_name="{MODEL_CLASS_NAME}" (found '
            f"{model_class_name!r:.60})"
        )


def check_run(cfg: Any, saes: Mapping[str, Any]) -> None:
    """Refuse settings of a run on a `HookedRecurrent` that cannot be followed, before anything is loaded.

    Args:
        cfg: of SAELens's runner for one SAE or for several.
        saes: the SAEs' configs by name.

    Raises:
        WriteSAEError: the message names the setting, what it is and what it may be.
    """
    _check_counts(cfg)
    _check_buffer(cfg)
    _check_tokens(cfg)
    _check_learning_rate(cfg)
    _check_saving(cfg)
    for name in ("device", "llm_device", "act_store_device"):
        check_device(name, getattr(cfg, name))
    dtype = _dtype(cfg.dtype)
    others = {str(sae.dtype) for sae in saes.values() if _dtype(sae.dtype) != dtype}
    if dtype != torch.float32 and others and not getattr(cfg, "use_cached_activations", False):
        raise WriteSAEError(
            f"dtype={cfg.dtype!r} of the runner does not change the SAE, which is in "
            f"{', '.join(sorted(others))}: give dtype to the SAE's config (--sae.dtype)"
        )
    scaled = any(sae.normalize_activations == "expected_average_only_in" for sae in saes.values())
    if scaled and not cfg.n_batches_for_norm_estimate >= 1:
        raise WriteSAEError(
            f"n_batches_for_norm_estimate={cfg.n_batches_for_norm_estimate} estimates no norm: give 1 or more"
        )


def _dtype(dtype: Any) -> torch.dtype:
    try:
        return str_to_dtype(dtype)
    except ValueError as error:
        raise WriteSAEError(one_line(error)) from error


def check_device(name: str, device: Any) -> None:
    """As the model's own check of a device, for a setting of a training run.

    Raises:
        WriteSAEError: it cannot be used; the message names the setting.
    """
    try:
        arguments.check_device(device)
    except HookedModelError as error:
        raise WriteSAEError(f"{name}: {error}") from error


def _check_counts(cfg: Any) -> None:
    for name, least in _COUNTS.items():
        value = getattr(cfg, name)
        if isinstance(value, np.integer) or (name in _STEPS and isinstance(value, float)):
            value = int(value) if float(value).is_integer() else value
            setattr(cfg, name, value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise WriteSAEError(f"{name} must be a whole number of at least {least}, got {value!r:.40}")


def _check_tokens(cfg: Any) -> None:
    tokens, batch = cfg.training_tokens, cfg.train_batch_size_tokens
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not float(tokens).is_integer():
        raise WriteSAEError(f"training_tokens must be a whole number, got {tokens!r:.40}")
    if tokens < batch:
        raise WriteSAEError(
            f"training_tokens={tokens} is less than one batch of train_batch_size_tokens={batch}: nothing "
            "would be trained; raise the one or lower the other"
        )
    if isinstance(tokens, float):
        cfg.training_tokens = int(tokens)  # range(), for checkpoints, takes no 1e6


def _check_learning_rate(cfg: Any) -> None:
    name, steps = cfg.lr_scheduler_name.lower(), int(cfg.training_tokens) // cfg.train_batch_size_tokens
    for rate in ("lr", "lr_end"):
        value = getattr(cfg, rate)
        if isinstance(value, np.floating):
            value = float(value)
            setattr(cfg, rate, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise WriteSAEError(f"{rate} must be a finite number, not negative, got {value!r:.40}")
    if name not in _SCHEDULES:
        raise WriteSAEError(
            f"lr_scheduler_name={cfg.lr_scheduler_name!r:.40} is unknown: choose {', '.join(_SCHEDULES)}"
        )
    if name == "constant":
        return
    if cfg.lr_end > cfg.lr:
        raise WriteSAEError(
            f"lr_end={cfg.lr_end} is above lr={cfg.lr}: the learning rate of {name} falls; give less"
        )
    between = steps - cfg.lr_warm_up_steps - cfg.lr_decay_steps
    needed = cfg.n_restart_cycles if name.endswith("restarts") else 1
    if between < needed:
        raise WriteSAEError(
            f"the {steps} steps of the run, less lr_warm_up_steps={cfg.lr_warm_up_steps} and "
            f"lr_decay_steps={cfg.lr_decay_steps}, leave {between} to {name}, which needs {needed}: shorten "
            "the warm-up and the decay, or train on more tokens"
        )


def _check_buffer(cfg: Any) -> None:
    positions = range(cfg.context_size)[slice(*cfg.seqpos_slice)] if _is_slice(cfg.seqpos_slice) else range(0)
    if not positions:
        raise WriteSAEError(
            f"seqpos_slice={cfg.seqpos_slice!r:.60} takes no position of context_size={cfg.context_size}: "
            "give (start, end), with steps forward"
        )
    size = cfg.n_batches_in_buffer * len(positions)
    if size < cfg.train_batch_size_tokens:
        of = (
            f"context_size={cfg.context_size}"
            if len(positions) == cfg.context_size
            else f"{len(positions)} positions"
        )
        raise WriteSAEError(
            f"Buffer size must be one batch at least: n_batches_in_buffer={cfg.n_batches_in_buffer} times "
            f"{of} are {size} writes, less than train_batch_size_tokens={cfg.train_batch_size_tokens}: raise "
            f"n_batches_in_buffer to {math.ceil(cfg.train_batch_size_tokens / len(positions))} or more"
        )
    mixed = cfg.activations_mixing_fraction
    if not 0 <= mixed <= 1:
        raise WriteSAEError(f"activations_mixing_fraction must be between 0 and 1, got {mixed!r:.40}")


def _is_slice(parts: Any) -> bool:
    """Whether the parts are those of a slice that goes forward."""
    whole = all(part is None or (isinstance(part, int) and not isinstance(part, bool)) for part in parts)
    return whole and 1 <= len(parts) <= 3 and (len(parts) < 3 or parts[2] is None or parts[2] > 0)


def _check_saving(cfg: Any) -> None:
    if cfg.checkpoint_path is None and not cfg.logger.log_to_wandb:
        asked = [name for name in ("n_checkpoints", "save_final_checkpoint") if getattr(cfg, name)]
        if asked:
            raise WriteSAEError(
                f"{asked[0]}={getattr(cfg, asked[0])} but no place for checkpoints: give checkpoint_path"
            )
    if cfg.logger.log_to_wandb:
        logger = cfg.logger
        often = (logger.wandb_log_frequency, logger.eval_every_n_wandb_logs, cfg.n_eval_batches)
        names = ("wandb_log_frequency", "eval_every_n_wandb_logs", "n_eval_batches")
        for name, value in zip(names, often, strict=True):
            if not value >= 1:
                raise WriteSAEError(f"{name} must be at least 1, got {value!r:.40}")


def check_sites(model: HookedRecurrent, saes: Mapping[str, Any], hooks: Mapping[str, str], cfg: Any) -> None:
    """Refuse SAEs whose sizes are not those of their hooks, and tokens that the model does not have.

    Args:
        model: the model of the run.
        saes: the SAEs' configs by name.
        hooks: the name of each SAE's hook.
        cfg: of the runner.

    Raises:
        WriteSAEError: another width, exchanged sides, or a head index at a hook that has no axis of heads.
        HookedModelError: the model has no such hook.
    """
    model.check_hook_names(list(hooks.values()))
    indices = getattr(cfg, "hook_head_indices_per_sae", {})
    for name, sae in saes.items():
        check_site(model, hooks[name], sae, indices.get(name, getattr(cfg, "hook_head_index", None)))
    separator, size = cfg.sequence_separator_token, int(model.cfg.d_vocab)
    excluded = cfg.exclude_special_tokens if isinstance(cfg.exclude_special_tokens, (list, tuple)) else ()
    for setting, tokens in (("sequence_separator_token", [separator]), ("exclude_special_tokens", excluded)):
        unknown = [t for t in tokens if isinstance(t, int) and not isinstance(t, bool) and not 0 <= t < size]
        if unknown:
            raise WriteSAEError(f"{setting}: the model has {size} tokens and none of the number {unknown[0]}")


def check_site(model: HookedRecurrent, hook: str, sae: Any, head_index: int | None = None) -> None:
    """Refuse an SAE config whose sizes are not those of a write, state or erase hook; others pass."""
    kind = re.search(r"\.hook_(write|state|erase)\.\d+$", hook)
    if kind is None:
        return
    if head_index is not None:
        raise WriteSAEError(
            f"hook_head_index={head_index} at {hook}, which is of one head already: leave hook_head_index out"
        )
    cell = model.site(hook.replace(".hook_erase.", ".hook_state.")).cell
    check_width(hook, cell, sae.d_in, (sae.d_k, sae.d_v) if hasattr(sae, "d_k") else None)


def check_width(hook: str, cell: Cell, d_in: int, sides: tuple[int, int] | None = None) -> None:
    """Refuse a width, or the sides of a matrix, other than the cell's: exchanged sides have one product."""
    if d_in != cell.d_k * cell.d_v or sides not in (None, (cell.d_k, cell.d_v)):
        shape = f" {sides[0]} x {sides[1]}," if sides else ""
        what = f"d_k={cell.d_k}, d_v={cell.d_v}" if sides else f"d_in={cell.d_k * cell.d_v}"
        raise WriteSAEError(
            f"the SAE takes {d_in} numbers,{shape} but {hook} gives {cell.d_k} x {cell.d_v} = "
            f"{cell.d_k * cell.d_v}: set {what}"
        )


def check_cache_run(cfg: Any) -> None:
    """Refuse settings of a run that writes activations to disk, before anything is loaded.

    Raises:
        WriteSAEError: the message names the setting, what it is and what it may be.
    """
    for name in ("model_batch_size", "context_size", "training_tokens", "d_in"):
        value = getattr(cfg, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise WriteSAEError(f"{name} must be a whole number of at least 1, got {value!r:.40}")
    check_device("device", cfg.device)
    _dtype(cfg.dtype)
    if not cfg.buffer_size_gb * 1e9 >= cfg.bytes_per_token * cfg.n_tokens_in_batch:
        needed = cfg.bytes_per_token * cfg.n_tokens_in_batch / 1e9
        raise WriteSAEError(
            f"buffer_size_gb={cfg.buffer_size_gb} is less than one batch of model_batch_size="
            f"{cfg.model_batch_size} passages takes: give {needed:.3g} or more"
        )
