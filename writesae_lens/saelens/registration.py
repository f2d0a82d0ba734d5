"""Registration with SAELens: SAE type ``writesae``, model class ``HookedRecurrent``, pretrained SAEs."""

from __future__ import annotations

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
from writesae_lens.saelens import reading, starting, store, upstream
from writesae_lens.saelens.checks import MODEL_CLASS_NAME
from writesae_lens.saes import optimizer
from writesae_lens.saes.config import ARCHITECTURE, WriteSAEConfig, WriteSAETrainingConfig
from writesae_lens.saes.sae import WriteSAE
from writesae_lens.saes.training_sae import WriteTrainingSAE

_RELEASES = releases.releases()


def register() -> None:
    """Register everything and replace what SAELens has no registry for; a second call changes nothing.

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
    loaders, configs = NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS
    loaders[releases.LOADER], configs[releases.LOADER] = hub.load_published, hub.published_config
    # SAELens's own loader, which it also uses for repositories that no release names.
    loaders["sae_lens"], configs["sae_lens"] = hub.load_any, hub.any_config
    for function in (load_model, get_pretrained_saes_directory, *reading.REPLACEMENTS, *store.REPLACEMENTS):
        upstream.wrap(function.__name__, function)
    for name, function in starting.REPLACEMENTS.items():
        upstream.wrap(name, function)
    upstream.before_optimizer_steps(optimizer.clear_moments)


def load_model(original: Any, model_class_name: str, model_name: str, *args: Any, **kwargs: Any) -> Any:
    """SAELens's `load_model`, with our model class beside its own."""
    if model_class_name == MODEL_CLASS_NAME:
        return _boot(model_name, *args, **kwargs)
    return original(model_class_name, model_name, *args, **kwargs)


def get_pretrained_saes_directory(original: Any) -> dict[str, Any]:
    """SAELens's releases and ours, added at the first call: SAELens reads a large file for it."""
    directory = original()
    if not directory.keys() >= _RELEASES.keys():
        directory.update(_RELEASES)
    return directory


def _boot(
    model_name: str,
    device: Any = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
    hook_names: list[str] | None = None,
) -> HookedRecurrent:
    model = HookedRecurrent.boot_transformers(
        model_name, device=device, **(model_from_pretrained_kwargs or {})
    )
    model.check_hook_names(hook_names)
    return model
