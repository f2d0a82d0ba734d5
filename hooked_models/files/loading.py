"""Loading a model by its name: the arguments that TransformerLens boots it with."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import AutoHfQuantizer

from hooked_models import zoo
from hooked_models.bridge.arguments import check_device
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import boot_options, layouts
from hooked_models.files.declared_sizes import within_checkpoint
from hooked_models.files.known_models import TEXT_MODELS, check_model, check_model_type
from hooked_models.files.layouts import Checkpoint
from hooked_models.files.sources import check_json_files, check_source, read_weights
from hooked_models.files.tokenizers import check_tokenizer, find_tokenizer, keep_tokenizer

# What marks a configuration of bitsandbytes that leaves the method out.
_BITS = ("load_in_4bit", "load_in_8bit")
Name = str | os.PathLike[str]
# transformers raises these on a configuration that it cannot read, has no check for, or lacks a package for.
_UNREADABLE = (OSError, ValueError, AttributeError, TypeError, KeyError, ZeroDivisionError)
_UNREADABLE += (StrictDataclassError, ImportError)


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


def prepare(model_name: str, options: dict[str, Any], accepted: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """The arguments for ``TransformerBridge.boot_transformers``.

    A model that TransformerLens would not load, or would load in another class, in another dtype or on
    another device, is loaded here, with its tokenizer, and passed as ``hf_model`` and ``tokenizer``.

    Args:
        model_name: hub id, local folder, BlinkDL ``.pth`` file, or the name of a model that ships.
        options: the user's keyword arguments.
        accepted: the names of those that TransformerLens knows.

    Returns:
        the model's source (a path for a model that ships), and the keyword arguments.

    Raises:
        HookedModelError: the source does not exist or cannot be loaded, or an option cannot be honoured.
    """
    source = str(zoo.model_path(model_name)) if model_name in zoo.SHIPPED else model_name
    check_source(source)
    check_device(options.get("device"))
    if options.get("dtype") is not None:
        options = options | {"dtype": _dtype(options["dtype"])}
    boot_options.check_options(source, options, accepted)
    options = {name: value for name, value in options.items() if value is not None}
    if "tokenizer" in options:
        options["tokenizer"] = keep_tokenizer(options["tokenizer"])
    if "hf_model" in options:
        check_model(source, options["hf_model"].config, options["hf_model"])
        _name_class(options["hf_model"])
        if "tokenizer" not in options:
            check_tokenizer(source, options | {"load_weights": False})
        return source, boot_options.placement_of(options["hf_model"]) | options
    checkpoint = _checkpoint_in_another_form(source, options)
    if checkpoint is not None:
        return source, _from_checkpoint(source, checkpoint, options)
    config = _configuration(source, options)
    check_model(source, config)
    if "tokenizer" not in options:
        check_tokenizer(source, options)
    model = _text_model(source, config, options)
    if model is None:
        boot_options.override(source, config, options)
        if options.get("load_weights", True):
            return source, options
        model = _fresh(source, options.pop("model_class", AutoModelForCausalLM), config, options)
    return source, options | {"hf_model": model}


def _from_checkpoint(source: str, checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the model and the tokenizer of a checkpoint in another form than Hugging Face's."""
    if "tokenizer" not in options:
        options["tokenizer"] = find_tokenizer(source, checkpoint, options)
    _check_class_is_open(source, checkpoint.model_class, options)
    boot_options.override(source, checkpoint.config, options)
    if not options.get("load_weights", True):
        return options | {"hf_model": _fresh(source, checkpoint.model_class, checkpoint.config, options)}
    load = checkpoint.model_class.from_pretrained
    model = _loaded(
        lambda **how: load(None, config=checkpoint.config, state_dict=checkpoint.tensors, **how), options
    )
    return options | {"hf_model": model}


