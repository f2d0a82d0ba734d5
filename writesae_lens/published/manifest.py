"""``manifest.json``: the SHA-256 of every file in a repository of checkpoints."""

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
# Keys of a digest and of a file's name, where an entry of the manifest has keys for them.
_FIELDS = {"sha256", "sha_256", "hash", "digest", "checksum"}
_NAMES = ("tag", "path", "file", "filename", "name")


def check(manifest: Path, file: str, digest: str) -> bool:
    """Whether a manifest lists a file with this SHA-256.

    Args:
        manifest: JSON with a SHA-256 beside each tag, at any depth. A file's tag is its path in the
            repository or its folder's, in any punctuation.
        file: the file's path in the repository.
        digest: the file's SHA-256.

    Returns:
        True if the file's tag has this SHA-256 or, in a manifest without a tag for the file, any tag has.

    Raises:
        WriteSAEError: the file's tag has another SHA-256, or two; or the manifest cannot be read.
    """
    if manifest.stat().st_size > _LARGEST:
        raise WriteSAEError(f"{manifest} has more than {_LARGEST:,} bytes: not a manifest")
    try:
        entries = list(_digests(json.loads(manifest.read_text(encoding="utf-8")), ()))
    except (ValueError, RecursionError) as error:
        raise WriteSAEError(f"{manifest} is not JSON: {file} cannot be checked against it") from error
    names = {file, file.rpartition("/")[0]}
    for same in (lambda tag: tag in names, lambda tag: _plain(tag) in {_plain(name) for name in names}):
        listed = {entry for tags, entry in entries if any(same(tag) for tag in tags)}
        if listed - {digest}:
            expected = " and ".join(sorted(listed))
            raise WriteSAEError(
                f"{file} has SHA-256 {digest}, but {MANIFEST} says {expected}: damaged on the way, or "
                "changed; fetch it again (force_download=True), and if that does not help do not use it"
            )
        if listed:
            return True
    return any(entry == digest for _, entry in entries)


def _digests(content: Any, keys: tuple[str, ...]) -> Iterator[tuple[list[str], str]]:
    """Every SHA-256 in a manifest, each with all strings that may be its tag.

    Args:
        content: the manifest, or a part of it.
        keys: the keys that lead to this part.
    """
    if isinstance(content, list):
        for item in content:
            yield from _digests(item, keys)
    if not isinstance(content, dict):
        return
    named = [content[name] for name in _NAMES if isinstance(content.get(name), str)]
    for key, value in content.items():
        here = keys if _plain(key) in _FIELDS else (*keys, key)
        digest = _DIGEST.fullmatch(value) if isinstance(value, str) else None
        if digest is None:
            yield from _digests(value, here)
        else:
            yield named + ["/".join(here[n:]) for n in range(len(here))], digest[1].lower()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain(tag: str) -> str:
    """A tag in lower case, with one ``_`` for any punctuation."""
    return re.sub(r"[\W_]+", "_", tag).strip("_").lower()
