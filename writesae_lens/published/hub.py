"""SAEs on the Hugging Face Hub: SAELens's own download functions, taught the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading import pretrained_sae_loaders as saelens
from sae_lens.util import str_to_dtype

from hooked_models.errors import HookedModelError, one_line
from writesae_lens.errors import WriteSAEError
from writesae_lens.published import checkpoints, manifest
from writesae_lens.published.checkpoints import FILE
from writesae_lens.published.releases import REPOSITORY, releases

_R = TypeVar("_R")
Loaded = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]


# Of the HTTP client underneath, which differs by version: what it raises beside the Hub's answers.
_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]


@contextmanager
def transport_errors(what: str) -> Iterator[None]:
    """Say in one line of this package's that a connection broke; the Hub's own answers stay as they are."""
    try:
        yield
    except (OSError, EntryNotFoundError, HookedModelError):
        raise
    except (_TRANSPORT, ValueError) as error:  # ValueError: of names that no repository or file can have
        why = f"{type(error).__name__}: {one_line(error)}"
        raise WriteSAEError(f"{what} failed ({why}): check the names, or try again") from error


def fetch(
    repo_id: str,
    folder: str,
    revision: str | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Download one checkpoint (or find it in the cache) and check it against the repository's manifest.

    Args:
        repo_id: owner/name.
        folder: path in the repository, of a folder that holds a ``best.pt`` or of a file.
        revision: branch, tag or commit.
        force_download: fetch again what the cache has.
        local_files_only: look in the cache alone.

    Returns:
        the file, and where it is from: repository, revision (the commit), file, SHA-256 and whether the
        manifest vouches for it.

    Raises:
        EntryNotFoundError: there is no such file; `huggingface_hub`'s other errors for a repository that
            does not exist or is gated, and for a Hub out of reach.
        WriteSAEError: the download broke off, or the manifest has another SHA-256 or cannot be read.
    """

    def download(name: str, revision: str | None) -> Path:
        with transport_errors(f"fetching {name} of {repo_id}"):
            return Path(
                hf_hub_download(
                    repo_id,
                    name,
                    revision=revision,
                    force_download=force_download and not local_files_only,
                    local_files_only=local_files_only,
                )
            )

    folder = folder.strip("/")
    name = folder if Path(folder).suffix in (".pt", ".pth", ".bin") else f"{folder}/{FILE}"
    try:
        path = download(name, revision)
    except EntryNotFoundError:
        files = _cached(repo_id, revision) if local_files_only else _files(repo_id, revision)
        below = _files_below(files, folder)
        if len(below) != 1:
            raise
        name = below[0]
        path = download(name, revision)
    commit = path.parts[-1 - len(Path(name).parts)]
    try:
        listed = download(manifest.MANIFEST, commit)
    except EntryNotFoundError:
        listed = None
    digest = manifest.sha256(path)
    return path, {
        "repository": repo_id,
        "revision": commit,
        "file": name,
        "sha256": digest,
        "sha256_checked": listed is not None and manifest.check(listed, name, digest),
    }


def _files(repo_id: str, revision: str | None = None) -> dict[str, int]:
    """Files of a repository and their sizes, of those in the cache where the Hub cannot be asked."""
    try:
        listed = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=3).siblings
        return {file.rfilename: file.size or 0 for file in listed or ()}
    except Exception:  # whatever the HTTP client raises: this is a second try, or a table's column
        return {name: path.stat().st_size for name, path in _cached(repo_id, revision).items()}


def _cached(repo_id: str, revision: str | None = None) -> dict[str, Path]:
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (OSError, ValueError, EntryNotFoundError):
        return {}
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob(FILE)}


def _files_below(files: Iterable[str], folder: str) -> list[str]:
    return [name for name in files if name.startswith(f"{folder}/") and name.endswith(f"/{FILE}")]


def fetch_config(
    repo_id: str, folder: str, revision: str | None = None, force_download: bool = False
) -> dict[str, Any]:
    """Fetch an SAE, published or in SAELens's form, read all of it, and give its configuration."""
    try:
        path, provenance = fetch(repo_id, folder, revision, force_download)
    except EntryNotFoundError as missing:
        unreached = isinstance(missing, LocalEntryNotFoundError)
        try:
            with transport_errors(f"fetching {folder} of {repo_id}"):
                for name in (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME):
                    file = f"{folder.strip('/')}/{name}"
                    path = hf_hub_download(repo_id, file, revision=revision, local_files_only=unreached)
        except EntryNotFoundError:
            raise missing from None
        return SAE.load_from_disk(Path(path).parent).cfg.to_dict()
    return checkpoints.load(path, checkpoints.Source(provenance=provenance))[0]


def published_table() -> pd.DataFrame:
    """The published SAEs: release, id, base model, cell, size, and whether it is in the cache.

    Sizes are asked of the Hub, or of the cache where that is out of reach.
    """
    sizes, cached = _files(REPOSITORY), _cached(REPOSITORY)
    rows = []
    for name, release in releases().items():
        for sae_id, folder in release.saes_map.items():
            size = next((sizes[file] for file in _files_below(sizes, folder)), 0)
            layer, head = re.findall(r"\d+", sae_id)
            rows.append(
                {
                    "release": name,
                    "id": sae_id,
                    "base model": release.model,
                    "cell": f"{layer}:{head}",
                    "size": f"{size / 1e6:.1f} MB" if size else "?",
                    "cached": "yes" if _files_below(cached, folder) else "no",
                }
            )
    return pd.DataFrame(rows)


def load_published(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """A published checkpoint from the Hub, in the form of SAELens's loaders."""
    path, provenance = fetch(repo_id, folder_name, None, force_download, local_files_only)
    cfg, weights = checkpoints.load(path, checkpoints.Source(provenance=provenance))
    given = {name: value for name, value in (cfg_overrides or {}).items() if value is not None}
    cfg |= {"device": device} | given
    dtype = str_to_dtype(cfg["dtype"])
    return cfg, {name: x.to(device, dtype) for name, x in weights.items()}, None


def published_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Its configuration alone, which lies in the same file."""
    cfg = load_published(repo_id, folder_name, "cpu", force_download, cfg_overrides, local_files_only)[0]
    return cfg | ({} if device is None else {"device": device})


def _either(ours: Callable[..., _R], theirs: Callable[..., _R], arguments: tuple[Any, ...]) -> _R:
    """What SAELens's function finds; where it finds none of its files, what ours does."""
    try:
        return theirs(*arguments)
    except EntryNotFoundError as missing:
        try:
            # The Hub that SAELens did not reach is not waited for a second time.
            return ours(*arguments, local_files_only=isinstance(missing, LocalEntryNotFoundError))
        except EntryNotFoundError:
            raise missing from None


def load_any(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """SAELens's own loader; where it finds none of its files, a published checkpoint."""
    arguments = (repo_id, folder_name, device, force_download, cfg_overrides)
    return _either(load_published, saelens.sae_lens_huggingface_loader, arguments)


def any_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """As `load_any`, for the configuration alone."""
    arguments = (repo_id, folder_name, device, force_download, cfg_overrides)
    return _either(published_config, saelens.get_sae_lens_config_from_hf, arguments)
