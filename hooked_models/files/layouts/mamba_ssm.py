"""Mamba-2 as the mamba_ssm package saves it: the parameter names are transformers', but for the embedding."""

from __future__ import annotations

import inspect
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.layouts.checkpoint import Checkpoint, Tensors, bad_field, check_tensors, model_shapes

_EMBEDDING, _MAMBA_SSM_EMBEDDING = "backbone.embeddings.weight", "backbone.embedding.weight"
# Sizes in ssm_cfg, with mamba_ssm's defaults.
_SSM_SIZES = {"d_state": 128, "headdim": 64, "expand": 2, "ngroups": 1, "d_conv": 4, "chunk_size": 256}
# The other fields of ssm_cfg that are converted, and those that only choose start values or kernels.
_SSM_OPTIONS = ("bias", "conv_bias", "dt_limit")
_SSM_WITHOUT_EFFECT = ("A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor")
_SSM_WITHOUT_EFFECT += ("use_mem_eff_path", "sequence_parallel")
_LARGEST_SIZE = 2**31


def from_mamba_ssm(source: str, raw: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """A Mamba-2 model as the mamba_ssm package saves it.

    Args:
        source: the checkpoint's name, for messages.
        raw: the contents of its ``config.json``.
        tensors: its weights.

    Raises:
        HookedModelError: tensors do not fit, or transformers' Mamba-2 cannot express the configuration.
    """
    ssm = raw.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise bad_field(source, "ssm_cfg", ssm, "an object {...}")
    try:
        config = _converted_config(source, raw, ssm)
    except KeyError as error:
        raise HookedModelError(f"the config.json of {source} lacks {error}") from error
    except (AttributeError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        if isinstance(error, HookedModelError):
            raise
        raise HookedModelError(f"the config.json of {source} cannot be used: {one_line(error)}") from error
    if config.n_groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        raise HookedModelError(
            f"{source} has ssm_cfg.ngroups = {config.n_groups}: this needs transformers 5.23 or later: "
            "earlier versions normalise all groups together"
        )
    shapes = model_shapes(source, Mamba2ForCausalLM, config, len(tensors))
    shapes[_MAMBA_SSM_EMBEDDING] = shapes.pop(_EMBEDDING)
    check_tensors(source, tensors, shapes, _MAMBA_SSM_EMBEDDING if config.tie_word_embeddings else None)
    ours = dict(tensors)
    ours[_EMBEDDING] = ours.pop(_MAMBA_SSM_EMBEDDING)
    return Checkpoint(Mamba2ForCausalLM, config, ours)


def _converted_config(source: str, raw: dict[str, Any], ssm: Any) -> Mamba2Config:
    hidden, layers, vocabulary = raw["d_model"], raw["n_layer"], raw["vocab_size"]
    multiple = raw.get("pad_vocab_size_multiple", 8)
    sizes = {field: ssm.get(field, default) for field, default in _SSM_SIZES.items()}
    for field, size in {
        "d_model": hidden,
        "n_layer": layers,
        "vocab_size": vocabulary,
        "pad_vocab_size_multiple": multiple,
        **{f"ssm_cfg.{name}": size for name, size in sizes.items()},
    }.items():
        if type(size) is not int or not 0 < size < _LARGEST_SIZE:
            raise bad_field(source, field, size, "a whole number above 0")
    _check_switches(source, raw, ssm)
    inner, head_dim = sizes["expand"] * hidden, sizes["headdim"]
    _check_is_plain_mamba2(source, raw, ssm, inner)
    if inner % head_dim:
        raise HookedModelError(
            f"{source} has {inner} inner channels, which heads of {head_dim} (headdim) do not fill"
        )
    if inner // head_dim % sizes["ngroups"]:
        raise HookedModelError(
            f"{source} has {inner // head_dim} heads, which {sizes['ngroups']} groups (ngroups) do not divide"
        )
    return Mamba2Config(
        vocab_size=vocabulary + -vocabulary % multiple,
        hidden_size=hidden,
        num_hidden_layers=layers,
        expand=sizes["expand"],
        num_heads=inner // head_dim,
        head_dim=head_dim,
        state_size=sizes["d_state"],
        n_groups=sizes["ngroups"],
        conv_kernel=sizes["d_conv"],
        chunk_size=sizes["chunk_size"],
        time_step_limit=tuple(ssm.get("dt_limit", (0.0, math.inf))),
        use_bias=ssm.get("bias", False),
        use_conv_bias=ssm.get("conv_bias", True),
        layer_norm_epsilon=1e-5,  # fixed in mamba_ssm: no field changes it
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        # <|endoftext|> in the tokenizer that mamba_ssm uses.
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["Mamba2ForCausalLM"],
    )


def _check_switches(source: str, raw: dict[str, Any], ssm: dict[str, Any]) -> None:
    """Refuse switches that are not true or false, and limits of the time step that are not two numbers."""
    switches = {f"ssm_cfg.{name}": ssm.get(name, False) for name in ("bias", "conv_bias")}
    switches |= {name: raw.get(name, False) for name in ("residual_in_fp32", "tie_embeddings")}
    for field, value in switches.items():
        if type(value) is not bool:
            raise bad_field(source, field, value, "true or false")
    limits = ssm.get("dt_limit", [0.0, math.inf])
    numbers = isinstance(limits, list) and all(type(x) in (int, float) for x in limits)
    if not numbers or len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
        raise bad_field(source, "ssm_cfg.dt_limit", limits, "two numbers from 0, the smaller one first")


def _check_is_plain_mamba2(source: str, raw: dict[str, Any], ssm: dict[str, Any], inner: int) -> None:
    """Refuse settings that transformers' Mamba-2 does not have, and fields that are not mamba_ssm's."""
    settings = {
        "ssm_cfg.layer": (ssm.get("layer", "Mamba1"), "Mamba2"),
        "attn_layer_idx": (list(raw.get("attn_layer_idx") or []), []),
        "d_intermediate": (raw.get("d_intermediate", 0), 0),
        "rms_norm": (raw.get("rms_norm", True), True),
        "ssm_cfg.rmsnorm": (ssm.get("rmsnorm", True), True),
        "ssm_cfg.norm_before_gate": (ssm.get("norm_before_gate", False), False),
        "ssm_cfg.D_has_hdim": (ssm.get("D_has_hdim", False), False),
        "ssm_cfg.d_ssm": (ssm.get("d_ssm") or inner, inner),
    }
    for field, (value, needed) in settings.items():
        if value != needed:
            raise HookedModelError(
                f"{source} has {field} = {value!r} in its config.json: of mamba_ssm's models only those with "
                f"{field} = {needed!r} can be loaded"
            )
    checked = {field.removeprefix("ssm_cfg.") for field in settings}
    unknown = sorted(set(ssm) - checked.union(_SSM_SIZES, _SSM_OPTIONS, _SSM_WITHOUT_EFFECT))
    if unknown:
        raise HookedModelError(f"{source} has unknown fields in ssm_cfg: {', '.join(unknown)}")
