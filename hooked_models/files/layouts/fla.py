"""RWKV-7 as flash-linear-attention saves it: `hooked_models.modeling.rwkv7` has the same parameter names."""

from __future__ import annotations

from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.layouts.checkpoint import (
    Checkpoint,
    Tensors,
    bad_field,
    check_activation,
    check_tensors,
    model_shapes,
)
from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM

FLA_TYPES = ("rwkv7", "rwkv7_fla")
"""The model types in flash-linear-attention's RWKV-7 configurations; early ones have the second."""


_LARGEST_NUMBER = 2**31


def from_fla(source: str, raw: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """An RWKV-7 model as flash-linear-attention saves it, or this package.

    Early checkpoints hold the six factors of a layer's token shift in one tensor, ``attn.x_x``.

    Args:
        source: the checkpoint's name, for messages.
        raw: the contents of its ``config.json``; the code that it points at (``auto_map``) is not used.
        tensors: its weights.

    Raises:
        HookedModelError: tensors do not fit, or the configuration is not supported (hybrids).
    """
    not_fields = ("auto_map", "architectures", "model_type")
    raw = {name: value for name, value in raw.items() if name not in not_fields}
    raw |= _ranks(raw, tensors)
    _check_types(source, raw)
    if raw.get("hidden_act") != "sqrelu":  # flash-linear-attention's name for transformers' relu2
        check_activation(source, raw.get("hidden_act"))
    try:
        config = RWKV7Config.from_dict({**raw, "architectures": ["RWKV7ForCausalLM"]})
        shapes = model_shapes(RWKV7ForCausalLM, config, len(tensors))
    except HookedModelError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, ArithmeticError) as error:
        raise HookedModelError(f"the config.json of {source} cannot be used: {one_line(error)}") from error
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x") and tensor.numel() % 6 == 0:
            for letter, factor in zip("rwkvag", tensor.reshape(6, 1, 1, -1)):
                ours[name[:-1] + letter] = factor
        elif not name.startswith("model.layers.0.attn.v_lora."):  # unused: layer 0 mixes in no other values
            ours[name] = tensor
    check_tensors(source, ours, shapes, "model.embeddings.weight" if config.tie_word_embeddings else None)
    return Checkpoint(RWKV7ForCausalLM, config, ours)


def _ranks(raw: dict[str, Any], tensors: Tensors) -> dict[str, int]:
    """The ranks that a configuration leaves open, from the tensors: each version of fla has its own rule."""
    ranks = {}
    for field, part in (("decay", "0.attn.w"), ("gate", "0.attn.g"), ("a", "0.attn.a"), ("v", "1.attn.v")):
        factor = tensors.get(f"model.layers.{part}_lora.lora.0.weight")  # layer 0 mixes in no other values
        if raw.get(f"{field}_low_rank_dim") is None and factor is not None and factor.ndim == 2:
            ranks[f"{field}_low_rank_dim"] = len(factor)
    return ranks


def _check_types(source: str, raw: dict[str, Any]) -> None:
    """Refuse fields of another type than `RWKV7Config` declares (token ids: any), and numbers below 0.

    Raises:
        HookedModelError: a field is of another type, negative or not finite.
    """
    for field, hint in get_type_hints(RWKV7Config.__init__).items():
        if field not in raw or hint is Any or field.endswith("_token_id"):
            continue
        if not is_bearable(raw[field], hint, conf=BeartypeConf(is_pep484_tower=True)):
            raise bad_field(source, field, raw[field], RWKV7Config.__init__.__annotations__[field])
        number = raw[field]
        if isinstance(number, bool) is not (hint is bool) or (
            isinstance(number, (int, float)) and not 0 <= number < _LARGEST_NUMBER
        ):
            raise bad_field(source, field, number, "a number from 0" if hint is not bool else "true or false")
