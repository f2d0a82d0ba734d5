"""From a model's name to what TransformerLens boots: any source, any form of checkpoint, its tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from hooked_models import zoo
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import layouts as checkpoints
from hooked_models.files.layouts import Checkpoint, Tensors, listed
from hooked_models.modeling.rwkv7 import RWKV7Config

Name = str | os.PathLike[str]
# The text parts of checkpoints that are published with a vision tower, by model type.
_TEXT_MODELS: dict[str | None, str] = {
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
# What a wrong configuration or file may raise where nothing looks for it.
UNFORESEEN = (AttributeError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError)
_UNREADABLE = (OSError, ValueError, *UNFORESEEN)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# One of these is in whatever holds a tokenizer that needs no code of its own.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES += ("vocab.json", "vocab.txt", "tekken.json")
_MAMBA_SSM_TOKENIZER = "EleutherAI/gpt-neox-20b"  # what mamba_ssm's own scripts take
_WORLD_SIZES = range(65530, 65537)  # the tokens of the World vocabulary, up to what models pad it to


def name_of(model: object) -> str:
    """A model's name, of a name or path.

    Raises:
        HookedModelError: it is neither.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise HookedModelError(
            f"a model's name must be a str or a pathlib.Path, not {type(model).__name__}: give a hub id, a "
            f"folder, a .pth file, or one of {', '.join(zoo.SHIPPED)}"
        )
    return str(model)


