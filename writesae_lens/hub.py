"""SAEs on the Hugging Face Hub: SAELens's own download functions, taught the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from sae_lens.loading import pretrained_sae_loaders as saelens
from sae_lens.util import str_to_dtype

from hooked_models.errors import one_line
from writesae_lens import checkpoints, manifest
from writesae_lens.checkpoints import FILE
from writesae_lens.errors import WriteSAEError
from writesae_lens.releases import REPOSITORY, releases

Loaded = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]


# Of the HTTP client underneath, which differs by version: what it raises beside the Hub's answers.
_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]


@contextmanager
def transport_errors(what: str) -> Iterator[None]:
    """Say in one line of this package's that a connection broke; the Hub's own answers stay as they are."""
    try:
        yield
    except (OSError, EntryNotFoundError):
        raise
    except _TRANSPORT as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise WriteSAEError(f"{what} broke off ({why}): try again") from error


def fetch(
    repo_id: str, folder: str, revision: str | None = None, force_download: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Download one checkpoint (or find it in the cache) and check it against the repository's manifest.

    Args:
        repo_id: owner/name.
        folder: path in the repository, of a folder that holds a ``best.pt`` or of a file.
        revision: branch, tag or commit.
        force_download: fetch again what the cache has.

    Returns:
        the file, and where it is from: repository, revision (the commit), path, SHA-256 and whether the
        manifest vouches for it.

    Raises:
        EntryNotFoundError: there is no such file; `huggingface_hub`'s other errors for a repository that
            does not exist or is gated, and for a Hub out of reach.
        WriteSAEError: the download broke off, or the manifest has another SHA-256 or cannot be read.
    """

    def download(name: str, revision: str | None) -> Path:
        with transport_errors(f"fetching {name} of {repo_id}"):
            return Path(hf_hub_download(repo_id, name, revision=revision, force_download=force_download))

    name = folder if Path(folder).suffix in (".pt", ".pth", ".bin") else f"{folder}/{FILE}"
    try:
        path = download(name, revision)
    except EntryNotFoundError:
        name = _only_file(repo_id, folder, revision)
        if name is None:
            raise
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


def _only_file(repo_id: str, folder: str, revision: str | None) -> str | None:
    """The one checkpoint somewhere below a folder, if the Hub can be asked and there is just one."""
    try:
        names = HfApi().list_repo_files(repo_id, revision=revision)
    except (HfHubHTTPError, OSError):
        return None
    below = [name for name in names if name.startswith(f"{folder}/") and name.endswith(f"/{FILE}")]
    return below[0] if len(below) == 1 else None


def fetch_config(
    repo_id: str, folder: str, revision: str | None = None, force_download: bool = False
) -> dict[str, Any]:
    """`fetch` a checkpoint, read all of it, and give what became its configuration."""
    path, provenance = fetch(repo_id, folder, revision, force_download)
    return checkpoints.load(path, checkpoints.Source(provenance=provenance))[0]


def published_table() -> pd.DataFrame:
    """The published SAEs: release, id, base model, cell, size, and whether it is in the cache.

    Sizes are asked of the Hub, or of the cache where that is out of reach.
    """
    try:
        listed = HfApi().model_info(REPOSITORY, files_metadata=True, timeout=3).siblings or []
    except Exception:  # whatever the HTTP client raises: a listing is not worth an error
        listed = []
    sizes = {file.rfilename: file.size for file in listed}
    rows = []
    for name, release in releases().items():
        for sae_id, folder in release.saes_map.items():
            file = f"{folder}/{FILE}"
            cached = try_to_load_from_cache(REPOSITORY, file)
            cached = Path(cached) if isinstance(cached, str) else None
            size = sizes.get(file) or (cached.stat().st_size if cached else None)
            layer, head = re.findall(r"\d+", sae_id)
            rows.append(
                {
                    "release": name,
                    "id": sae_id,
                    "base model": release.model,
                    "cell": f"{layer}:{head}",
                    "size": f"{size / 1e6:.1f} MB" if size else "?",
                    "cached": "yes" if cached else "no",
                }
            )
    return pd.DataFrame(rows)


def load_published(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """A published checkpoint from the Hub, in the form of SAELens's loaders."""
    path, provenance = fetch(repo_id, folder_name, force_download=force_download)
    cfg, weights = checkpoints.load(path, checkpoints.Source(provenance=provenance))
    given = {name: value for name, value in (cfg_overrides or {}).items() if value is not None}
    cfg |= {"device": device} | given
    dtype = str_to_dtype(cfg["dtype"])
    return cfg, {name: x.to(device, dtype) for name, x in weights.items()}, None


def published_config(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Its configuration alone, which lies in the same file."""
    return load_published(*args, **kwargs)[0]


def load_any(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """SAELens's own loader; where it finds none of its files, a published checkpoint."""
    arguments = (repo_id, folder_name, device, force_download, cfg_overrides)
    try:
        return saelens.sae_lens_huggingface_loader(*arguments)
    except EntryNotFoundError as missing:
        try:
            return load_published(*arguments)
        except EntryNotFoundError:
            raise missing from None


def any_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """As `load_any`, for the configuration alone."""
    try:
        return saelens.get_sae_lens_config_from_hf(
            repo_id, folder_name, device, force_download, cfg_overrides
        )
    except EntryNotFoundError as missing:
        try:
            return published_config(repo_id, folder_name, device or "cpu", force_download, cfg_overrides)
        except EntryNotFoundError:
            raise missing from None
