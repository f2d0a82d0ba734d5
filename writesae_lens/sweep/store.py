"""The folder of a sweep: an SAE and results a cell, on a disk or at any address that fsspec knows.

A cell's files take their places whole, with the file that says "finished" last (`_LAST`). At an address that
is no local folder, workers make their files in a temporary folder and copy them there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from hooked_models.files.whole_files import is_temporary, write_whole
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.result import SETTINGS, SUMMARY, write_table
from writesae_lens.locks import LOCK, locked
from writesae_lens.saes.whole import CONFIG

CELLS, CELLS_PARQUET, FAILED, SWEEP = "cells.csv", "cells.parquet", "failed.csv", "sweep.json"
ROW, TIMES, FAILURES = "row.json", "times.json", "failed.json"
# Copied after all other files of a folder: a reader who finds one of them finds the others.
_LAST = (CONFIG, SUMMARY, ROW)
FAILED_COLUMNS = ["layer", "head", "step", "reason"]
# Seconds to wait for another sweep on the same folder that writes its table.
_WAIT = 60.0

CellKey = tuple[int, int]
"""Layer and head."""


def name_of(cell: CellKey) -> str:
    """The name of a cell's folders: ``L1H3``."""
    return f"L{cell[0]}H{cell[1]}"


class Store:
    """The files of a sweep.

    Args:
        out: a folder, or an address of fsspec (``s3://bucket/sweep``).

    Raises:
        WriteSAEError: no file system is known, or installed, for the address.
    """

    def __init__(self, out: str | Path) -> None:
        try:
            self._fs, self._root = url_to_fs(str(out))
        except (ImportError, ValueError) as error:
            raise WriteSAEError(f"cannot write to {out}: {error}") from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.is_memory = isinstance(self._fs, MemoryFileSystem)  # which no other process sees

    def __str__(self) -> str:
        return self._root if self.is_local else self._fs.unstrip_protocol(self._root)

    @contextmanager
    def open(self, *names: str, read_only: str | None = None) -> Iterator[list[Path]]:
        """Folders of the sweep on this machine, with what they hold; they are kept when the block ends well.

        Args:
            *names: of the folders.
            read_only: a further folder, the last one given, which the block does not change.
        """
        every = [*names, *([] if read_only is None else [read_only])]
        if self.is_local:
            yield [Path(self._root, name) for name in every]
            return
        with tempfile.TemporaryDirectory(prefix="writesae-sweep-") as beside:
            folders = [Path(beside, name) for name in every]
            for name, folder in zip(every, folders, strict=True):
                for path in self._fs.find(self._path(name)):
                    place = folder / PurePosixPath(path).relative_to(self._path(name))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(path, str(place))
            yield folders
            for name, folder in zip(names, folders):
                self._put(name, folder)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self._fs.isfile(self._path(name))

    def has_sae(self, cell: CellKey) -> bool:
        """Whether a cell's SAE is trained and saved."""
        return self.has(f"{name_of(cell)}/{CONFIG}")

    def read_json(self, name: str) -> Any:
        """The contents of a JSON file; None where there is none, or it does not read."""
        try:
            return json.loads(self._fs.cat_file(self._path(name)))
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", "utf-8"))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all cells that are finished, in order of layer and head."""
        rows = [row for row in self._of_cells(ROW) if row]
        return sorted(rows, key=lambda row: (row["layer"], row["head"]))

    def note_failures(self, cell: CellKey, failures: list[dict[str, Any]], tried: set[str]) -> None:
        """Keep what failed at a cell (`FAILED_COLUMNS`), in place of earlier failures of the steps tried."""
        name = f"results/{name_of(cell)}/{FAILURES}"
        failures = [row for row in self.read_json(name) or () if row["step"] not in tried] + failures
        if failures:
            self.write_json(name, failures)
        elif self.has(name):
            self._fs.rm_file(self._path(name))

    def write_tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write cells.csv and cells.parquet of all finished cells, and failed.csv of the others that failed.

        Returns:
            both tables. Other sweeps may write to the folder, on other cells: theirs are among the rows.
        """
        with locked(self._root if self.is_local else None, _WAIT):
            table = pd.DataFrame(self.rows())
            lost = [failure for failures in self._of_cells(FAILURES) for failure in failures or ()]
            failed = pd.DataFrame(lost, columns=FAILED_COLUMNS)
            if len(table):
                self._write(CELLS, lambda path: write_table(path, table))
                self._write(CELLS_PARQUET, lambda path: table.to_parquet(path, index=False))
            if lost:
                self._write(FAILED, lambda path: write_table(path, failed))
            elif self.has(FAILED):
                self._fs.rm_file(self._path(FAILED))
        return table, failed

    def _of_cells(self, name: str) -> list[Any]:
        """The contents of a JSON file of every cell that has it."""
        found = map(PurePosixPath, self._fs.find(self._path("results"), maxdepth=2))
        cells = sorted(path.parent.name for path in found if path.name == name)
        return [self.read_json(f"results/{cell}/{name}") for cell in cells]

    def _write(self, name: str, write: Any) -> None:
        if self.is_local:
            Path(self._path(name)).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(self._path(name)), write)
            return
        with tempfile.TemporaryDirectory(prefix="writesae-sweep-") as beside:
            write(Path(beside, "file"))
            self._fs.put_file(str(Path(beside, "file")), self._path(name))

    def _put(self, name: str, folder: Path) -> None:
        """Copy a finished folder to its place, the files that say so last."""

        def rank(path: Path) -> tuple[int, str]:
            return (_LAST.index(path.name) + 1 if path.name in _LAST else 0), str(path)

        files = [path for path in folder.rglob("*") if path.is_file() and not is_temporary(path)]
        for path in sorted((path for path in files if path.name not in (LOCK, SETTINGS)), key=rank):
            place = self._path(f"{name}/{path.relative_to(folder).as_posix()}")
            self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), place)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
