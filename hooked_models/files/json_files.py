"""JSON files of unknown origin, read within bounds of size and depth; one line says why a file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hooked_models.errors import HookedModelError, one_line

LARGEST = 4 * 2**20
"""Bytes that a JSON file may have. Its content can take some 25 times as many; real ones have far fewer."""
LARGEST_INDEX = 2 * LARGEST
"""The same for the index of a checkpoint in several files, which names every tensor."""


def check_json_size(path: Path, largest: int = LARGEST) -> None:
    """Refuse what is no plain file, or has more bytes than a JSON file of its kind.

    Raises:
        HookedModelError: it is.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no plain file" if path.exists() else "missing"
        raise HookedModelError(f"{path} is {found}: expected a JSON file")
    if path.stat().st_size > largest:
        raise HookedModelError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {largest:,} that a {path.name} may have"
        )


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """The content of a JSON file in UTF-8. NaN and Infinity are read, as Python writes them.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        HookedModelError: it is no plain file, too large, not UTF-8 or not JSON, nested too deeply, or has a
            name twice in one object.
    """
    check_json_size(path, largest)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise HookedModelError(f"{path} is not JSON that can be read: nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise HookedModelError(f"{path} is not JSON that can be read: {one_line(error)}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:60]!a} stands twice in one object")
    return found
