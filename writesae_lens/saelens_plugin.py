"""Registration with SAELens: the SAE type ``writesae`` and the model class ``HookedRecurrent``.

SAE types have a registry. Model classes have none: ``sae_lens.load_model.load_model`` compares names, and the
runners import it by name. `_teach_load_model` is the one adapter for that; it leaves every other name to
SAELens, and tests/writesae_lens/test_saelens_plugin.py fails when SAELens moves it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    get_sae_class,
    register_sae_class,
    register_sae_training_class,
)

from hooked_models import HookedRecurrent
from writesae_lens.config import ARCHITECTURE, WriteSAEConfig, WriteSAETrainingConfig
from writesae_lens.errors import WriteSAEError
from writesae_lens.sae import WriteSAE
from writesae_lens.saelens_store import keep_writes_packed
from writesae_lens.training_sae import WriteTrainingSAE

MODEL_CLASS_NAME = "HookedRecurrent"
# Modules of SAELens that hold load_model under that name; those that a version lacks are passed over.
LOADERS = (
    "sae_lens.load_model",
    "sae_lens.llm_sae_training_runner",
    "sae_lens.multi_sae_training_runner",
    "sae_lens.cache_activations_runner",
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
    for name in LOADERS:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        _teach_load_model(module)
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
