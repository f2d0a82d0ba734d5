"""The config and the tensors of a checkpoint file, in whichever layout the file holds them.

The layouts: a dict with ``model_state_dict`` or ``state_dict``, a bare state dict, and a pickled module
(alone or under ``sae``); tensor names with the prefixes of wrappers, and those of modules with factors ``v``
and ``w``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_models.errors import HookedModelError
from hooked_models.files.pickle_machine import StandIn
from hooked_models.files.torch_files import check_total_size
from writesae_lens.errors import WriteSAEError

# Modules with factors v and w have other names for the tensors; wrappers put prefixes before names.
_MODULE_NAMES = {"decoder.v": "V_dec", "decoder.w": "W_dec", "decoder.bias": "bias"}
_MODULE_NAMES |= {"encoder.v": "V_enc", "encoder.w": "W_enc", "encoder.bias": "b_enc"}
_DENSE_MODULE_NAMES = {"decoder.v": "V", "decoder.w": "W", "decoder.bias": "bias"}
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|sae)\.)+")
_DEEPEST_MODULE = 8
_LONGEST_NAME = 200
# Attributes of a pickled module that stand in for a config.
_CONFIG_ATTRIBUTES = {"sae_type", "layer", "head", "n_features", "d_k", "d_v", "d_in", "k", "rank"}
_CONFIG_ATTRIBUTES |= {"use_batchtopk"}


def config_and_tensors(file: Path, content: Any) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """The configuration (empty where the file has none) and the tensors by their published names.

    Args:
        file: for messages.
        content: what `torch_files.read` returned for it.

    Raises:
        WriteSAEError: the file holds no config or no tensors where they belong.
    """
    config: Any = {}
    weights = content
    if isinstance(content, dict):
        config = content.get("config")
        config = (config.state if isinstance(config, StandIn) else config) or {}
        if not isinstance(config, dict):
            raise WriteSAEError(f"{file} has a {type(config).__name__} where its config belongs, not a dict")
        inner = [name for name in ("model_state_dict", "state_dict", "sae") if name in content]
        weights = content[inner[0]] if inner else content
    tensors = weights
    if isinstance(weights, StandIn):
        tensors = dict(_module_tensors(weights, "", set()))
        attributes = {name: x for name, x in weights.state.items() if name in _CONFIG_ATTRIBUTES}
        config = {name: x for name, x in attributes.items() if is_plain(x)} | config
    if not isinstance(tensors, dict):
        raise WriteSAEError(f"{file} holds {kind_of(weights)} where a dict of tensors belongs")
    others = [(name, kind_of(x)) for name, x in tensors.items() if not isinstance(x, Tensor)]
    if others or not tensors:
        listed = ", ".join(f"{name[:40]!a} ({kind})" for name, kind in others[:6] if type(name) is str)
        problem = f"also holds {listed}" if tensors else "holds none"
        raise WriteSAEError(f"{file} must hold tensors by name (model_state_dict), but {problem}")
    if any(type(name) is not str for name in tensors):
        raise WriteSAEError(f"{file} has tensors without a name")
    try:
        check_total_size(file, tensors.values())
    except HookedModelError as error:
        raise WriteSAEError(str(error)) from error
    return config, _with_published_names(tensors)


def kind_of(x: Any) -> str:
    """The type of a value from a file, for a message."""
    return f"an object of {x.of}" if isinstance(x, StandIn) else f"a {type(x).__name__}"


def is_plain(value: Any) -> bool:
    """Whether a value from a file can be written to an SAE's ``cfg.json``."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float) or (isinstance(value, str) and len(value) < 200)


def _module_tensors(module: StandIn, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a pickled module by their names in its state dict, and those of its other attributes."""
    seen.add(id(module))
    parts = (module.state.get(part) for part in ("_parameters", "_buffers", "_modules"))
    for attributes in (module.state, *parts):
        for name, x in attributes.items() if isinstance(attributes, dict) else ():
            if len(str(name)) > _LONGEST_NAME and isinstance(x, (Tensor, StandIn)):
                # Joined with the name of each tensor below, it would take any amount of memory.
                raise WriteSAEError(
                    f"the file has a module or tensor of a name of {len(str(name)):,} characters"
                )
            if isinstance(x, Tensor):
                yield f"{prefix}{name}", x
            elif isinstance(x, StandIn) and id(x) not in seen and prefix.count(".") < _DEEPEST_MODULE:
                yield from _module_tensors(x, f"{prefix}{name}.", seen)


def _with_published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {_WRAPPERS.sub("", name): x for name, x in tensors.items()}
    if not {"decoder.v", "decoder.w"} <= set(names):
        return names
    published = _DENSE_MODULE_NAMES if "encoder.weight" in names else _MODULE_NAMES
    return {published.get(name, name): x for name, x in names.items()}
