"""Where a model comes from: which paths and names can be one, and the files of a folder or hub repository."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import cached_file

from hooked_models import zoo
from hooked_models.errors import HookedModelError
from hooked_models.files.layouts import Tensors, read_tensors

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_source(source: str) -> None:
    """Refuse a source that cannot be a model, before anything is asked of the hub.

    Raises:
        HookedModelError: it is a file inside a model's folder, a folder without ``config.json``, or neither a
            path that exists nor a hub id.
    """
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


def find_file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a local folder or a hub repository (None: it has no such file).

    The hub is asked with the login that huggingface_hub finds. Offline, a file that is not in the cache
    counts as missing.
    """
    path = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def read_weights(source: str, revision: str | None) -> Tensors:
    """All weights of a folder or repository, from one file or several.

    Raises:
        HookedModelError: there are no weights, a file of several is missing, or one cannot be read.
    """
    for name in _WEIGHTS:
        whole = find_file(source, name, revision)
        if whole is not None:
            return read_tensors(whole)
        index = find_file(source, f"{name}.index.json", revision)
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
            path = find_file(source, part, revision)
            if path is None:
                raise HookedModelError(f"{source} lacks {part}, which its {index.name} names")
            tensors |= read_tensors(path)
        return tensors
    raise no_weights(source)


def has_weights(source: str, revision: str | None) -> bool:
    """Whether a folder or repository has weights, in one file or several."""
    files = (name + end for name in _WEIGHTS for end in ("", ".index.json"))
    return any(find_file(source, file, revision) for file in files)


def no_weights(source: str) -> HookedModelError:
    """The error for a source without weights."""
    return HookedModelError(f"{source} has no weights: neither {' nor '.join(_WEIGHTS)} was found")
