"""SAE folders in SAELens's form, which may come from strangers: checked before SAELens reads them.

SAELens's loaders call the two functions in `REPLACEMENTS` for ``cfg.json`` and for the weights, from disk and
from the Hub. What is wrong with the files is said in one line, a `WriteSAEError`. SAEs that belong to no
`HookedRecurrent` are checked for what all of them share; the rest is left to SAELens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors import safe_open
from torch import Tensor

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.json_files import read_json
from hooked_models.files.layouts.checkpoint import check_header, damaged, not_finite
from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.config import ARCHITECTURE

# Fields of the metadata by what they must be, where they are not null.
_KINDS: dict[str, tuple[type, ...]] = dict.fromkeys(("model_name", "hook_name", "model_class_name"), (str,))
_KINDS |= {"prepend_bos": (bool,), "model_from_pretrained_kwargs": (dict,), "sae_lens_version": (str,)}
# The same, of SAEs on a `HookedRecurrent` alone.
_OUR_KINDS: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("sparsity", "provenance", "published_config"), (dict,)
)
_OUR_KINDS |= dict.fromkeys(("layer", "head", "context_size", "d_k", "d_v"), (int,))
_OUR_KINDS |= dict.fromkeys(("orientation", "sae_type"), (str,))
_NAMES = {str: "a text", bool: "true or false", int: "a whole number from 0", dict: "an object {...}"}
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_STORED = ("F32", "F16", "BF16", "F64")


def get_sae_lens_config_from_disk(original: Any, path: str | Path, *args: Any, **kwargs: Any) -> Any:
    """SAELens's reading of ``cfg.json``, once the file has passed `check_config`."""
    file = Path(path) / SAE_CFG_FILENAME
    if file.exists():  # SAELens says that it is missing
        check_config(file)
    return original(path, *args, **kwargs)


def read_sae_components_from_disk(
    original: Any, cfg_dict: dict[str, Any], weight_path: str | Path, *args: Any, **kwargs: Any
) -> Any:
    """SAELens's reading of the weights, with one line for damaged ones.

    Raises:
        WriteSAEError: the file is no plain file, or damaged; or the SAE is for a `HookedRecurrent`, and its
            weights are not floating-point, not finite or, of a flat SAE, of other sizes than ``cfg.json``'s.
    """
    path = Path(weight_path)
    if not path.exists():
        return original(cfg_dict, weight_path, *args, **kwargs)
    if not path.is_file():
        raise WriteSAEError(f"{path} is {'a folder' if path.is_dir() else 'no plain file'}: expected weights")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            found = {name: (x.get_dtype(), list(x.get_shape())) for name, x in slices.items()}
    except HookedModelError as error:
        raise WriteSAEError(str(error)) from error
    except Exception as error:  # which one depends on where the damage is
        raise WriteSAEError(str(damaged(path, error))) from error
    if not _is_ours(cfg_dict):
        return original(cfg_dict, weight_path, *args, **kwargs)
    _check_stored(path, cfg_dict, found)
    cfg, state = original(cfg_dict, weight_path, *args, **kwargs)
    wrong = not_finite({name: x for name, x in state.items() if isinstance(x, Tensor)})
    if wrong:
        raise WriteSAEError(f"{path} has NaN or infinite numbers in {', '.join(n[:40] for n in wrong[:4])}")
    return cfg, state


REPLACEMENTS = (get_sae_lens_config_from_disk, read_sae_components_from_disk)


def check_config(file: Path) -> None:
    """Refuse a ``cfg.json`` that cannot be an SAE's.

    Raises:
        WriteSAEError: it is not JSON, too large or no object; its architecture is unknown; its metadata has
            fields of another type than they must have; or it is a WriteSAE's without its sizes.
    """
    try:
        cfg = read_json(file)
    except HookedModelError as error:
        raise WriteSAEError(str(error)) from error
    if not isinstance(cfg, dict):
        raise WriteSAEError(f"{file} holds a {type(cfg).__name__}: expected an SAE's configuration, {{...}}")
    architecture = cfg.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        raise WriteSAEError(
            f"{file} has architecture {str(architecture)[:40]!r}: known are {', '.join(SAE_CLASS_REGISTRY)}"
        )
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, dict):
        raise WriteSAEError(f"{file} has a {type(metadata).__name__} as metadata: expected an object {{...}}")
    reserved = [name for name in metadata if hasattr(SAEMetadata, name)]
    if reserved:
        raise WriteSAEError(f"{file} has a field {reserved[0][:40]!r} in its metadata: that name is taken")
    _check_kinds(file, metadata, _KINDS | (_OUR_KINDS if _is_ours(cfg) else {}))
    for place in (cfg, metadata):
        _check_version(file, place.get("sae_lens_version"))
    if _is_ours(cfg):
        _check_ours(file, cfg)


def _is_ours(cfg: dict[str, Any]) -> bool:
    """Whether a configuration is of an SAE for a `HookedRecurrent`, a WriteSAE or flat."""
    metadata = cfg.get("metadata")
    of_ours = isinstance(metadata, dict) and metadata.get("model_class_name") == "HookedRecurrent"
    return cfg.get("architecture") == ARCHITECTURE or of_ours


def _check_kinds(file: Path, metadata: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> None:
    for name, wanted in kinds.items():
        value = metadata.get(name)
        fits = type(value) in wanted and (type(value) is not int or 0 <= value < 2**31)
        if value is not None and not fits:
            expected = " or ".join(_NAMES[kind] for kind in wanted)
            raise WriteSAEError(
                f"{file} has metadata.{name} = {str(value)[:40]!r} ({type(value).__name__}): expected "
                f"{expected}"
            )


def _check_version(file: Path, version: Any) -> None:
    if version is None:
        return
    try:
        Version(version)
    except (InvalidVersion, TypeError) as error:
        raise WriteSAEError(
            f"{file} has sae_lens_version = {str(version)[:40]!r}: {one_line(error)[:80]}"
        ) from error


def _check_ours(file: Path, cfg: dict[str, Any]) -> None:
    flat = cfg.get("architecture") != ARCHITECTURE
    for name in ("d_in", "d_sae") if flat else ("d_k", "d_v", "d_sae"):
        value = cfg.get(name)
        # The range of a WriteSAE's own is checked by its configuration.
        if value is None or (flat and (type(value) is not int or value < 1)):
            raise WriteSAEError(f"{file} has {name} = {str(value)[:40]!r}: expected a whole number above 0")
    dtype = cfg.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in _DTYPES:
        raise WriteSAEError(f"{file} has dtype = {str(dtype)[:40]!r}: expected one of {', '.join(_DTYPES)}")
    if not isinstance(cfg.get("device", "cpu"), str):
        raise WriteSAEError(f"{file} has device = {str(cfg['device'])[:40]!r}: expected a text such as 'cpu'")


def _check_stored(path: Path, cfg: dict[str, Any], found: dict[str, tuple[str, list[int]]]) -> None:
    """Refuse weights that are not floating-point and, of a flat SAE, of other sizes than it declares."""
    others = [f"{name[:40]} ({dtype})" for name, (dtype, _) in found.items() if dtype not in _STORED]
    if others:
        raise WriteSAEError(f"{path} must hold floating-point numbers, but has {', '.join(others[:4])}")
    if cfg.get("architecture") == ARCHITECTURE:  # compared with all its parameters once it is built
        return
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    for name, shape in shapes.items():
        stored = found.get(name, ("", None))[1]
        if stored != shape:
            raise WriteSAEError(
                f"{path} has {name} of shape {'missing' if stored is None else stored}, but cfg.json says "
                f"{shape}"
            )
