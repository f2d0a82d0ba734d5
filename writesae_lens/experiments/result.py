"""The result of an experiment, its files, and the finished parts that a long experiment resumes from."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hooked_models.errors import one_line
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, find_experiment

RECORDS, SUMMARY, SETTINGS = "records.csv", "summary.json", "settings.json"


@dataclass
class ExperimentResult:
    """Records, figures of merit and plots of one experiment.

    Args:
        name: of the experiment in the catalogue.
        records: one row per trial.
        summary: figures of merit and settings by name: numbers, texts, and lists and dicts of these.
    """

    name: str
    records: pd.DataFrame
    summary: dict[str, Any]

    @property
    def figures(self) -> Mapping[str, Callable[[ExperimentResult], Figure]]:
        """File stem to the function that draws it from this result; the first is the main one."""
        return EXPERIMENTS[self.name].figures if self.name in EXPERIMENTS else {}

    @property
    def headline(self) -> str:
        """The main figure of merit in a line of text."""
        return self.summary.get("headline", "")

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.headline} [{len(self.records):,} records; .records .summary .plot() .save()]"
        )

    def plot(self) -> Figure:
        """The experiment's main figure.

        Raises:
            WriteSAEError: there is no experiment of this name.
        """
        return next(iter(find_experiment(self.name).figures.values()))(self)

    def save(self, folder: str | Path) -> Path:
        """Write records.csv, summary.json and a PNG per figure; returns the folder.

        Each file is written beside its place and then renamed, so that no half-written file stays.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / RECORDS, self.records)
        text = json.dumps(self.summary, indent=2, allow_nan=False, default=np.generic.item)
        write_whole(folder / SUMMARY, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        for stem, draw in self.figures.items():
            figure = draw(self)
            write_whole(folder / f"{stem}.png", lambda path, f=figure: f.savefig(path, format="png", dpi=150))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ExperimentResult:
        """Read back what `save` wrote; an experiment's former name becomes its present one.

        Raises:
            WriteSAEError: the folder holds no result, a damaged one, or one of an unknown experiment.
        """
        folder = Path(folder)
        missing = [name for name in (RECORDS, SUMMARY) if not (folder / name).is_file()]
        if missing:
            raise WriteSAEError(
                f"{folder} holds no result of an experiment: {' and '.join(missing)} not found in it; give "
                "the folder that `save` wrote, or a command's --out"
            )
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            records, name = read_table(folder / RECORDS), find_experiment(summary["experiment"]).name
        except (ValueError, KeyError, TypeError) as error:
            raise WriteSAEError(f"the result in {folder} does not read: {one_line(error)}") from error
        return cls(name, records, summary | {"experiment": name})


# Columns that are text even where every entry is a number.
_TEXTS = ("text", "text_before", "text_after", "name", "condition")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote: floats are exact, and only empty cells are missing values."""
    return pd.read_csv(
        path,
        float_precision="round_trip",
        keep_default_na=False,
        na_values=[""],
        dtype=dict.fromkeys(_TEXTS, str),
    )


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a CSV with all texts in quotes, for they may hold line breaks of any kind."""
    write_whole(path, lambda beside: frame.to_csv(beside, index=False, quoting=csv.QUOTE_NONNUMERIC))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it, so that no half-written file is left."""
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        if error.filename is None:  # the error of a full disk does not name the file
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


class Progress:
    """Finished parts of an experiment in a folder, so that an interrupted run goes on where it stopped.

    Args:
        folder: where to keep the parts, or None to keep nothing.
        settings: the settings that the parts depend on.

    Raises:
        WriteSAEError: the folder holds parts made with other settings, or files that are not an experiment's.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists() and any(self.folder.iterdir()):
            raise WriteSAEError(
                f"{self.folder} is not empty, and holds no progress of a run: give another folder"
            )
        path, text = (
            self.folder / SETTINGS,
            json.dumps(settings, indent=2, sort_keys=True, default=np.generic.item),
        )
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise WriteSAEError(
                f"{self.folder} holds the progress of a run with other settings (see {SETTINGS}): "
                "resume with the same ones, remove the folder, or give another"
            )
        write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove finished parts from a folder, and the folder if nothing else is in it."""
        for path in [*folder.glob("part_??????.csv"), folder / SETTINGS]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()

    def part(self, number: int, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The part from the folder if it is there, else computed and kept."""
        if self.folder is None:
            return compute()
        path = self.folder / f"part_{number:06d}.csv"
        if path.exists():
            # A part that does not read back is computed again.
            with contextlib.suppress(pd.errors.ParserError, pd.errors.EmptyDataError):
                return read_table(path)
        frame = compute()
        write_table(path, frame)
        return frame
