"""Where a model comes from: which paths and names can be one, and the files of a folder or hub repository."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

from hooked_models import zoo
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.json_files import LARGEST, LARGEST_INDEX, check_json_size, read_json
from hooked_models.files.layouts import Tensors, read_tensors

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Those that transformers reads. (The tokenizers package reads tokenizer.json, which may be large.)
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_JSON_FILES += ("added_tokens.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


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


def check_json_files(source: str, revision: str | None) -> None:
    """Refuse JSON files of a folder or repository that are larger than any of their kind.

    transformers reads them, and a file of brackets takes some 25 times its size once it is read.

    Raises:
        HookedModelError: one is, or is no plain file.
    """
    for name in _JSON_FILES:
        local = Path(source) / name
        # transformers takes a pipe or a folder for missing.
        path = local if local.exists() else find_file(source, name, revision)
        if path is not None:
            check_json_size(path, LARGEST_INDEX if name.endswith(".index.json") else LARGEST)


def weight_files(source: str, revision: str | None) -> list[Path]:
    """The files of all weights of a folder or repository, one or several (none: it has no weights).

    Raises:
        HookedModelError: a file of several is missing, or their index cannot be read.
    """
    for name in _WEIGHTS:
        whole = find_file(source, name, revision)
        if whole is not None:
            return [whole]
        index = find_file(source, f"{name}.index.json", revision)
        if index is not None:
            files = {part: find_file(source, part, revision) for part in _parts(index)}
            missing = next((part for part, path in files.items() if path is None), None)
            if missing is not None:
                raise HookedModelError(f"{source} lacks {missing}, which its {index.name} names")
            return [path for path in files.values() if path is not None]
    return []


def _parts(index: Path) -> list[str]:
    """The names of the files of weights that an index lists."""
    content = read_json(index, LARGEST_INDEX)
    try:
        parts = sorted(set(content["weight_map"].values()))
        if any(Path(part).name != part or part in ("..", "") for part in parts):
            raise ValueError("a part outside of the folder")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise HookedModelError(
            f"{index} does not say which tensors are where (weight_map): {one_line(error)}"
        ) from error
    return parts


def read_weights(source: str, revision: str | None) -> Tensors:
    """All weights of a folder or repository, from one file or several.

    Raises:
        HookedModelError: there are no weights, a file of several is missing, or one cannot be read.
    """
    tensors: Tensors = {}
    for path in weight_files(source, revision):
        tensors |= read_tensors(path)
    if not tensors:
        raise no_weights(source)
    return tensors


def has_weights(source: str, revision: str | None) -> bool:
    """Whether a folder or repository has weights, in one file or several."""
    files = (name + end for name in _WEIGHTS for end in ("", ".index.json"))
    return any(find_file(source, file, revision) for file in files)


def no_weights(source: str) -> HookedModelError:
    """The error for a source without weights."""
    return HookedModelError(f"{source} has no weights: neither {' nor '.join(_WEIGHTS)} was found")
