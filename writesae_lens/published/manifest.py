"""``manifest.json``: what a repository of checkpoints says of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from writesae_lens.errors import WriteSAEError

MANIFEST = "manifest.json"
_LARGEST = 4 * 2**20
_DIGEST = re.compile("(?:sha256:)?([0-9a-fA-F]{64})")
# What a digest and a file's name may be called, in an entry of their own.
_FIELDS = {"sha256", "sha_256", "hash", "digest", "checksum"}
_NAMES = ("tag", "path", "file", "filename", "name")


def check(manifest: Path, file: str, found: str) -> bool:
    """Whether a manifest vouches for a file.

    Args:
        manifest: JSON with a SHA-256 beside each tag, at any depth. A file's tag is its path in the
            repository or its folder's, in any punctuation.
        file: the file's path in the repository.
        found: its SHA-256.

    Returns:
        True if the file's tag has this SHA-256, or, where no tag is the file's, another one has.

    Raises:
        WriteSAEError: the file's tag has another SHA-256, or two; or the manifest cannot be read.
    """
    if manifest.stat().st_size > _LARGEST:
        raise WriteSAEError(f"{manifest} has more than {_LARGEST:,} bytes: not a manifest")
    try:
        listed = list(_digests(json.loads(manifest.read_text(encoding="utf-8")), ()))
    except (ValueError, RecursionError) as error:
        raise WriteSAEError(f"{manifest} is not JSON: {file} cannot be checked against it") from error
    names = {file, file.rpartition("/")[0]}
    for same in (lambda tag: tag in names, lambda tag: _plain(tag) in {_plain(name) for name in names}):
        said = {digest for tags, digest in listed if any(same(tag) for tag in tags)}
        if said - {found}:
            expected = " and ".join(sorted(said))
            raise WriteSAEError(
                f"{file} has SHA-256 {found}, but {MANIFEST} says {expected}: damaged on the way, or "
                "changed; fetch it again (force_download=True), and if that does not help do not use it"
            )
        if said:
            return True
    return any(digest == found for _, digest in listed)


def _digests(held: Any, keys: tuple[str, ...]) -> Iterator[tuple[list[str], str]]:
    """Every SHA-256, with what may be the tag that it belongs to."""
    if isinstance(held, list):
        for item in held:
            yield from _digests(item, keys)
    if not isinstance(held, dict):
        return
    named = [held[name] for name in _NAMES if isinstance(held.get(name), str)]
    for key, value in held.items():
        here = keys if _plain(key) in _FIELDS else (*keys, key)
        digest = _DIGEST.fullmatch(value) if isinstance(value, str) else None
        if digest is None:
            yield from _digests(value, here)
        else:
            yield named + ["/".join(here[n:]) for n in range(len(here))], digest[1].lower()


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain(tag: str) -> str:
    return re.sub(r"[\W_]+", "_", tag).strip("_").lower()
