"""Text on this machine for SAELens's ``dataset_path``, which otherwise names a data set on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from hooked_models.errors import one_line
from writesae_lens.errors import WriteSAEError

# Suffix of a file: the reader of `datasets`, and its options. A text file is one document.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_COLUMNS = ("tokens", "input_ids", "text", "problem")  # those that SAELens reads, in its order


def local_text(name: str, streaming: bool) -> Any:
    """The data set of a file or folder, or None if the name is not one of this machine.

    Args:
        name: path of a text, JSON lines, JSON, CSV, TSV, Parquet or Arrow file; of a folder of such files; or
            of a folder that ``Dataset.save_to_disk`` wrote.
        streaming: read as it goes.

    Raises:
        WriteSAEError: it looks like a path and nothing is there, or it cannot be read.
    """
    path = Path(name).expanduser()
    suffix = next((s.lower() for s in reversed(path.suffixes) if s.lower() not in (".gz", ".zst", ".xz")), "")
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or suffix in _READERS or name.count("/") > 1:
            raise WriteSAEError(f"dataset_path: there is no file or folder {name[:300]!r}")
        return None
    if path.is_file() and suffix not in _READERS:
        raise WriteSAEError(
            f"dataset_path: {name[:300]!r} is no text file: give {', '.join(_READERS)}, or a folder "
            "of such files"
        )
    try:
        if path.is_file():
            reader, options = _READERS[suffix]
            files = {"data_files": str(path), "split": "train", "streaming": streaming}
            return datasets.load_dataset(reader, **files, **options)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(path), split="train", streaming=streaming)
    except Exception as error:  # of the readers of `datasets`, which are many
        raise WriteSAEError(_unreadable(name, error)) from error


def check_text(name: str, text: Any) -> None:
    """Read the first document of a data set, and refuse one that SAELens cannot train on.

    Raises:
        WriteSAEError: there is none, it cannot be read, or it has no column of text or tokens.
    """
    try:
        first = next(iter(text), None)
    except Exception as error:
        raise WriteSAEError(_unreadable(name, error)) from error
    if first is None:
        raise WriteSAEError(f"the data set {name[:300]!r} is empty")
    if not isinstance(first, dict):
        raise WriteSAEError(
            f"{name[:300]!r} is no data set but has parts {', '.join(map(str, text))[:200]}: give one"
        )
    column = next((c for c in _COLUMNS if c in first), None)
    if column is None:
        raise WriteSAEError(
            f"the data set {name[:300]!r} has columns {', '.join(map(str, first))[:200]}: it needs one of "
            "text or tokens, named text, tokens or input_ids"
        )
    if column in ("text", "problem") and not isinstance(first[column], str):
        raise WriteSAEError(
            f"the column {column!r} of {name[:300]!r} holds {type(first[column]).__name__}, not text"
        )


def _unreadable(name: str, error: Exception) -> str:
    cause = error.__cause__ or error
    return (
        f"dataset_path: {name[:300]!r} cannot be read ({type(cause).__name__}: {one_line(str(cause))[:200]})"
    )
