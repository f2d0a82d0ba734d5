"""Loading a model by its name: the arguments that TransformerLens boots it with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hooked_models import zoo
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import layouts
from hooked_models.files.layouts import Checkpoint
from hooked_models.files.sources import check_json_files, check_source, read_weights
from hooked_models.files.tokenizers import check_tokenizer, find_tokenizer

Name = str | os.PathLike[str]
# Models that are published as the text part of a model with a vision tower, by model type.
_TEXT_MODELS: dict[str | None, str] = {
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
# transformers and TransformerLens raise these on a wrong configuration or file that they do not check for.
UNFORESEEN = (AttributeError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError)
_UNREADABLE = (OSError, ValueError, *UNFORESEEN)


def name_of(model: object) -> str:
    """A model's name or path as a string.

    Raises:
        HookedModelError: it is neither a string nor a path.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise HookedModelError(
            f"a model's name must be a str or a pathlib.Path, not {type(model).__name__}: give a hub id, a "
            f"folder, a .pth file, or one of {', '.join(zoo.SHIPPED)}"
        )
    return str(model)


def prepare(model_name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The arguments for ``TransformerBridge.boot_transformers``.

    A model that TransformerLens would not load, or would load in another class, is loaded here, with its
    tokenizer, and passed as ``hf_model`` and ``tokenizer``.

    Args:
        model_name: hub id, local folder, BlinkDL ``.pth`` file, or the name of a model that ships.
        options: the user's keyword arguments.

    Returns:
        the model's source (a path for a model that ships), and the keyword arguments.

    Raises:
        HookedModelError: the source does not exist or cannot be loaded.
    """
    source = str(zoo.model_path(model_name)) if model_name in zoo.SHIPPED else model_name
    check_source(source)
    options = dict(options)
    check_device(options.get("device"))
    if options.get("dtype") is not None:
        options["dtype"] = _dtype(options["dtype"])
    if options.get("hf_model") is not None:
        return source, options
    checkpoint = _checkpoint_in_another_form(source, options)
    if checkpoint is None:
        config = _configuration(source, options)
        if options.get("tokenizer") is None:
            check_tokenizer(source, options)
        options["hf_model"] = _text_model(source, config, options)
        return source, options
    if options.get("tokenizer") is None:
        options["tokenizer"] = find_tokenizer(source, checkpoint, options)
    load = checkpoint.model_class.from_pretrained
    options["hf_model"] = _loaded(
        lambda **how: load(None, config=checkpoint.config, state_dict=checkpoint.tensors, **how), options
    )
    return source, options


def check_device(device: Any) -> None:
    """Refuse a device that this machine does not have or this build of torch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = one_line(error).partition(". ")[0]
        raise HookedModelError(f"device {device!r} cannot be used ({why}): try 'cpu'") from error


def _checkpoint_in_another_form(source: str, options: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint, where it is not in Hugging Face's form (None: transformers' Auto classes load it)."""
    if Path(source).is_file():
        return layouts.from_blinkdl(source, layouts.read_tensors(Path(source)))
    revision = options.get("revision")
    check_json_files(source, revision)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except TypeError:  # a number or null, for which transformers has no message
        raw = None
    except _UNREADABLE as error:
        raise _no_configuration(source, error) from error
    if not isinstance(raw, dict):
        raise HookedModelError(f"the config.json of {source} does not hold a JSON object: {{...}}")
    # The model type decides, not the class that transformers has under it: another package may have
    # registered its own class, and the configurations on the hub point at remote code.
    if raw.get("model_type") in layouts.FLA_TYPES:
        return layouts.from_fla(source, raw, read_weights(source, revision))
    if "ssm_cfg" in raw and not raw.get("model_type"):
        return layouts.from_mamba_ssm(source, raw, read_weights(source, revision))
    return None


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    # If trust_remote_code were left open, transformers would ask at the terminal.
    shared: dict[str, Any] = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    return shared if options.get("revision") is None else shared | {"revision": options["revision"]}


def _configuration(source: str, options: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **_hub_options(options))
    except _UNREADABLE as error:
        raise _no_configuration(source, error) from error
    text_config: Any = config.get_text_config()
    layouts.check_activation(source, getattr(text_config, "hidden_act", None))
    return config


def _text_model(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The text part of a checkpoint that was published with a vision tower (None for any other checkpoint).

    TransformerLens would load the tower too, through an adapter of its own.
    """
    text_config: Any = getattr(config, "text_config", None)
    model_class = _TEXT_MODELS.get(getattr(text_config, "model_type", None))
    if model_class is None:
        return None
    text_config.architectures = [model_class]
    load = AutoModelForCausalLM.from_pretrained
    hub_options = _hub_options(options)
    return _loaded(lambda **how: load(source, config=text_config, **hub_options, **how), options)


def _loaded(load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A model loaded in the dtype and on the device of the options.

    ``device_map`` and ``max_memory`` are removed from the options: TransformerLens refuses them beside a
    model that is loaded already, and reads the placement off the model.
    """
    placement = {name: options.pop(name) for name in ("device_map", "max_memory") if name in options}
    model = load(dtype=options.get("dtype", torch.float32), attn_implementation="eager", **placement)
    if placement.get("device_map") is not None:
        return model
    device = options.get("device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def _dtype(dtype: object) -> torch.dtype:
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise HookedModelError(f"dtype {dtype!r} is unknown: give float32, bfloat16, float16 or float64")
    return parsed


def _no_configuration(source: str, error: Exception) -> HookedModelError:
    kind = "" if Path(source).exists() else " (no folder here, so taken for a hub id)"
    return HookedModelError(f"could not read the configuration of {source}{kind}: {one_line(error)}")