def prepare(model_name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to call ``TransformerBridge.boot_transformers`` with.

    Models that TransformerLens would not load, or not in the class that is wanted, are loaded here; so are
    their tokenizers.

    Args:
        model_name: hub id, local folder, BlinkDL ``.pth`` file, or the name of a model that ships.
        options: the keyword arguments given.

    Returns:
        the model's source (a path for one that ships), and the arguments to pass on.

    Raises:
        HookedModelError: nothing there, or something that cannot be loaded.
    """
    source = str(zoo.model_path(model_name)) if model_name in zoo.SHIPPED else model_name
    _check_source(source)
    options = dict(options)
    check_device(options.get("device"))
    if options.get("dtype") is not None:
        options["dtype"] = _dtype(options["dtype"])
    if options.get("hf_model") is not None:
        return source, options
    checkpoint = _other_form(source, options)
    if checkpoint is None:
        config = _configuration(source, options)
        if options.get("tokenizer") is None:
            _check_tokenizer(source, options)
        options["hf_model"] = _text_model(source, config, options)
        return source, options
    if options.get("tokenizer") is None:
        options["tokenizer"] = _tokenizer(source, checkpoint, options)
    load = checkpoint.model_class.from_pretrained
    options["hf_model"] = _placed(
        lambda **how: load(None, config=checkpoint.config, state_dict=checkpoint.tensors, **how), options
    )
    return source, options


@contextmanager
def complete_checkpoints() -> Iterator[None]:
    """While open, transformers refuses a checkpoint whose tensors do not fit instead of making them up."""
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("output_loading_info", False):
            return load(cls, *args, output_loading_info=True, **kwargs)
        kwargs.setdefault("ignore_mismatched_sizes", True)
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        mismatched = sorted(str(key) for key in info["mismatched_keys"])
        for what, names in (("lacks", missing), ("has the wrong shape for", mismatched)):
            if names:
                where = "" if not args or args[0] is None else f" in {args[0]}"
                raise HookedModelError(f"the checkpoint of {cls.__name__}{where} {what} {listed(names)}")
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[assignment]


def check_device(device: Any) -> None:
    """Refuse a device that this machine or this torch does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = one_line(error).partition(". ")[0]
        raise HookedModelError(f"device {device!r} cannot be used ({why}): try 'cpu'") from error


def _check_source(source: str) -> None:
    path = Path(source)
    if path.suffix != ".pth" and path.is_file() and path.with_name("config.json").is_file():
        raise HookedModelError(f"{source} is one file of a model: give its folder, {path.parent}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise HookedModelError(
            f"{path} is a folder without config.json: give a folder in Hugging Face form (config.json, "
            f"model.safetensors, tokenizer.json), a BlinkDL .pth file, a hub id, or one of {zoo.SHIPPED}"
        )
    named_like_a_path = source.startswith((".", "/", "~")) or path.suffix == ".pth"
    if not path.exists() and ("/" not in source or named_like_a_path):
        raise HookedModelError(
            f"no model {source!r}: not a folder, not a .pth file, not a hub id (owner/name), and not one "
            f"that ships with the package: {', '.join(zoo.SHIPPED)}"
        )


def _other_form(source: str, options: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint, if the source is not one that transformers' Auto classes should load."""
    if Path(source).is_file():
        return checkpoints.from_blinkdl(source, checkpoints.read_tensors(Path(source)))
    revision = options.get("revision")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except TypeError:  # a number or null: of these it cannot say so
        raw = None
    except _UNREADABLE as error:
        raise _no_configuration(source, error) from error
    if not isinstance(raw, dict):
        raise HookedModelError(f"the config.json of {source} does not hold a JSON object: {{...}}")
    # By the type's name, for another package's class may answer to it and the hub's configurations name code.
    if raw.get("model_type") in checkpoints.FLA_TYPES:
        return checkpoints.from_fla(source, raw, _tensors(source, revision))
    if "ssm_cfg" in raw and not raw.get("model_type"):
        return checkpoints.from_mamba_ssm(source, raw, _tensors(source, revision))
    return None


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    # Left open, transformers would ask at the terminal.
    shared: dict[str, Any] = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    return shared if options.get("revision") is None else shared | {"revision": options["revision"]}


def _configuration(source: str, options: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **_shared(options))
    except _UNREADABLE as error:
        raise _no_configuration(source, error) from error
    text_config: Any = config.get_text_config()
    checkpoints.check_activation(source, getattr(text_config, "hidden_act", None))
    return config


def _text_model(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The text part of a checkpoint that was published with a vision tower, or None for any other.

    TransformerLens would load the whole of it, through an adapter of its own.
    """
    text_config: Any = getattr(config, "text_config", None)
    architecture = _TEXT_MODELS.get(getattr(text_config, "model_type", None))
    if architecture is None:
        return None
    text_config.architectures = [architecture]
    load = AutoModelForCausalLM.from_pretrained
    shared = _shared(options)
    return _placed(lambda **how: load(source, config=text_config, **shared, **how), options)


def _placed(load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A model with the dtype and on the device asked for.

    TransformerLens takes no placement along with a loaded model, it reads the model's own: so what says it
    is taken out of the options.
    """
    placement = {name: options.pop(name) for name in ("device_map", "max_memory") if name in options}
    model = load(dtype=options.get("dtype", torch.float32), attn_implementation="eager", **placement)
    if placement.get("device_map") is not None:
        return model
    device = options.get("device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def _dtype(given: object) -> torch.dtype:
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise HookedModelError(f"dtype {given!r} is unknown: give float32, bfloat16, float16 or float64")
    return dtype


def _no_configuration(source: str, error: Exception) -> HookedModelError:
    kind = "" if Path(source).exists() else " (no folder here, so taken for a hub id)"
    return HookedModelError(f"could not read the configuration of {source}{kind}: {one_line(error)}")


# Files of a local folder or a hub repository (with the login that huggingface_hub finds).


def _file(source: str, name: str, revision: str | None) -> Path | None:
    path = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        # Off line, what the cache lacks counts as missing.
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _tensors(source: str, revision: str | None) -> Tensors:
    """All weights of a folder or repository, in one file or in parts."""
    for name in _WEIGHTS:
        whole = _file(source, name, revision)
        if whole is not None:
            return checkpoints.read_tensors(whole)
        index = _file(source, f"{name}.index.json", revision)
        if index is None:
            continue
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(part).name != part for part in parts):
                raise ValueError("a part outside of the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HookedModelError(f"{index} does not say which tensors are where (weight_map)") from error
        tensors: Tensors = {}
        for part in parts:
            path = _file(source, part, revision)
            if path is None:
                raise HookedModelError(f"{source} lacks {part}, which its {index.name} names")
            tensors |= checkpoints.read_tensors(path)
        return tensors
    raise _no_weights(source)


def _no_weights(source: str) -> HookedModelError:
    return HookedModelError(f"{source} has no weights: neither {' nor '.join(_WEIGHTS)} was found")


# Tokenizers, for sources that do not tell transformers which one they need.


def _check_tokenizer(source: str, options: dict[str, Any]) -> None:
    """Refuse a source in Hugging Face form without a tokenizer: transformers would make an empty one up."""
    revision = options.get("revision")
    names = _VOCABULARIES + (("tokenizer_config.json",) if options.get("trust_remote_code") else ())
    found = next((path for name in names if (path := _file(source, name, revision))), None)
    if found is None:
        weights = (name + end for name in _WEIGHTS for end in ("", ".index.json"))
        if options.get("load_weights", True) and not any(_file(source, x, revision) for x in weights):
            raise _no_weights(source)
        raise _no_tokenizer(source, f"none of {', '.join(_VOCABULARIES)}")
    if found.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(found))
        except Exception as error:  # the tokenizers package raises no narrower one
            raise HookedModelError(f"{found} cannot be read as a tokenizer: {one_line(error)}") from error


def _tokenizer(source: str, checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    revision, vocabulary = options.get("revision"), checkpoint.config.vocab_size
    if not Path(source).is_file() and _file(source, "tokenizer.json", revision) is not None:
        return _fast_tokenizer(source, revision or "main")
    if not isinstance(checkpoint.config, RWKV7Config):
        if _file(source, "tokenizer_config.json", revision) is not None:
            raise _no_tokenizer(source, "only one in another form than tokenizer.json")
        try:
            return _fast_tokenizer(_MAMBA_SSM_TOKENIZER)
        except HookedModelError as error:
            why = f"and {_MAMBA_SSM_TOKENIZER}, which mamba_ssm uses, is out of reach"
            raise _no_tokenizer(source, why) from error
    if vocabulary not in _WORLD_SIZES:
        raise _no_tokenizer(source, f"and its vocabulary of {vocabulary} is not RWKV's World vocabulary")
    try:
        from hooked_models.files.world_tokenizer import (
            WorldTokenizer,  # needs a package that not all models do
        )
    except ImportError as error:
        raise _no_tokenizer(source, "and the package rwkv, which has RWKV's, is not installed") from error
    return WorldTokenizer()


def _fast_tokenizer(source: str, revision: str = "main") -> PreTrainedTokenizerBase:
    load = PreTrainedTokenizerFast.from_pretrained
    try:
        try:
            # As TransformerLens would, which otherwise loads it a second time by its own rules.
            return load(source, revision=revision, add_bos_token=True)
        except ValueError:  # it has no such token
            return load(source, revision=revision)
    except Exception as error:  # the tokenizers package raises no narrower one
        raise HookedModelError(f"could not load the tokenizer of {source}: {one_line(error)}") from error


def _no_tokenizer(source: str, why: str) -> HookedModelError:
    return HookedModelError(f"no tokenizer in {source}, {why}: pass tokenizer=...")
