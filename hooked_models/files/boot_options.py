"""Options of ``boot_transformers``: one that would change nothing is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hooked_models.bridge import arguments
from hooked_models.bridge.arguments import idle, wrong
from hooked_models.errors import HookedModelError

_TAKER = "boot_transformers"
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
_OF_TRANSFORMERS = ("load_in_8bit", "load_in_4bit", "quantization_config", "attn_implementation", "cache_dir")
# What to do instead, for keywords that other functions have.
_INSTEAD = {
    **dict.fromkeys(_PROCESSING, "model.enable_compatibility_mode() processes the weights afterwards"),
    **dict.fromkeys(_OF_TRANSFORMERS, "load the model with transformers and give it as hf_model="),
    "torch_dtype": "say dtype=",
    "default_prepend_bos": "set model.cfg.default_prepend_bos afterwards",
    "token": "log in with huggingface_hub, or set HF_TOKEN",
}


def check_options(source: str, options: dict[str, Any], accepted: Iterable[str]) -> None:
    """Refuse options that are unknown, impossible, or without effect beside the others.

    Args:
        source: the model's source, a path for a model that ships.
        options: the keyword arguments.
        accepted: the names that TransformerLens knows.

    Raises:
        HookedModelError: there is one; the message names it.
    """
    arguments.refuse_unknown_names(_TAKER, options, accepted, _INSTEAD)
    arguments.check(_TAKER, options)
    given = {name: value for name, value in options.items() if value is not None}
    _check_objects(given)
    if given.get("revision", "main") != "main" and Path(source).exists():
        raise idle(_TAKER, "revision", f"{source} is not a repository of the hub")
    if "device" in given and torch.device(given["device"]).type == "meta":
        raise wrong(_TAKER, "device", given["device"], "a device that holds numbers: 'cpu' or 'cuda'")
    if "device" in given and "device_map" in given:
        raise HookedModelError(f"{_TAKER}: device and device_map exclude each other: give one of them")
    if "max_memory" in given and not {"device_map", "n_devices"} & given.keys():
        raise idle(_TAKER, "max_memory", "it limits what device_map or n_devices distribute")
    if not given.get("load_weights", True):
        for name in {"device_map", "n_devices", "max_memory"} & given.keys():
            raise idle(_TAKER, name, "it distributes weights that are loaded; give device=")
    if "hf_model" in given:
        _check_beside_model(given)


def _check_objects(given: dict[str, Any]) -> None:
    tokenizer, model, model_class = (given.get(x) for x in ("tokenizer", "hf_model", "model_class"))
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise wrong(_TAKER, "tokenizer", tokenizer, "a tokenizer of transformers, as AutoTokenizer loads it")
    if model is not None and not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise wrong(_TAKER, "hf_model", model, "a model of transformers")
    if hasattr(model, "get_base_model"):  # peft's: its adapters are inside, a prompt that it learned is not
        raise HookedModelError(
            f"{_TAKER}: hf_model is a {type(model).__name__} of peft, around the model: give "
            "hf_model=model.get_base_model(), which has the adapters (LoRA) in its layers"
        )
    if model_class is not None and not hasattr(model_class, "from_pretrained"):
        raise wrong(_TAKER, "model_class", model_class, "a model class of transformers")


def _check_beside_model(given: dict[str, Any]) -> None:
    model = given["hf_model"]
    if any(x.device.type == "meta" for x in model.parameters()):
        raise HookedModelError(
            f"{_TAKER}: hf_model has weights on the device meta, that is nowhere: accelerate offloaded them, "
            'or they were not loaded; load it with device_map="cpu" or on GPUs'
        )
    loaded = "hf_model is loaded already"
    idle_names = ["hf_config_overrides", "model_class", "n_ctx", "checkpoint_index", "checkpoint_value"]
    idle_names += ["device_map", "n_devices", "max_memory"]
    idle_names += ["revision", "trust_remote_code"] if "tokenizer" in given else []
    for name in idle_names:
        if given.get(name):
            raise idle(_TAKER, name, loaded)
    if not given.get("load_weights", True):
        raise idle(_TAKER, "load_weights", loaded)
    own = placement_of(model)
    dtype, device = given.get("dtype", own.get("dtype")), given.get("device")
    same_device = device is None or own.get("device") in (torch.device(device), None)
    if device is not None and "device" in own and torch.device(device).index is None:
        same_device = torch.device(device).type == own["device"].type
    for name, same in (("dtype", dtype == own.get("dtype")), ("device", same_device)):
        if not same:
            raise HookedModelError(
                f"{_TAKER}: {name} is {given[name]}, but hf_model has {own[name]}: convert the model first "
                f"(hf_model.to(...)), or leave {name} out"
            )


def placement_of(model: nn.Module) -> dict[str, Any]:
    """The dtype and device of a loaded model; no device where its weights lie on several."""
    tensors = [x for x in model.parameters() if x.is_floating_point()]
    found: dict[str, Any] = {"dtype": tensors[0].dtype} if tensors else {}
    devices = {x.device for x in model.parameters()}
    return found | ({"device": devices.pop()} if len(devices) == 1 else {})


def override(source: str, config: Any, options: dict[str, Any]) -> None:
    """Set the fields of a model's configuration that ``hf_config_overrides`` and ``n_ctx`` name.

    Raises:
        HookedModelError: the configuration has no such field.
    """
    for name, value in (options.get("hf_config_overrides") or {}).items():
        if not isinstance(name, str) or not hasattr(config, name):
            raise HookedModelError(
                f"{_TAKER}: hf_config_overrides has {name!r}, which {type(config).__name__}, the "
                f"configuration of {source}, has not"
            )
        setattr(config, name, value)
    if options.get("n_ctx") is not None and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = options["n_ctx"]
