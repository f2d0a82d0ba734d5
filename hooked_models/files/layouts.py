"""Checkpoints in other forms than Hugging Face's: mamba_ssm's, flash-linear-attention's and BlinkDL's.

Each reader takes tensors by name (and what ``config.json`` holds, where there is one) and gives the class,
configuration and weights of a transformers model, after a strict check of names and shapes.
"""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import torch_files
from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM

Tensors = dict[str, Tensor]


class Checkpoint(NamedTuple):
    """A transformers model, not yet made."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: Tensors


def read_tensors(path: Path) -> Tensors:
    """The tensors in a ``.safetensors`` or PyTorch file, by name; no code in it is ever run.

    Raises:
        HookedModelError: no such file, an empty, truncated or damaged one, or one that holds anything else.
    """
    if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise HookedModelError(f"{path} is truncated or damaged ({one_line(error)})") from error
    held = torch_files.read(path)
    _check_held(path, held)
    return dict(held)


def _check_held(path: Path, held: Any) -> None:
    needed = f"{path} must hold tensors by name and nothing else"
    if not isinstance(held, dict) or not held:
        found = "an empty dict" if isinstance(held, dict) else f"a {type(held).__name__}"
        raise HookedModelError(f"{needed}, not {found}")
    others = [
        f"{str(name)[:60]!r} ({type(x).__name__})" for name, x in held.items() if not isinstance(x, Tensor)
    ]
    nested = next((str(name) for name, x in held.items() if isinstance(x, dict)), None)
    if others:
        advice = "" if nested is None else f": save what {nested[:60]!r} holds to a file of its own"
        raise HookedModelError(f"{needed}, but also holds {_some(others)}{advice}")
    unnamed = [repr(name)[:60] for name in held if not isinstance(name, str)]
    if unnamed:
        raise HookedModelError(f"{needed}, but has keys that are no names: {_some(unnamed)}")


# mamba_ssm. Its parameter names are transformers' except for the embedding's.

_EMBEDDING, _MAMBA_SSM_EMBEDDING = "backbone.embeddings.weight", "backbone.embedding.weight"
# Fields of ssm_cfg that only choose initial values or kernels.
_WITHOUT_EFFECT = ("A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor")
_WITHOUT_EFFECT += ("use_mem_eff_path", "sequence_parallel")
# Fields of ssm_cfg that are sizes, with mamba_ssm's defaults.
_SSM_SIZES = {"d_state": 128, "headdim": 64, "expand": 2, "ngroups": 1, "d_conv": 4, "chunk_size": 256}


def from_mamba_ssm(source: str, raw: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """A Mamba-2 model as the mamba_ssm package saves it.

    Args:
        source: its name, for messages.
        raw: what its ``config.json`` holds.
        tensors: its weights.

    Raises:
        HookedModelError: tensors that do not fit, or what transformers' Mamba-2 cannot express.
    """
    config = _mamba2_config(source, raw)
    if config.n_groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        raise HookedModelError(
            f"{source} has ssm_cfg.ngroups = {config.n_groups}: this needs transformers 5.23 or later, for "
            "earlier ones do not normalise the groups apart"
        )
    shapes = _shapes(Mamba2ForCausalLM, config, len(tensors))
    shapes[_MAMBA_SSM_EMBEDDING] = shapes.pop(_EMBEDDING)
    _check(source, tensors, shapes, _MAMBA_SSM_EMBEDDING if config.tie_word_embeddings else None)
    ours = dict(tensors)
    ours[_EMBEDDING] = ours.pop(_MAMBA_SSM_EMBEDDING)
    return Checkpoint(Mamba2ForCausalLM, config, ours)


def _mamba2_config(source: str, raw: dict[str, Any]) -> Mamba2Config:
    ssm = raw.get("ssm_cfg") or {}
    try:
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
            if not isinstance(size, int) or size < 1:
                raise _bad_field(source, field, size, "a whole number above 0")
        inner, head_dim = sizes["expand"] * hidden, sizes["headdim"]
        asked = {
            "ssm_cfg.layer": (ssm.get("layer", "Mamba1"), "Mamba2"),
            "attn_layer_idx": (list(raw.get("attn_layer_idx") or []), []),
            "d_intermediate": (raw.get("d_intermediate", 0), 0),
            "rms_norm": (raw.get("rms_norm", True), True),
            "ssm_cfg.rmsnorm": (ssm.get("rmsnorm", True), True),
            "ssm_cfg.norm_before_gate": (ssm.get("norm_before_gate", False), False),
            "ssm_cfg.D_has_hdim": (ssm.get("D_has_hdim", False), False),
            "ssm_cfg.d_ssm": (ssm.get("d_ssm") or inner, inner),
        }
        for field, (found, needed) in asked.items():
            if found != needed:
                raise HookedModelError(
                    f"{source} has {field} = {found!r} in its config.json: of mamba_ssm's models only those "
                    f"with {field} = {needed!r} can be loaded"
                )
        known = {field.removeprefix("ssm_cfg.") for field in asked}.union(_WITHOUT_EFFECT)
        known |= {*_SSM_SIZES, "bias", "conv_bias", "dt_limit"}
        unknown = sorted(set(ssm) - known)
        if unknown:
            raise HookedModelError(f"{source} has unknown fields in ssm_cfg: {', '.join(unknown)}")
        if inner % head_dim:
            raise HookedModelError(
                f"{source} has {inner} inner channels, which heads of {head_dim} (headdim) do not fill"
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
            layer_norm_epsilon=1e-5,  # mamba_ssm's, which no field changes
            residual_in_fp32=raw.get("residual_in_fp32", True),
            tie_word_embeddings=raw.get("tie_embeddings", True),
            # <|endoftext|> of the tokenizer that mamba_ssm uses.
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            architectures=["Mamba2ForCausalLM"],
        )
    except KeyError as error:
        raise HookedModelError(f"the config.json of {source} lacks {error}") from error
    except (AttributeError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise HookedModelError(f"the config.json of {source} cannot be used: {one_line(error)}") from error


# flash-linear-attention. Its parameter names are ours.

FLA_TYPES = ("rwkv7", "rwkv7_fla")
"""The model types of its RWKV-7 configurations, of which the second is an early one."""


def from_fla(source: str, raw: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """An RWKV-7 model as flash-linear-attention saves it, and as we do.

    Early checkpoints keep the token shift's six factors of a layer in one ``attn.x_x``.

    Args:
        source: its name, for messages.
        raw: what its ``config.json`` holds; code that it points at (``auto_map``) is not used.
        tensors: its weights.

    Raises:
        HookedModelError: tensors that do not fit, or a configuration that is not supported (hybrids).
    """
    dropped = ("auto_map", "architectures", "model_type")
    raw = {name: value for name, value in raw.items() if name not in dropped}
    for field, hint in get_type_hints(RWKV7Config.__init__).items():
        # Of these transformers takes lists too.
        if field not in raw or hint is Any or field.endswith("_token_id"):
            continue
        if not is_bearable(raw[field], hint, conf=BeartypeConf(is_pep484_tower=True)):
            raise _bad_field(source, field, raw[field], RWKV7Config.__init__.__annotations__[field])
    if raw.get("hidden_act") != "sqrelu":  # flash-linear-attention's own name of one
        check_activation(source, raw.get("hidden_act"))
    try:
        config = RWKV7Config.from_dict({**raw, "architectures": ["RWKV7ForCausalLM"]})
        shapes = _shapes(RWKV7ForCausalLM, config, len(tensors))
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise HookedModelError(f"the config.json of {source} cannot be used: {one_line(error)}") from error
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x") and tensor.numel() % 6 == 0:
            for letter, factor in zip("rwkvag", tensor.reshape(6, 1, 1, -1)):
                ours[name[:-1] + letter] = factor
        elif not name.startswith("model.layers.0.attn.v_lora."):  # the first layer's values are unmixed
            ours[name] = tensor
    tied = "model.embeddings.weight" if config.tie_word_embeddings else None
    _check(source, ours, shapes, tied)
    return Checkpoint(RWKV7ForCausalLM, config, ours)


# BlinkDL's files.

_BLINKDL_EPSILON = 64e-5  # of the heads' norm, whatever their size
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
# By a name in a block that only this version (or a later one in this order) has.
_BLOCK = r"blocks\.\d+\."
_VERSIONS = {
    r"\w+\.s_emb": "RWKV-7 with DeepEmbed",
    r"att\.(r_k|k_k|x_r)$": "RWKV-7",
    r"att\.time_maa": "RWKV-6 (x060)",
    r"att\.(ln_x|gate)\.": "RWKV-5 (x050 to x052)",
    r"att\.time_decay$": "RWKV-4 (x040)",
}


class _Counterpart(NamedTuple):
    """A tensor's name in BlinkDL's files, and how it lies there: as ours, transposed, or as [1, 1, n]."""

    name: str
    layout: Literal["same", "transposed", "row"]

    def from_ours(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.T.contiguous()
        return tensor.reshape(1, 1, -1) if self.layout == "row" else tensor

    def to_ours(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        return tensor.T.contiguous() if self.layout == "transposed" else tensor.reshape(shape)


def _counterpart(name: str) -> _Counterpart:
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
    """An RWKV-7 model in the form of BlinkDL's ``.pth`` files (x070); all sizes come from the shapes.

    Args:
        source: its name, for messages.
        tensors: its weights.

    Raises:
        HookedModelError: tensors that do not fit, or another version of RWKV.
    """
    _check_prefix(source, tensors)
    version = next(
        (v for mark, v in _VERSIONS.items() if any(re.match(_BLOCK + mark, name) for name in tensors)), None
    )
    if version != "RWKV-7":
        seems = "no RWKV checkpoint that is known here" if version is None else f"{version}, by its tensors"
        raise HookedModelError(f"{source} is {seems}: only plain RWKV-7 (x070) is supported in this form")
    config = _blinkdl_config(source, tensors)
    shapes = _shapes(RWKV7ForCausalLM, config, len(tensors))
    theirs = {name: _counterpart(name) for name in shapes}
    # The first block may hold a mix of its values with its values.
    used = {name: x for name, x in tensors.items() if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}
    expected = {
        there.name: there.from_ours(torch.empty(shapes[name], device="meta")).shape
        for name, there in theirs.items()
    }
    _check(source, used, expected)
    ours = {name: there.to_ours(used[there.name], shapes[name]) for name, there in theirs.items()}
    return Checkpoint(RWKV7ForCausalLM, config, ours)


def _check_prefix(source: str, tensors: Tensors) -> None:
    """Refuse names that all have something before ``blocks.``, as training code wraps models."""
    if any(re.match(_BLOCK, name) for name in tensors):
        return
    prefixed = next((m for m in (re.match(rf"(.*?\.){_BLOCK}", name) for name in tensors) if m), None)
    if prefixed is not None:
        raise HookedModelError(
            f"the tensors of {source} have names that begin with {prefixed[1]!r} ({prefixed.string}): save "
            "them without it, BlinkDL's begin with 'blocks.'"
        )


def to_blinkdl(model: RWKV7ForCausalLM) -> Tensors:
    """The weights in the form of BlinkDL's ``.pth`` files, to be written with ``torch.save``.

    That form has no configuration: whoever reads it normalises the removal key without epsilon
    (``fuse_norm=False``) and takes 64e-5 as epsilon of the heads' norm.

    Args:
        model: as made or loaded, not inside a bridge, which changes its modules.

    Raises:
        HookedModelError: a bridge's model, or a configuration that such a file would not bring back.
    """
    config: Any = model.config
    for field, needed in {
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "group_norm_eps": _BLINKDL_EPSILON,
        "hidden_act": "sqrelu",
    }.items():
        found = getattr(config, field)
        same = math.isclose(found, needed) if isinstance(needed, float) else found == needed
        if not same:
            raise HookedModelError(
                f"BlinkDL's files cannot say {field} = {found!r}: they mean {field} = {needed!r}"
            )
    ours = model.state_dict()
    if ours.keys() != _shapes(RWKV7ForCausalLM, config, len(ours)).keys():
        raise HookedModelError("write the model before a bridge takes it: this one's modules are changed")
    theirs = {_counterpart(name): tensor for name, tensor in ours.items()}
    return {there.name: there.from_ours(tensor) for there, tensor in theirs.items()}


def _blinkdl_config(source: str, tensors: Tensors) -> RWKV7Config:
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
            group_norm_eps=_BLINKDL_EPSILON,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            architectures=["RWKV7ForCausalLM"],
        )
    except HookedModelError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise HookedModelError(f"the shapes in {source} make no RWKV-7 model: {one_line(error)}") from error


# What all readers share.


def listed(names: list[str]) -> str:
    """How many tensors there are, and the first few."""
    return f"{len(names)} tensor(s): {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_activation(source: str, name: Any) -> None:
    """Refuse a ``hidden_act`` that transformers does not know."""
    if name is not None and name not in ACT2FN:
        raise _bad_field(source, "hidden_act", name, "the name of an activation in transformers' ACT2FN")


def _bad_field(source: str, field: str, found: Any, expected: str) -> HookedModelError:
    return HookedModelError(
        f"the config.json of {source} has {field} = {repr(found)[:80]}: expected {expected}"
    )


def _shapes(model_class: type[PreTrainedModel], config: Any, n_tensors: int) -> dict[str, torch.Size]:
    """Shapes of a model's tensors by name, without making them."""
    if config.num_hidden_layers > n_tensors:
        raise HookedModelError(f"{config.num_hidden_layers} layers cannot be made of {n_tensors} tensors")
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}


def _check(source: str, found: Tensors, expected: dict[str, torch.Size], tied: str | None = None) -> None:
    """Refuse tensors that lack, exceed or differ from the expected ones, or hold whole numbers.

    Args:
        source: whose tensors, for the message.
        found: the tensors.
        expected: their shapes.
        tied: the name of the embedding that ``lm_head.weight`` equals, so that it may be left out.
    """
    missing = [name for name in expected if name not in found]
    if tied is not None and "lm_head.weight" in found and tied in found:
        head, embedding = found["lm_head.weight"], found[tied]
        if head.shape != embedding.shape or not (head == embedding).all():
            raise HookedModelError(f"{source} ties lm_head.weight to {tied}, but holds two different ones")
    elif tied is not None:
        missing = [name for name in missing if name != "lm_head.weight"]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    whole = [
        f"{name} ({x.dtype})" for name, x in found.items() if name in expected and not x.is_floating_point()
    ]
    problems = {"lacks": missing, "has unexpected": unexpected, "has the wrong shape for": wrong}
    problems["needs floating-point numbers in"] = whole
    lines = [f"{what} {listed(names)}" for what, names in problems.items() if names]
    if lines:
        raise HookedModelError(f"the checkpoint {source} {'; '.join(lines)}")
