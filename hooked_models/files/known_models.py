"""Which models have hooks, by their configuration alone: the others are refused before weights are loaded."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hooked_models.architectures import adapters
from hooked_models.errors import HookedModelError
from hooked_models.mixers import HookedMixer

TEXT_MODELS: dict[str | None, str] = {
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""Models that are published as the text part of a model with a vision tower, by model type."""

_MAMBA_1 = "no matrix memory: Mamba-1 keeps a vector per channel, and no head has a key or a value"
_CONVOLUTION = "no matrix memory: beside attention it has short convolutions"
_PER_CHANNEL = "no matrix memory: its recurrence keeps one number per channel"
_LANES = "recurrent layers, but several residual streams and sparse attention: edits there are unsupported"
_NOT_WRITTEN = "a matrix memory of an unsupported kind: nobody has written a mixer for its gates"
# Why models with a recurrence have no hooks, by the model type in transformers or flash-linear-attention.
_REASONS = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba", "samba"), _MAMBA_1),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl", "lfm3", "lfm3_vl"), _CONVOLUTION),
    **dict.fromkeys(("inkling", "inkling2", "zaya"), _CONVOLUTION),
    **dict.fromkeys(("recurrent_gemma", "hgrn"), _PER_CHANNEL),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "glm5_next", "glm5_next_text"), _LANES),
    # Both have this model type; transformers would build Ling 3.0 of the other's sizes.
    "bailing_hybrid": "lightning attention in a class (Ring and Ling 2.5, 2.6) that transformers has not",
    "rwkv": "no matrix memory: RWKV-4 keeps a weighted mean per channel",
    "xlstm": "a matrix memory of an unsupported kind: it divides reads by a normaliser and scales writes by "
    "a running maximum",
    "rwkv6": "a matrix memory of an unsupported kind: it reads the state before the token's write",
    "gated_deltaproduct": "a matrix memory of an unsupported kind: it writes several times a token",
    **dict.fromkeys(("retnet", "hgrn2", "gsa", "abc", "comba", "linear_attn", "lightnet"), _NOT_WRITTEN),
}


def families() -> str:
    """The kinds of recurrence that have hooks, from the table of architectures."""
    kinds = {
        component.architecture
        for row in adapters.ADAPTERS.values()
        for component in row.components.values()
        if issubclass(component, HookedMixer)
    }
    return ", ".join(sorted(kinds))


def check_model_type(source: str, raw: dict[str, Any], is_remote_code_run: bool) -> None:
    """Refuse a ``config.json`` whose model type transformers does not know.

    Args:
        source: the model's name, for the message.
        raw: the contents of ``config.json``.
        is_remote_code_run: whether the user lets the checkpoint bring a configuration class of its own.

    Raises:
        HookedModelError: transformers would load no configuration.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return
    if is_remote_code_run and raw.get("auto_map"):
        return
    names = raw.get("architectures")
    if isinstance(names, list) and any(name in adapters.ADAPTERS for name in names):
        raise HookedModelError(
            f"{source} needs a newer transformers: {transformers.__version__} does not know its model type "
            f"{kind!r:.40}"
        )
    why = _REASONS.get(kind)
    has = (
        f"model type {kind!r:.40}, unknown to transformers {transformers.__version__}" if why is None else why
    )
    raise _refusal(source, has)


def check_model(source: str, config: Any, model: Any = None) -> None:
    """Refuse a model that has no hooks.

    Args:
        source: the model's name, for the message.
        config: its configuration.
        model: the model, where it is loaded already.

    Raises:
        HookedModelError: its class is not in the table of architectures; the message says why.
    """
    text_config: Any = getattr(config, "text_config", None)
    if model is None and getattr(text_config, "model_type", None) in TEXT_MODELS:
        return
    kind = getattr(config, "model_type", None)
    names = [*(getattr(config, "architectures", None) or ())]
    names += [] if model is None else [type(model).__name__]
    names = names or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)]
    if any(name in adapters.ADAPTERS for name in names):
        return
    kinds = (kind, getattr(text_config, "model_type", None))
    why = next((_REASONS[x] for x in kinds if x in _REASONS), "no recurrent layers that this package knows")
    raise _refusal(f"{source} ({names[0] or kind!s:.60})", why)


def _refusal(subject: str, has: str) -> HookedModelError:
    return HookedModelError(
        f"{subject} has {has}; there are hooks for {families()} (docs/hooks.md), else use TransformerLens"
    )
