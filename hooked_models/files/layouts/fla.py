"""Models as flash-linear-attention saves them: `hooked_models.modeling` has the same parameter names."""

from __future__ import annotations

from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.layouts.checkpoint import (
    Checkpoint,
    Tensors,
    bad_field,
    check_activation,
    check_layers,
    check_tensors,
    model_shapes,
)
from hooked_models.modeling.fla import MODEL_CLASSES
from hooked_models.modeling.rwkv7 import RWKV7ForCausalLM

_CLASSES: dict[str, type[PreTrainedModel]] = {
    "rwkv7": RWKV7ForCausalLM,
    "rwkv7_fla": RWKV7ForCausalLM,  # in early configurations
    **MODEL_CLASSES,
}
FLA_TYPES = tuple(_CLASSES)
"""The model types in flash-linear-attention's configurations."""


_LARGEST_NUMBER = 2**31
_MAY_BE_NEGATIVE = ("clamp_min",)
# What a configuration that cannot be used raises while the model is built.
_UNUSABLE = (AttributeError, TypeError, ValueError, KeyError, RuntimeError, ArithmeticError)
_UNUSABLE += (StrictDataclassError,)


def from_fla(source: str, raw: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """A model as flash-linear-attention saves it, or this package.

    Early checkpoints of RWKV-7 hold the six factors of a layer's token shift in one tensor, ``attn.x_x``;
    those of the other models the MLP's two maps of its input in one, ``mlp.gate_proj``.

    Args:
        source: the checkpoint's name, for messages.
        raw: the contents of its ``config.json``; the code that it points at (``auto_map``) is not used.
        tensors: its weights.

    Raises:
        HookedModelError: tensors do not fit, or the configuration is not supported.
    """
    model_class = _CLASSES[raw["model_type"]]
    config_class: Any = model_class.config_class
    is_rwkv7 = model_class is RWKV7ForCausalLM
    not_fields = ("auto_map", "architectures", "model_type")
    raw = {name: value for name, value in raw.items() if name not in not_fields}
    if is_rwkv7:
        raw |= _ranks(raw, tensors)
    _check_types(source, raw, config_class)
    # First, because the configuration lists its layers.
    check_layers(source, raw.get("num_hidden_layers", 0), len(tensors))
    if is_rwkv7 and raw.get("hidden_act") != "sqrelu":  # its name for transformers' relu2
        check_activation(source, raw.get("hidden_act"))
    try:
        config = config_class.from_dict({**raw, "architectures": [model_class.__name__]})
        shapes = model_shapes(source, model_class, config, len(tensors))
    except HookedModelError:
        raise
    except _UNUSABLE as error:
        raise HookedModelError(f"the config.json of {source} cannot be used: {one_line(error)}") from error
    ours = _of_early_rwkv7(tensors) if is_rwkv7 else _of_early_models(tensors)
    check_tensors(source, ours, shapes, "model.embeddings.weight" if config.tie_word_embeddings else None)
    return Checkpoint(model_class, config, ours)


def _of_early_rwkv7(tensors: Tensors) -> Tensors:
    """With the factors of the token shift one by one, and without those that layer 0 does not use."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x") and tensor.numel() % 6 == 0:
            for letter, factor in zip("rwkvag", tensor.reshape(6, 1, 1, -1)):
                ours[name[:-1] + letter] = factor
        elif not name.startswith("model.layers.0.attn.v_lora."):  # unused: layer 0 mixes in no other values
            ours[name] = tensor
    return ours


def _of_early_models(tensors: Tensors) -> Tensors:
    """With the MLP's gate and its other map apart, and without Gated DeltaNet's ``D``, which nothing used."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        up = name.replace(".mlp.gate_proj.", ".mlp.up_proj.")
        if up != name and up not in tensors and tensor.ndim == 2 and len(tensor) % 2 == 0:
            ours[name], ours[up] = tensor.chunk(2)
        elif not name.endswith(".attn.D"):
            ours[name] = tensor
    return ours


def _ranks(raw: dict[str, Any], tensors: Tensors) -> dict[str, int]:
    """The ranks that a configuration leaves open, from the tensors: each version of fla has its own rule."""
    ranks = {}
    for field, part in (("decay", "0.attn.w"), ("gate", "0.attn.g"), ("a", "0.attn.a"), ("v", "1.attn.v")):
        factor = tensors.get(f"model.layers.{part}_lora.lora.0.weight")  # layer 0 mixes in no other values
        if raw.get(f"{field}_low_rank_dim") is None and factor is not None and factor.ndim == 2:
            ranks[f"{field}_low_rank_dim"] = len(factor)
    return ranks


def _check_types(source: str, raw: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Refuse fields of another type than the configuration's class declares (token ids: any), and below 0.

    Raises:
        HookedModelError: a field is of another type, negative or not finite.
    """
    hints: dict[str, Any] = {}
    declared: dict[str, Any] = {}
    for part in reversed(config_class.mro()):
        if issubclass(part, PreTrainedConfig) and part is not PreTrainedConfig and "__init__" in vars(part):
            hints |= get_type_hints(part.__init__)
            declared |= part.__init__.__annotations__
    for field, hint in hints.items():
        if field not in raw or hint is Any or field.endswith("_token_id"):
            continue
        number = raw[field]
        if not is_bearable(number, hint, conf=BeartypeConf(is_pep484_tower=True)):
            raise bad_field(source, field, number, declared[field])
        lowest = -_LARGEST_NUMBER if field in _MAY_BE_NEGATIVE else 0
        if isinstance(number, bool) is not (hint is bool) or (
            isinstance(number, (int, float)) and not lowest <= number < _LARGEST_NUMBER
        ):
            raise bad_field(source, field, number, "a number from 0" if hint is not bool else "true or false")
