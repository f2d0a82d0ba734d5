"""RWKV-7 as BlinkDL's ``.pth`` files hold it (x070): weights under names of their own, no configuration."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.layouts.checkpoint import Checkpoint, Tensors, check_tensors, model_shapes
from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM

# Epsilon of the norm over each head's outputs, for heads of any size.
_GROUP_NORM_EPS = 64e-5
# Modules of a block, by our names.
_MODULES = {
    "pre_norm": "ln0",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn.g_norm": "att.ln_x",
    "attn.r_proj": "att.receptance",
    "attn.k_proj": "att.key",
    "attn.v_proj": "att.value",
    "attn.o_proj": "att.output",
}
_LOW_RANK = re.compile(r"attn\.([wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)")
_LOW_RANK_PARTS = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}
_BLOCK = r"blocks\.\d+\."
# Versions of RWKV by a tensor name that the version and no later row has; the first row that matches counts.
_VERSIONS = {
    r"\w+\.s_emb": "RWKV-7 with DeepEmbed",
    r"att\.(r_k|k_k|x_r)$": "RWKV-7",
    r"att\.time_maa": "RWKV-6 (x060)",
    r"att\.(ln_x|gate)\.": "RWKV-5 (x050 to x052)",
    r"att\.time_decay$": "RWKV-4 (x040)",
}


class _Counterpart(NamedTuple):
    """A tensor's name in BlinkDL's files, and its layout there: the same, transposed, or a row [1, 1, n]."""

    name: str
    layout: Literal["same", "transposed", "row"]

    def from_ours(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.T.contiguous()
        return tensor.reshape(1, 1, -1) if self.layout == "row" else tensor

    def to_ours(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        return tensor.T.contiguous() if self.layout == "transposed" else tensor.reshape(shape)


def _counterpart(name: str) -> _Counterpart:
    """The counterpart of one of our tensors."""
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if block is None:
        for ours, theirs in (("model.embeddings", "emb"), ("model.norm", "ln_out"), ("lm_head", "head")):
            name = name.replace(ours, theirs)
        return _Counterpart(name, "same")
    prefix, rest = f"blocks.{block[1]}.", block[2]
    low_rank = _LOW_RANK.fullmatch(rest)
    if low_rank is not None:
        layout = "row" if low_rank[2] == "2.bias" else "transposed"
        return _Counterpart(f"{prefix}att.{low_rank[1]}{_LOW_RANK_PARTS[low_rank[2]]}", layout)
    module, _, part = rest.rpartition(".")
    if module in _MODULES:
        return _Counterpart(f"{prefix}{_MODULES[module]}.{part}", "same")
    layout = "row" if part in ("k_k", "k_a", "x_k") else "same"
    return _Counterpart(prefix + rest.replace("attn.", "att."), layout)


def from_blinkdl(source: str, tensors: Tensors) -> Checkpoint:
    """An RWKV-7 model in the form of BlinkDL's ``.pth`` files (x070). All sizes are read off the tensors.

    Args:
        source: the checkpoint's name, for messages.
        tensors: its weights.

    Raises:
        HookedModelError: tensors do not fit, or belong to another version of RWKV.
    """
    _check_prefix(source, tensors)
    version = next(
        (v for mark, v in _VERSIONS.items() if any(re.match(_BLOCK + mark, name) for name in tensors)), None
    )
    if version != "RWKV-7":
        kind = "no RWKV checkpoint of a known version" if version is None else f"{version}, by its tensors"
        raise HookedModelError(f"{source} is {kind}: only plain RWKV-7 (x070) is supported in this form")
    config = _config_from_shapes(source, tensors)
    shapes = model_shapes(source, RWKV7ForCausalLM, config, len(tensors))
    theirs = {name: _counterpart(name) for name in shapes}
    # Published files hold att.v0 to v2 in the first block too, where nothing uses them.
    used = {name: x for name, x in tensors.items() if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}
    expected = {
        there.name: there.from_ours(torch.empty(shapes[name], device="meta")).shape
        for name, there in theirs.items()
    }
    check_tensors(source, used, expected)
    ours = {name: there.to_ours(used[there.name], shapes[name]) for name, there in theirs.items()}
    return Checkpoint(RWKV7ForCausalLM, config, ours)


def _check_prefix(source: str, tensors: Tensors) -> None:
    """Refuse names with a prefix before ``blocks.``, as wrappers of training code leave it."""
    if any(re.match(_BLOCK, name) for name in tensors):
        return
    prefixed = next((m for m in (re.match(rf"(.*?\.){_BLOCK}", name) for name in tensors) if m), None)
    if prefixed is not None:
        raise HookedModelError(
            f"the tensors of {source} have names that begin with {prefixed[1]!r} ({prefixed.string}): save "
            "them without it, BlinkDL's begin with 'blocks.'"
        )


def to_blinkdl(model: RWKV7ForCausalLM) -> Tensors:
    """A model's weights in the form of BlinkDL's ``.pth`` files, to be written with ``torch.save``.

    The form has no configuration. Its readers normalise the removal key without an epsilon
    (``fuse_norm=False``) and take 64e-5 as epsilon of the norm over each head's outputs.

    Args:
        model: an RWKV-7 model that no `HookedRecurrent` wraps: a bridge changes the model's modules.

    Raises:
        HookedModelError: a bridge has changed the model, or a file in this form would not restore its
            configuration.
    """
    config: Any = model.config
    for field, needed in {
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "group_norm_eps": _GROUP_NORM_EPS,
        "hidden_act": "sqrelu",
    }.items():
        value = getattr(config, field)
        same = math.isclose(value, needed) if isinstance(needed, float) else value == needed
        if not same:
            raise HookedModelError(
                f"BlinkDL's files cannot express {field} = {value!r}: their readers take {field} = {needed!r}"
            )
    ours = model.state_dict()
    if ours.keys() != model_shapes("the model", RWKV7ForCausalLM, config, len(ours)).keys():
        raise HookedModelError(
            "a bridge has changed the modules of this model: write it before HookedRecurrent wraps it"
        )
    theirs = {_counterpart(name): tensor for name, tensor in ours.items()}
    return {there.name: there.from_ours(tensor) for there, tensor in theirs.items()}


def _config_from_shapes(source: str, tensors: Tensors) -> RWKV7Config:
    def size(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].ndim != 2:
            raise HookedModelError(f"{source} lacks the matrix {name}, which an RWKV-7 (x070) checkpoint has")
        return tensors[name].shape[axis]

    blocks = {int(name.split(".")[1]) for name in tensors if re.match(_BLOCK, name)}
    n_layers = max(blocks) + 1
    try:
        return RWKV7Config(
            vocab_size=size("emb.weight", 0),
            hidden_size=size("emb.weight", 1),
            num_hidden_layers=n_layers,
            head_dim=size("blocks.0.att.r_k", 1),
            value_dim=[size(f"blocks.{n}.att.value.weight", 0) for n in range(n_layers)],
            intermediate_size=size("blocks.0.ffn.key.weight", 0),
            decay_low_rank_dim=size("blocks.0.att.w1", 1),
            gate_low_rank_dim=size("blocks.0.att.g1", 1),
            a_low_rank_dim=size("blocks.0.att.a1", 1),
            v_low_rank_dim=size("blocks.1.att.v1", 1) if n_layers > 1 else 1,
            fuse_norm=False,
            group_norm_eps=_GROUP_NORM_EPS,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            architectures=["RWKV7ForCausalLM"],
        )
    except HookedModelError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise HookedModelError(f"the shapes in {source} make no RWKV-7 model: {one_line(error)}") from error
