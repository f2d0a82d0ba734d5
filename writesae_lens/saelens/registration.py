"""Registration with SAELens: the SAE type ``writesae``, the model class ``HookedRecurrent``, pretrained SAEs.

SAE types and the functions that load pretrained SAEs have registries. Two things have none, and are taught
here to functions that SAELens's modules import by name: `load_model`, which compares names of model classes,
and `get_pretrained_saes_directory`, whose entries come from a file. Both leave everything else to SAELens;
tests/writesae_lens/test_saelens_plugin.py fails when it moves them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    get_sae_class,
    register_sae_class,
    register_sae_training_class,
)

from hooked_models import HookedRecurrent
from writesae_lens.errors import WriteSAEError
from writesae_lens.published import hub, releases
from writesae_lens.saelens.store import keep_writes_packed
from writesae_lens.saes.config import ARCHITECTURE, WriteSAEConfig, WriteSAETrainingConfig
from writesae_lens.saes.sae import WriteSAE
from writesae_lens.saes.training_sae import WriteTrainingSAE

MODEL_CLASS_NAME = "HookedRecurrent"
_RELEASES = releases.releases()
# Modules of SAELens that hold load_model under that name; those that a version lacks are passed over.
LOADERS = (
    "sae_lens.load_model",
    "sae_lens.llm_sae_training_runner",
    "sae_lens.multi_sae_training_runner",
    "sae_lens.cache_activations_runner",
)
# Likewise of get_pretrained_saes_directory.
DIRECTORIES = (
    "sae_lens.loading.pretrained_saes_directory",
    "sae_lens.loading.pretrained_sae_loaders",
    "sae_lens.saes.sae",
    "sae_lens.evals",
)


def register() -> None:
    """Register everything; a second call changes nothing.

    Raises:
        WriteSAEError: another package has registered the architecture ``writesae``.
    """
    if ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(ARCHITECTURE, WriteSAE, WriteSAEConfig)
        register_sae_training_class(ARCHITECTURE, WriteTrainingSAE, WriteSAETrainingConfig)
    elif get_sae_class(ARCHITECTURE)[0] is not WriteSAE:
        raise WriteSAEError(
            f"another package has registered the SAE architecture {ARCHITECTURE!r} with SAELens; "
            "import only one of the two"
        )
    for names, teach in ((LOADERS, _teach_load_model), (DIRECTORIES, _teach_directory)):
        for name in names:
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            teach(module)
    loaders, configs = NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS
    loaders[releases.LOADER], configs[releases.LOADER] = hub.load_published, hub.published_config
    # For repositories that no release names.
    loaders["sae_lens"], configs["sae_lens"] = hub.load_any, hub.any_config
    keep_writes_packed()


def _teach_load_model(module: Any) -> None:
    original = module.load_model
    if getattr(original, "loads_hooked_recurrent", False):
        return

    @functools.wraps(original)
    def load_model(model_class_name: str, model_name: str, *args: Any, **kwargs: Any) -> Any:
        if model_class_name != MODEL_CLASS_NAME:
            return original(model_class_name, model_name, *args, **kwargs)
        return _load(model_name, *args, **kwargs)

    load_model.loads_hooked_recurrent = True  # type: ignore[attr-defined]
    module.load_model = load_model


def _teach_directory(module: Any) -> None:
    original = module.get_pretrained_saes_directory
    if getattr(original, "knows_write_saes", False):
        return

    @functools.wraps(original)
    def get_pretrained_saes_directory() -> dict[str, Any]:
        # Not at import: SAELens reads a large file for it, once.
        directory = original()
        if not directory.keys() >= _RELEASES.keys():
            directory.update(_RELEASES)
        return directory

    get_pretrained_saes_directory.knows_write_saes = True  # type: ignore[attr-defined]
    get_pretrained_saes_directory.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    module.get_pretrained_saes_directory = get_pretrained_saes_directory


def _load(
    model_name: str,
    device: Any = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
    hook_names: list[str] | None = None,
) -> HookedRecurrent:
    model = HookedRecurrent.boot_transformers(
        model_name, device=device, **(model_from_pretrained_kwargs or {})
    )
    model._check_hook_names(hook_names)
    return model
