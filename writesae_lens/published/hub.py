"""SAEs on the Hugging Face Hub: published checkpoints, through SAELens's own download functions."""

from __future__ import annotations

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
from safetensors import SafetensorError

from hooked_models.errors import HookedModelError, one_line
from writesae_lens.errors import WriteSAEError
from writesae_lens.published import checkpoints, manifest
from writesae_lens.published.checkpoints import FILE
from writesae_lens.published.conversion import Source
from writesae_lens.published.releases import REPOSITORY, cell_of_path, releases

_R = TypeVar("_R")
Loaded = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]

# The exception of the HTTP client underneath huggingface_hub (which client differs by version).
_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]


@contextmanager
def transport_errors(what: str) -> Iterator[None]:
    """Turn a broken connection into a `WriteSAEError`; the Hub's own answers (404, 401, ...) pass unchanged.

    Args:
        what: the action, for the message: ``"fetching best.pt of owner/name"``.
    """
    try:
        yield
    except (OSError, EntryNotFoundError, HookedModelError):
        raise
    except (_TRANSPORT, ValueError) as error:  # ValueError: the name cannot be a repository's or file's
        why = f"{type(error).__name__}: {one_line(error)}"
        raise WriteSAEError(f"{what} failed ({why}): check the names, or try again") from error


def fetch(
    repo_id: str,
    folder: str,
    revision: str | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Download one checkpoint, or find it in the cache, and check it against the repository's manifest.

    Args:
        repo_id: owner/name.
        folder: the path in the repository of a file, or of a folder with a ``best.pt`` in it or below it.
        revision: branch, tag or commit.
        force_download: download again even if the cache has the file.
        local_files_only: look in the cache alone.

    Returns:
        the file, and its provenance: repository, revision (the commit), file, SHA-256 and whether the
        manifest lists that SHA-256.

    Raises:
        EntryNotFoundError: there is no such file. `huggingface_hub` raises its other errors for a repository
            that does not exist or is gated, and for a Hub out of reach.
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
        manifest_file = download(manifest.MANIFEST, commit)
    except EntryNotFoundError:
        manifest_file = None
    digest = manifest.sha256(path)
    return path, {
        "repository": repo_id,
        "revision": commit,
        "file": name,
        "sha256": digest,
        "sha256_checked": manifest_file is not None and manifest.check(manifest_file, name, digest),
    }


def _files(repo_id: str, revision: str | None = None) -> dict[str, int]:
    """The files of a repository and their sizes; where the Hub cannot be asked, those in the cache."""
    try:
        listed = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=3).siblings
        return {file.rfilename: file.size or 0 for file in listed or ()}
    except Exception:  # of any HTTP client: the caller can do with the cache's files
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
    """The configuration of an SAE on the Hub, published or in SAELens's form; all of the SAE is read.

    Raises:
        EntryNotFoundError: there is neither a checkpoint nor an SAE in SAELens's form; otherwise as `fetch`.
    """
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
    return checkpoints.load(path, Source(provenance=provenance))[0]


def published_table() -> pd.DataFrame:
    """A table of the published SAEs: release, id, base model, cell (layer:head), size, in the cache or not.

    Sizes come from the Hub or, where the Hub is out of reach, from the cache.
    """
    sizes, cached = _files(REPOSITORY), _cached(REPOSITORY)
    rows = []
    for name, release in releases().items():
        for sae_id, folder in release.saes_map.items():
            size = next((sizes[file] for file in _files_below(sizes, folder)), 0)
            cell = cell_of_path(sae_id)
            assert cell is not None
            rows.append(
                {
                    "release": name,
                    "id": sae_id,
                    "base model": release.model,
                    "cell": f"{cell[0]}:{cell[1]}",
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
    cfg, weights = checkpoints.load(path, Source(provenance=provenance))
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
    """The configuration of a published checkpoint, in the form of SAELens's loaders of configurations."""
    cfg = load_published(repo_id, folder_name, "cpu", force_download, cfg_overrides, local_files_only)[0]
    return cfg | ({} if device is None else {"device": device})


def _either(ours: Callable[..., _R], theirs: Callable[..., _R], arguments: tuple[Any, ...]) -> _R:
    """The result of SAELens's function or, where it finds none of its files, of ours."""
    try:
        return theirs(*arguments)
    except EntryNotFoundError as missing:
        try:
            # If SAELens did not reach the Hub, only the cache is searched: no second wait for the Hub.
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
    """An SAE in SAELens's form by SAELens's own loader or, where there is none, a published checkpoint."""
    arguments = (repo_id, folder_name, device, force_download, cfg_overrides)
    try:
        loaded = _either(load_published, saelens.sae_lens_huggingface_loader, arguments)
    except SafetensorError as error:
        raise WriteSAEError(
            f"{folder_name} of {repo_id} is truncated or damaged ({one_line(error)})"
        ) from error
    cfg, _, sparsity = loaded
    if sparsity is not None and list(sparsity.shape) != [cfg["d_sae"]]:
        raise WriteSAEError(
            f"{folder_name} of {repo_id} has {cfg['d_sae']} atoms, but a sparsity of shape "
            f"{list(sparsity.shape)}: its files do not belong together"
        )
    return loaded


def any_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration alone of the SAE that `load_any` loads."""
    arguments = (repo_id, folder_name, device, force_download, cfg_overrides)
    return _either(published_config, saelens.get_sae_lens_config_from_hf, arguments)