def _check_class_is_open(source: str, model_class: type, options: dict[str, Any]) -> None:
    wanted = options.pop("model_class", model_class)
    if wanted is not model_class:
        raise HookedModelError(
            f"boot_transformers: model_class would have no effect: {source} is loaded as a "
            f"{model_class.__name__}"
        )


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
    in_another_form = raw.get("model_type") in layouts.FLA_TYPES or "ssm_cfg" in raw
    if in_another_form and raw.get("quantization_config"):
        raise HookedModelError(f"{source} is quantised, which is supported in Hugging Face's form only")
    if raw.get("model_type") in layouts.FLA_TYPES:
        return layouts.from_fla(source, raw, read_weights(source, revision))
    if "ssm_cfg" in raw and not raw.get("model_type"):
        return layouts.from_mamba_ssm(source, raw, read_weights(source, revision))
    check_model_type(source, raw, bool(options.get("trust_remote_code")))
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
    _check_quantisation(source, getattr(config, "quantization_config", None))
    return config


def _check_quantisation(source: str, quantised: Any) -> None:
    """Refuse weights quantised by a method unknown to transformers, which would load them as they are."""
    if quantised is None:
        return
    fields = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = fields.get("quant_method", "bitsandbytes" if any(x in fields for x in _BITS) else None)
    if not isinstance(method, str) or not AutoHfQuantizer.supports_quant_method(fields):
        raise HookedModelError(
            f"{source} is quantised by {method!r}, a method that this version of transformers does not know"
        )


def _text_model(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The text part of a checkpoint with a vision tower, or a model whose configuration names no class.

    TransformerLens would load the tower too, through an adapter of its own, and finds no adapter without a
    class's name. Any other checkpoint is left to it (None).
    """
    text_config: Any = getattr(config, "text_config", None)
    model_class = TEXT_MODELS.get(getattr(text_config, "model_type", None))
    if model_class is None and not config.architectures:
        text_config, model_class = config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if model_class is None:
        return None
    text_config.architectures = [model_class]
    _check_class_is_open(source, getattr(transformers, model_class), options)
    boot_options.override(source, text_config, options)
    if not options.get("load_weights", True):
        return _fresh(source, AutoModelForCausalLM, text_config, options)
    load = AutoModelForCausalLM.from_pretrained
    hub_options = _hub_options(options)
    return _loaded(lambda **how: load(source, config=text_config, **hub_options, **how), options)


def _name_class(model: Any) -> None:
    """Name a model's class in its configuration, where transformers puts it when it saves one."""
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]


def _fresh(source: str, model_class: Any, config: Any, options: dict[str, Any]) -> Any:
    """A model of the source's sizes with the weights that a new one has, drawn from torch's generator.

    TransformerLens would leave it in another dtype, and on the CPU.
    """
    how: dict[str, Any] = {"attn_implementation": "eager", "dtype": options.get("dtype", torch.float32)}
    if model_class is AutoModelForCausalLM:
        how["trust_remote_code"] = bool(options.get("trust_remote_code"))
    build = functools.partial(_builder(model_class), config, **how)
    with within_checkpoint(source, options.get("revision"), None, source), torch.device("meta"):
        build()
    model = build()
    model.config.architectures = [type(model).__name__]
    del options["load_weights"]
    return model.to(_device(options)).eval()


def _builder(model_class: Any) -> Callable[..., Any]:
    return model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config


def _loaded(load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A model loaded in the dtype and on the device of the options.

    ``device_map`` and ``max_memory`` are removed from the options: TransformerLens refuses them beside a
    model that is loaded already, and reads the placement off the model.
    """
    placement = {name: options.pop(name) for name in ("device_map", "max_memory") if name in options}
    model = load(dtype=options.get("dtype", torch.float32), attn_implementation="eager", **placement)
    if placement.get("device_map") is not None:
        return model
    return model.to(_device(options))


def _device(options: dict[str, Any]) -> Any:
    return options.get("device", "cuda" if torch.cuda.is_available() else "cpu")


def _dtype(dtype: object) -> torch.dtype:
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise HookedModelError(f"dtype {dtype!r} is unknown: give float32, bfloat16, float16 or float64")
    return parsed


def _no_configuration(source: str, error: Exception) -> HookedModelError:
    kind = "" if Path(source).exists() else " (no folder here, so taken for a hub id)"
    cause = textwrap.shorten(one_line(error), 180, placeholder=" ...")
    return HookedModelError(f"could not read the configuration of {source}{kind}: {cause}")
