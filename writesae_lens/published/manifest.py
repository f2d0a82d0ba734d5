"""``manifest.json``: the SHA-256 of every file in a repository of checkpoints."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from hooked_models.errors import HookedModelError
from hooked_models.files.json_files import read_json
from writesae_lens.errors import WriteSAEError

MANIFEST = "manifest.json"
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
    listing = _Listing({file, file.rpartition("/")[0]} - {""})
    try:
        listing.read(read_json(manifest), _Tags(frozenset(), frozenset()))
    except RecursionError as error:
        raise WriteSAEError(
            f"{manifest} is nested too deeply: {file} cannot be checked against it"
        ) from error
    except HookedModelError as error:
        raise WriteSAEError(f"{file} cannot be checked against its manifest: {error}") from error
    for listed in (listing.exact, listing.plain):
        if listed - {digest}:
            expected = " and ".join(sorted(listed)[:3])
            raise WriteSAEError(
                f"{file} has SHA-256 {digest}, but {MANIFEST} says {expected}: damaged on the way, or "
                "changed; fetch it again (force_download=True), and if that does not help do not use it"
            )
        if listed:
            return True
    return digest in listing.others


class _Tags(NamedTuple):
    """What the keys on the way to a part of a manifest, joined from any of them on, may name.

    Only texts no longer than the names that are looked for are kept: all of them, for every entry, would take
    many times the file's size.
    """

    exact: frozenset[str]  # joined by /
    plain: frozenset[str]  # of plain keys, joined by _

    def below(self, key: str, longest: int) -> _Tags:
        plain_key = _plain(key)
        plain = _joined(self.plain, "_", plain_key, longest) if plain_key else self.plain
        return _Tags(_joined(self.exact, "/", key, longest), plain)


def _joined(tags: frozenset[str], by: str, key: str, longest: int) -> frozenset[str]:
    room = longest - len(key)
    longer = (f"{tag}{by}{key}" for tag in tags if len(tag) < room)
    return frozenset((key, *longer) if room >= 0 else ())


class _Listing:
    """The SHA-256s that a manifest lists: under a name of one file, exactly or nearly, and others.

    Args:
        names: the file's names.
    """

    def __init__(self, names: set[str]) -> None:
        self.names, self.plain_names = names, {_plain(name) for name in names}
        self.longest = max(map(len, names))
        self.exact, self.plain, self.others = set[str](), set[str](), set[str]()

    def read(self, content: Any, tags: _Tags) -> None:
        """Take up every SHA-256 in a part of the manifest, to which keys with these tags lead."""
        if isinstance(content, list):
            for item in content:
                if isinstance(item, (dict, list)):
                    self.read(item, tags)
        if not isinstance(content, dict) or not content:
            return
        named = [content[name] for name in _NAMES if isinstance(content.get(name), str)]
        own = _Tags(frozenset(named) & self.names, frozenset(map(_plain, named)) & self.plain_names)
        for key, value in content.items():
            if not isinstance(value, (dict, list, str)):
                continue
            here = tags if _plain(key) in _FIELDS else tags.below(key, self.longest)
            digest = _DIGEST.fullmatch(value) if isinstance(value, str) else None
            if digest is None:
                self.read(value, here)
            elif own.exact or here.exact & self.names:
                self.exact.add(digest[1].lower())
            elif own.plain or here.plain & self.plain_names:
                self.plain.add(digest[1].lower())
            else:
                self.others.add(digest[1].lower())


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
