"""How a run of SAELens begins on a model of ours: its settings are checked, text is found, it is recorded.

The functions here replace the constructors of SAELens's runners and of its activation store, the runners'
``run``, and the method that gives a filtered batch (`upstream.DEPENDENCIES` lists them). Runs on other models
are left to SAELens.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hooked_models import HookedModelError, HookedRecurrent
from hooked_models.errors import one_line
from writesae_lens.errors import WriteSAEError
from writesae_lens.saelens import checks, continuing, texts
from writesae_lens.saelens.history import record_training
from writesae_lens.saelens.progress import update_bar
from writesae_lens.saelens.store import keep_reads
from writesae_lens.saes.config import WriteSAETrainingConfig

# SAELens asks for batches of prompts until one has a token to train on. After 20 batches in a row of 20,000
# tokens together that had none, there will be none.
_TOKENS, _BATCHES = 20_000, 20
# Two warnings of SAELens that do not hold of documents on this machine: it compares how many documents there
# are with how many tokens are wanted; and it advises to tokenize large data sets beforehand.
_NOT_OF_TEXTS = ("The training dataset contains fewer samples", "Dataset is not tokenized")
_EMPTY: Any = WeakIdKeyDictionary()  # store: empty batches in a row


def init_runner(original: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """The constructor of SAELens's runner for one SAE, or for several."""
    given = inspect.signature(original).bind(runner, *args, **kwargs).arguments
    cfg, model = given["cfg"], given.get("override_model")
    several = hasattr(cfg, "saes")
    saes = dict(cfg.saes) if several else {"": cfg.sae}
    hooks = dict(cfg.hook_names_per_sae) if several else {"": cfg.hook_name}
    if model is None:
        checks.refuse_other_class(cfg.model_class_name, cfg.model_name, hooks.values())
    if isinstance(model, HookedRecurrent) or (
        model is None and cfg.model_class_name == checks.MODEL_CLASS_NAME
    ):
        checks.check_run(cfg, saes)
        continuing.check_resumed(cfg, saes, hooks)
        continuing.check_pretrained(cfg)
    try:
        original(runner, *args, **kwargs)
    except HookedModelError:
        raise
    except (ValueError, OSError) as error:
        if model is None and any(isinstance(sae, WriteSAETrainingConfig) for sae in saes.values()):
            raise WriteSAEError(
                f"SAELens cannot load {cfg.model_name!r:.200} as {cfg.model_class_name!r:.60}: for a "
                f'recurrent model set model_class_name="{checks.MODEL_CLASS_NAME}" ({one_line(error)[:160]})'
            ) from error
        raise
    if isinstance(runner.model, HookedRecurrent):
        given_saes = given.get("override_saes" if several else "override_sae")
        made = dict(given_saes or {}) if several else {"": given_saes} if given_saes is not None else {}
        checks.check_sites(runner.model, saes | {name: sae.cfg for name, sae in made.items()}, hooks, cfg)
        if not several and given_saes is None and cfg.from_pretrained_path is not None:
            runner.sae = continuing.with_options_of_the_run(runner.sae, cfg)
        trained = runner.saes if several else {"": runner.sae}
        configs: dict[str, list[Any]] = {hook: [] for hook in hooks.values()}
        for name, sae in trained.items():
            configs[hooks[name]].append(sae.cfg)
        keep_reads(runner.activations_store, configs)


def run_recorded(original: Any, runner: Any) -> Any:
    """The run of SAELens's runner for one SAE, or for several, with a training.csv beside each SAE."""
    if isinstance(runner.model, HookedRecurrent):
        record_training(runner)
    return original(runner)


def init_cache_runner(original: Any, runner: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
    """The constructor of SAELens's runner that writes activations to disk."""
    checks.refuse_other_class(cfg.model_class_name, cfg.model_name, [cfg.hook_name])
    if cfg.model_class_name == checks.MODEL_CLASS_NAME:
        checks.check_cache_run(cfg)
    original(runner, cfg, *args, **kwargs)
    if isinstance(runner.model, HookedRecurrent):
        runner.model.check_hook_names([cfg.hook_name])
        checks.check_site(runner.model, cfg.hook_name, cfg)
        # The SAE that will train on the cache is not known here: what SAEs train on unless told otherwise.
        keep_reads(runner.activations_store, {cfg.hook_name: [WriteSAETrainingConfig]})


def init_store(original: Any, store: Any, *args: Any, **kwargs: Any) -> None:
    """The constructor of SAELens's activation store; ``dataset`` may be a file or folder of this machine."""
    bound = inspect.signature(original).bind(store, *args, **kwargs)
    text, found = bound.arguments.get("dataset"), None
    if isinstance(bound.arguments["model"], HookedRecurrent) and text is not None:
        name = text if isinstance(text, str) else "that is given"
        found = texts.local_text(text, bound.arguments["streaming"]) if isinstance(text, str) else text
        if found is not None:
            bound.arguments["dataset"] = found
            if not bound.arguments.get("use_chat_formatting", False):
                texts.check_text(name, found)
    with warnings.catch_warnings():
        for advice in () if found is None else _NOT_OF_TEXTS:
            warnings.filterwarnings("ignore", advice, UserWarning)
        original(*bound.args, **bound.kwargs)


def filtered_batch(original: Any, store: Any, *args: Any, **kwargs: Any) -> Any:
    """A batch without the excluded tokens; refused where none is left of many batches."""
    batch = original(store, *args, **kwargs)
    rows: Tensor = next(iter(batch.values())) if isinstance(batch, dict) else batch
    _EMPTY[store] = 0 if len(rows) else _EMPTY.get(store, 0) + 1
    read = _EMPTY[store] * store.store_batch_size_prompts * store.training_context_size
    if read >= _TOKENS and _EMPTY[store] >= _BATCHES:
        raise WriteSAEError(f"exclude_special_tokens leaves none of {read} tokens in a row: exclude fewer")
    return batch


REPLACEMENTS = {
    "LanguageModelSAETrainingRunner.__init__": init_runner,
    "MultiSAETrainingRunner.__init__": init_runner,
    "LanguageModelSAETrainingRunner.run": run_recorded,
    "MultiSAETrainingRunner.run": run_recorded,
    "_update_pbar": update_bar,
    "CacheActivationsRunner.__init__": init_cache_runner,
    "ActivationsStore.__init__": init_store,
    "get_filtered_llm_batch": filtered_batch,
    "_get_filtered_multi_hook_llm_batch": filtered_batch,
}
