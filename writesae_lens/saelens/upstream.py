"""Every place where this package reaches inside SAELens or torch: read `DEPENDENCIES` before an upgrade.

SAELens has registries for SAE types and for loaders of pretrained SAEs, which `registration` uses. For the
rest it has none: functions and methods are replaced here by ones that call the original, private names are
imported here, and nowhere else. tests/writesae_lens/saelens/test_upstream.py goes through the list and fails
when a name has moved, has other parameters, or is no longer called where this package needs it to be.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from sae_lens.llm_sae_training_runner import _parse_cfg_args as parse_flags
from sae_lens.training._interruption import InterruptedException
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = [
    "DEPENDENCIES",
    "InterruptedException",
    "before_optimizer_steps",
    "parse_flags",
    "wrap",
    "wrap_on",
]


class Dependency(NamedTuple):
    """A function or class of another library, beyond what that library documents as its interface.

    Args:
        where: ``module:name``.
        parameters: its parameters' names, which the code here relies on; None for a class.
        why: what this package needs it for.
        called_in: ``module:name`` of the code whose call of it matters.
        replaced: whether `wrap` replaces it for the whole process when this package is imported.
    """

    where: str
    parameters: str | None
    why: str
    called_in: str = ""
    replaced: bool = True


_LOADING = "sae_lens.loading"
_STORE = "sae_lens.training.activations_store:ActivationsStore"
_RUNNER = "sae_lens.llm_sae_training_runner"
_SINGLE = f"{_RUNNER}:LanguageModelSAETrainingRunner"
_MULTI = "sae_lens.multi_sae_training_runner"
_CACHE = "sae_lens.cache_activations_runner"
_TRAINER = "sae_lens.training.sae_trainer:SAETrainer"
_LOAD_MODEL = "model_class_name model_name device model_from_pretrained_kwargs hook_names"
_BOOTS = "compares names of model classes; ours boots a HookedRecurrent (SAELens's modules import it by name)"
_RELEASES = "reads the pretrained SAEs from a file; ours are added (SAELens's modules import it by name)"
_PACKED = "asks the model for writes, which come packed as factors (store.py)"
_OVERRIDES = "cfg override_dataset override_model"
_STARTS = "takes settings that cannot be followed, which are refused before a model is loaded (starting.py)"
_RECORDED = "begins a run, whose training.csv is then kept (starting.py, history.py)"
_EMPTIES = "is called for ever if every token is excluded (starting.py)"

DEPENDENCIES = (
    Dependency("sae_lens.load_model:load_model", _LOAD_MODEL, _BOOTS),
    Dependency(f"{_RUNNER}:load_model", _LOAD_MODEL, _BOOTS, f"{_SINGLE}.__init__"),
    Dependency(f"{_MULTI}:load_model", _LOAD_MODEL, _BOOTS, f"{_MULTI}:MultiSAETrainingRunner.__init__"),
    Dependency(f"{_CACHE}:load_model", _LOAD_MODEL, _BOOTS, f"{_CACHE}:CacheActivationsRunner.__init__"),
    Dependency(f"{_LOADING}.pretrained_saes_directory:get_pretrained_saes_directory", "", _RELEASES),
    Dependency(f"{_LOADING}.pretrained_sae_loaders:get_pretrained_saes_directory", "", _RELEASES),
    Dependency("sae_lens.saes.sae:get_pretrained_saes_directory", "", _RELEASES),
    Dependency("sae_lens.evals:get_pretrained_saes_directory", "", _RELEASES),
    Dependency(
        f"{_LOADING}.pretrained_sae_loaders:get_sae_lens_config_from_disk",
        "path device cfg_overrides",
        "reads cfg.json, which is checked first (reading.py)",
        f"{_LOADING}.pretrained_sae_loaders:sae_lens_disk_loader",
    ),
    Dependency(
        f"{_LOADING}.pretrained_sae_loaders:read_sae_components_from_disk",
        "cfg_dict weight_path device dtype",
        "reads the weights, which are checked first (reading.py)",
        f"{_LOADING}.pretrained_sae_loaders:sae_lens_disk_loader",
    ),
    Dependency(f"{_SINGLE}.__init__", f"self {_OVERRIDES} override_sae", _STARTS),
    Dependency(f"{_MULTI}:MultiSAETrainingRunner.__init__", f"self {_OVERRIDES} override_saes", _STARTS),
    Dependency(f"{_CACHE}:CacheActivationsRunner.__init__", "self cfg override_dataset", _STARTS),
    Dependency(f"{_SINGLE}.run", "self", _RECORDED),
    Dependency(f"{_MULTI}:MultiSAETrainingRunner.run", "self", _RECORDED),
    Dependency(
        f"{_TRAINER}._update_pbar",
        "self step_output pbar update_interval",
        "moves the bar every 100 steps, which in a short run is never (progress.py)",
        f"{_TRAINER}.fit",
    ),
    Dependency(
        "sae_lens.training.multi_sae_trainer:MultiSAETrainer._update_pbar",
        "self step_outputs pbar update_interval",
        "the same for several SAEs",
        "sae_lens.training.multi_sae_trainer:MultiSAETrainer.fit",
    ),
    Dependency(f"{_STORE}.__init__", None, "loads dataset_path from the Hub; a file or folder may be meant"),
    Dependency(f"{_STORE}.get_filtered_llm_batch", "self raise_on_epoch_end", _EMPTIES),
    Dependency(f"{_STORE}._get_filtered_multi_hook_llm_batch", "self raise_on_epoch_end", _EMPTIES),
    Dependency(
        f"{_STORE}.from_config",
        "cls model cfg override_dataset",
        "knows the SAE's config and the model: a WriteSAE whose sides are not the cell's is refused",
        f"{_SINGLE}.__init__",
    ),
    Dependency(f"{_STORE}.get_activations", "self batch_tokens", _PACKED, f"{_STORE}.get_raw_llm_batch"),
    Dependency(
        f"{_STORE}.get_multi_hook_activations",
        "self batch_tokens",
        _PACKED,
        f"{_STORE}._get_filtered_multi_hook_llm_batch",
    ),
    Dependency(
        f"{_STORE}.load_cached_activation_dataset",
        "self",
        "compares a cache's width with d_in; packed writes are narrower",
        f"{_STORE}.__init__",
    ),
    Dependency(
        f"{_STORE}._load_raw_llm_batch_from_cached",
        "self raise_on_epoch_end",
        "reads rows of a cache, which may be packed writes",
        f"{_STORE}.get_raw_llm_batch",
    ),
    Dependency(
        f"{_CACHE}:CacheActivationsRunner._create_shard",
        "self buffer",
        "writes rows to disk: packed writes as their factors",
        f"{_CACHE}:CacheActivationsRunner.run",
    ),
    Dependency(
        "sae_lens:TrainingSAE.training_forward_pass",
        "self step_input",
        "replaced on the SAEs of a run: each step is recorded in training.csv (history.py)",
        f"{_TRAINER}._train_step",
        replaced=False,
    ),
    Dependency(
        f"{_RUNNER}:LLMSaeEvaluator.__call__",
        "self sae data_provider activation_scaler",
        "replaced on a runner: adds the win rate to the evaluation of one SAE (win_rate.py)",
        replaced=False,
    ),
    Dependency(
        f"{_MULTI}:MultiSAEEvaluator.__call__",
        "self saes data_provider activation_scalers hook_names",
        "the same for several SAEs",
        replaced=False,
    ),
    Dependency(
        f"{_SINGLE}.run_trainer_with_interruption_handling",
        "self trainer",
        "overridden in saving.py: saves the weights too",
        f"{_SINGLE}.run",
        replaced=False,
    ),
    Dependency(
        f"{_SINGLE}.save_checkpoint",
        "self checkpoint_path",
        "overridden in saving.py: saves only into a checkpoint that is being made",
        f"{_SINGLE}.run_trainer_with_interruption_handling",
        replaced=False,
    ),
    Dependency(
        f"{_SINGLE}.save_final_sae",
        "self sae output_path log_feature_sparsity",
        "overridden in saving.py: saves beside its place",
        f"{_SINGLE}.run",
        replaced=False,
    ),
    Dependency(
        f"{_MULTI}:MultiSAETrainingRunner._run_with_interruption_handling",
        "self trainer",
        "overridden in saving.py: its trainer's checkpoints are whole",
        f"{_MULTI}:MultiSAETrainingRunner.run",
        replaced=False,
    ),
    Dependency(
        f"{_MULTI}:MultiSAETrainingRunner._save_runner_checkpoint_files",
        "self checkpoint_path",
        "overridden in saving.py: adds training.csv",
        replaced=False,
    ),
    Dependency(
        f"{_MULTI}:MultiSAETrainingRunner._save_final_outputs",
        "self saes trainer",
        "overridden in saving.py: saves beside its place",
        f"{_MULTI}:MultiSAETrainingRunner.run",
        replaced=False,
    ),
    Dependency(
        f"{_TRAINER}.save_checkpoint",
        "self checkpoint_name base_path wandb_aliases",
        "replaced on a run's trainer: the checkpoint is made under a temporary name (saving.py)",
        f"{_TRAINER}.fit",
        replaced=False,
    ),
    Dependency(
        "sae_lens.training.multi_sae_trainer:MultiSAETrainer.save_checkpoint",
        "self checkpoint_name wandb_aliases",
        "the same for several SAEs",
        "sae_lens.training.multi_sae_trainer:MultiSAETrainer.fit",
        replaced=False,
    ),
    Dependency(f"{_RUNNER}:_parse_cfg_args", "args", "the parser of `writesae-lens train`", replaced=False),
    Dependency(
        "sae_lens.training._interruption:InterruptedException",
        None,
        "what Ctrl-C raises while SAELens trains",
        replaced=False,
    ),
    Dependency(
        "torch.optim.optimizer:register_optimizer_step_pre_hook",
        "hook",
        "clears moments of atoms that start anew, in an optimiser that SAELens owns (saes/optimizer.py)",
        replaced=False,
    ),
)  # fmt: skip
# Private attributes that store.py reads.
ATTRIBUTES = {_STORE: ("_hook_names", "_hook_head_indices", "_hook_d_ins")}


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function wherever `DEPENDENCIES` lists it as replaced; a second call changes nothing.

    Args:
        name: its name, as after the last dot or colon of ``where``, or that of its class before it.
        wrapper: called with the original and then the arguments of each call.
    """
    places = [d.where for d in DEPENDENCIES if d.replaced and d.where.replace(":", ".").endswith(f".{name}")]
    name = name.rpartition(".")[2]
    for where in places:
        module_name, _, path = where.partition(":")
        try:
            owner: Any = importlib.import_module(module_name)
        except ModuleNotFoundError:  # a version of SAELens without that module
            continue
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        if getattr(original, "replaced_by_writesae_lens", False):
            continue
        is_classmethod = isinstance(vars(owner)[name], classmethod)
        replacement = _calling(wrapper, original.__func__ if is_classmethod else original)
        setattr(owner, name, classmethod(replacement) if is_classmethod else replacement)


def _calling(wrapper: Callable[..., Any], original: Any) -> Any:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement.replaced_by_writesae_lens = True  # type: ignore[attr-defined]
    if hasattr(original, "cache_clear"):  # of functools.cache; functools.wraps does not copy it
        replacement.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    return replacement


def wrap_on(instance: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of one object, for example ``training_forward_pass`` of one SAE."""
    setattr(instance, name, _calling(wrapper, getattr(instance, name)))


@functools.cache
def before_optimizer_steps(clear: Callable[..., None]) -> None:
    """Call ``clear(optimizer, args, kwargs)`` before every step of every torch optimiser."""
    register_optimizer_step_pre_hook(clear)
