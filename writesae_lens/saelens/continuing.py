"""Training that goes on: from a checkpoint of an interrupted run, or from a saved SAE.

SAELens loads a checkpoint into whatever SAE the new settings made, and lets the state in it override the new
learning rate. Given `from_pretrained_path` it forgets the SAE config of the run. Both are checked here before
anything is loaded, and the run's own options are put back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_lens import TrainingSAE, TrainingSAEConfig

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.config import ARCHITECTURE, WriteSAETrainingConfig

# What makes an SAE's parameters what they are. k may change in training that goes on from a saved SAE.
_FORM = ("architecture", "d_k", "d_v", "d_in", "d_sae", "n_key", "n_value", "rank")
_FORM += ("encoder", "decoder", "activation", "normalize_activations")
# Settings that the state in a checkpoint overrides.
_OF_STATE = ("lr", "lr_scheduler_name", "adam_beta1", "adam_beta2")
_OF_SCHEDULE = ("training_tokens", "train_batch_size_tokens", "lr_end", "lr_warm_up_steps", "lr_decay_steps")
_OF_SCHEDULE += ("n_restart_cycles",)
# What an SAE is trained on; of the first two the last part of a path, for folders are moved.
_NAMES, _OF_TEXT = ("model_name", "dataset_path"), ("context_size", "prepend_bos", "seqpos_slice")


def check_resumed(cfg: Any, saes: Mapping[str, Any], hooks: Mapping[str, str]) -> None:
    """Refuse to resume from the checkpoint of another SAE, hook, learning rate schedule, model or text.

    Args:
        cfg: of SAELens's runner for one SAE or for several.
        saes: the SAEs' configs by name, "" for the SAE of a runner for one.
        hooks: the name of each SAE's hook.

    Raises:
        WriteSAEError: the message names what differs.
    """
    if cfg.resume_from_checkpoint is None:
        return
    checkpoint = Path(cfg.resume_from_checkpoint)
    if not checkpoint.is_dir():
        raise WriteSAEError(f"{checkpoint} is no checkpoint: give the folder that an interrupted run names")
    for name, sae in saes.items():
        saved = _read(checkpoint / name / "cfg.json")
        found = saved | {"hook_name": (saved.get("metadata") or {}).get("hook_name")}
        now = sae.to_dict() | {"hook_name": hooks[name]}
        differing = _differing(found, now, (*_FORM, "k", "k_key", "k_value", "hook_name"))
        if differing:
            raise WriteSAEError(
                f"{checkpoint} is of another SAE: {differing}; resume with the interrupted run's settings"
            )
    runner = _read(checkpoint / "runner_cfg.json")
    constant = str(runner.get("lr_scheduler_name")).lower() == "constant"
    warms = bool(runner.get("lr_warm_up_steps") or runner.get("lr_decay_steps"))
    names = _OF_STATE if constant and not warms else _OF_STATE + _OF_SCHEDULE
    differing = _differing(runner, vars(cfg), names)
    if differing:
        raise WriteSAEError(
            f"the state in {checkpoint} would override the new settings: {differing}; resume with those "
            "of the interrupted run, or start a run with from_pretrained_path"
        )
    differing = _differing(_read_of(runner), _read_of(vars(cfg)), (*_NAMES, *_OF_TEXT))
    if differing:
        raise WriteSAEError(
            f"{checkpoint} is of training on other data: {differing}; resume with the interrupted run's "
            "settings, or start a run with from_pretrained_path"
        )


def _read_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run reads, in a form that does not change when a folder is moved or settings go through JSON."""
    found = {name: settings[name] for name in (*_NAMES, *_OF_TEXT) if name in settings}
    found |= {name: Path(str(found[name] or "")).name for name in _NAMES if name in found}
    if isinstance(found.get("seqpos_slice"), tuple):
        found["seqpos_slice"] = list(found["seqpos_slice"])
    return found


def check_pretrained(cfg: Any) -> None:
    """Refuse to go on from a saved SAE of another form than the run's.

    Raises:
        WriteSAEError: the message names what differs; or the folder holds no SAE.
    """
    path = getattr(cfg, "from_pretrained_path", None)
    if path is None:
        return
    if not (Path(path) / "cfg.json").is_file():
        raise WriteSAEError(
            f"from_pretrained_path={path!r:.200} holds no SAE: give a folder that SAELens saved"
        )
    saved = _read(Path(path) / "cfg.json")
    if ARCHITECTURE not in (saved.get("architecture"), cfg.sae.architecture()):
        return
    if saved.get("architecture") == ARCHITECTURE:
        WriteSAETrainingConfig.from_dict(saved)  # refuses what cannot be trained
    differing = _differing(saved, cfg.sae.to_dict(), _FORM)
    if differing:
        raise WriteSAEError(
            f"from_pretrained_path holds an SAE of another form: {differing}; give sae=... the saved one's"
        )


def with_options_of_the_run(sae: TrainingSAE[Any], cfg: Any) -> TrainingSAE[Any]:
    """A saved SAE's weights under the config of the run: its losses, k, dtype and schedules."""
    config: Any = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
    fresh = TrainingSAE.from_dict(config.to_dict()).to(cfg.device)
    fresh.load_state_dict(sae.state_dict())
    return fresh


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file, which SAELens refuses by itself."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise WriteSAEError(f"{path} cannot be read as JSON: is the folder whole?") from error
    if not isinstance(content, dict):
        raise WriteSAEError(f"{path} holds {type(content).__name__}, not the settings of an SAE or a run")
    return content


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """What both have and do not have alike, in words."""
    return ", ".join(
        f"{name}={saved[name]!r:.80} there and {now[name]!r:.80} here"
        for name in names
        if name in saved and name in now and saved[name] != now[name]
    )
