"""``manifest.json``: what a repository of checkpoints says of its files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from writesae_lens.errors import WriteSAEError

MANIFEST = "manifest.json"
_LARGEST = 4 * 2**20


class Entry(NamedTuple):
    """What a manifest says of one file; None where it does not."""

    sha256: str | None
    size: int | None


def entry_of(manifest: Path, file: str) -> Entry:
    """What a manifest says of a file.

    Args:
        manifest: a JSON object of tags, each with ``sha256``, ``size`` and more.
        file: the file's path in the repository; its tag is this path or its folder, in any punctuation.

    Raises:
        WriteSAEError: the manifest cannot be read, or has something else where the file's SHA-256 belongs.
    """
    if manifest.stat().st_size > _LARGEST:
        raise WriteSAEError(f"{manifest} has more than {_LARGEST:,} bytes: not a manifest")
    try:
        held = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WriteSAEError(f"{manifest} is not JSON: {file} cannot be checked against it") from error
    names = {_plain(file), _plain(file.rpartition("/")[0])}
    # Tags stand at the top, or below one word such as "checkpoints".
    for tags in (held, *(held.values() if isinstance(held, dict) else ())):
        for tag, said in tags.items() if isinstance(tags, dict) else ():
            if _plain(tag) in names:
                return _entry(manifest, file, said if isinstance(said, dict) else {"sha256": said})
    return Entry(None, None)


def check(manifest: Path, file: str, found: str) -> bool:
    """Whether a manifest vouches for a file with this SHA-256; False if it does not speak of it.

    Raises:
        WriteSAEError: it names another SHA-256, or cannot be read.
    """
    expected = entry_of(manifest, file).sha256
    if expected not in (None, found):
        raise WriteSAEError(
            f"{file} has SHA-256 {found}, but {MANIFEST} says {expected}: damaged on the way, or changed; "
            "fetch it again (force_download=True), and if that does not help do not use it"
        )
    return expected is not None


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain(tag: str) -> str:
    return re.sub(r"[\W_]+", "_", tag).strip("_").lower()


def _entry(manifest: Path, file: str, said: dict[str, Any]) -> Entry:
    named = {_plain(name): value for name, value in said.items()}
    digest, size = named.get("sha256", named.get("sha_256")), named.get("size", named.get("size_bytes"))
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-fA-F]{64}", digest)):
        raise WriteSAEError(f"{manifest} has {str(digest)[:70]!r} where the SHA-256 of {file} belongs")
    return Entry(digest and digest.lower(), size if type(size) is int else None)
