"""The result of an experiment, its files, and the finished parts that a long experiment resumes from."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hooked_models.errors import one_line
from hooked_models.files.whole_files import replacing, write_whole
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS, OF_PROMPTS, find_experiment
from writesae_lens.locks import LOCK, locked

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
        entry = (EXPERIMENTS | OF_MODELS | OF_PROMPTS).get(self.name)
        return {} if entry is None else entry.figures

    @property
    def headline(self) -> str:
        """The main figure of merit in a line of text."""
        return self.summary.get("headline", "")

    def figures_of_merit(self, others: Iterable[str] = ()) -> dict[str, Any]:
        """The figures that tables show, by their paths in the summary; None where the result lacks one.

        First what is recovered, then the same of the untrained baselines, then ``others``, then the rest.

        Args:
            others: paths of further figures.
        """
        table = find_experiment(self.name).table
        recovered = [name for name in table if "recovered" in name]
        untrained = self.summary.get("baselines")  # an experiment without may have an option of that name
        names = [row["name"] for row in untrained] if isinstance(untrained, list) else []
        baselines = [f"baselines.{name}.{figure}" for name in names for figure in recovered]
        paths = dict.fromkeys([*recovered, *baselines, *others, *table])
        return {path: value_at(self.summary, path) for path in paths}

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.headline} [{len(self.records):,} records; .records .summary .plot() .save()]"
        )

    def plot(self) -> Figure:
        """The experiment's main figure.

        Raises:
            WriteSAEError: there is no experiment of this name.
        """
        return next(iter(find_experiment(self.name, of_models=True).figures.values()))(self)

    def save(self, folder: str | Path) -> Path:
        """Write records.csv, summary.json and a PNG per figure; returns the folder.

        The files take their places together, so `load` never meets some of this result and some of another.

        Raises:
            WriteSAEError: another run is writing to the folder.
            OSError: of the disk; if it is full, an earlier result stays.
        """
        folder = Path(folder)
        text = json.dumps(self.summary, indent=2, allow_nan=False, default=np.generic.item)
        with locked(folder), replacing(folder, (SUMMARY,), _pictures_in(folder)) as beside:
            write_table(beside / RECORDS, self.records)
            (beside / SUMMARY).write_text(text + "\n", encoding="utf-8")
            for stem, draw in self.figures.items():
                draw(self).savefig(beside / f"{stem}.png", format="png", dpi=150)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ExperimentResult:
        """Read back what `save` wrote; an experiment's former name becomes its present one.

        Raises:
            WriteSAEError: the folder holds no result, a damaged one, or one of an unknown experiment; or
                another result took its place meanwhile.
        """
        folder = Path(folder)
        missing = [name for name in (RECORDS, SUMMARY) if not (folder / name).is_file()]
        if missing:
            raise WriteSAEError(
                f"{folder} holds no result of an experiment: {' and '.join(missing)} not found in it; give "
                "the folder that `save` wrote, or a command's --out"
            )
        try:
            text = (folder / SUMMARY).read_text(encoding="utf-8")
            summary = json.loads(text)
            records = read_table(folder / RECORDS)
            name = find_experiment(summary["experiment"], of_models=True).name
            if (folder / SUMMARY).read_text(encoding="utf-8") != text:
                raise WriteSAEError("another result took its place meanwhile: read it again")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WriteSAEError(f"the result in {folder} does not read: {one_line(error)}") from error
        return cls(name, records, summary | {"experiment": name})


def value_at(summary: Any, path: str) -> Any:
    """The value in a summary at a path of names with dots between; names such as "0.1" have dots themselves.

    The rows of a list are reached by their ``name``. None if there is no such value.
    """
    if isinstance(summary, list):
        summary = {row["name"]: row for row in summary if isinstance(row, dict) and "name" in row}
    if not isinstance(summary, dict) or path in summary:
        return summary.get(path) if isinstance(summary, dict) else None
    name, _, rest = path.partition(".")
    return value_at(summary.get(name), rest) if rest else None


def _pictures_in(folder: Path) -> list[Path]:
    """Where the result that a folder holds, if it does, has its figures."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        name = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["experiment"]
        return [folder / f"{stem}.png" for stem in find_experiment(name, of_models=True).figures]
    return []


# Columns that are text even where every entry is a number.
_TEXTS = ("text", "text_before", "text_after", "name", "condition", "label")
# A cell that a spreadsheet takes for a formula, after any number of apostrophes that `write_table` adds.
_FORMULA = re.compile(r"'*(?:\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")


def read_table(table: Path | io.BytesIO) -> pd.DataFrame:
    """Read a table that `write_table` wrote: floats are exact, texts are as they were, and only empty cells
    are missing values.
    """
    frame = pd.read_csv(
        table,
        float_precision="round_trip",
        keep_default_na=False,
        na_values=[""],
        dtype=dict.fromkeys(_TEXTS, str),
    )
    return _map_texts(frame, lambda x: x[1:] if x.startswith("'") and _FORMULA.match(x, 1) else x)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a CSV with all texts in quotes, for they may hold line breaks of any kind.

    A text that a spreadsheet would take for a formula (it starts with =, +, -, @, a tab or a line break,
    after spaces too) gets an apostrophe before it, which `read_table` takes away; numbers stay as they are.
    """
    write_whole(path, lambda beside: beside.write_bytes(_as_csv(frame)))


def _as_csv(frame: pd.DataFrame) -> bytes:
    escaped = _map_texts(frame, lambda x: f"'{x}" if _FORMULA.match(x) else x)
    text = escaped.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return text.encode("utf-8")


def _map_texts(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """The table with texts changed, in the columns' names too; columns without any change stay the same."""
    changed = frame.rename(columns=lambda x: change(x) if isinstance(x, str) else x)
    for number, kind in enumerate(frame.dtypes):
        if pd.api.types.is_numeric_dtype(kind):
            continue
        column = frame.iloc[:, number]
        values = [change(x) if isinstance(x, str) else x for x in column]
        if any(new is not old for new, old in zip(values, column)):
            own = object if isinstance(kind, pd.CategoricalDtype) else kind
            changed.isetitem(number, pd.Series(values, index=frame.index, dtype=own))
    return changed


_PART = re.compile(r"part_\d{6,}\.csv")
_OLD_PART = re.compile(rf"({re.escape(SETTINGS)}|{_PART.pattern})\.part")  # as earlier versions named them
_PARTS_END = re.compile(rb"# (\d+) rows\n\Z")


class Progress:
    """Finished parts of an experiment in a folder, so that an interrupted run goes on where it stopped.

    Args:
        folder: where to keep the parts, or None to keep nothing.
        settings: the settings that the parts depend on.

    Raises:
        WriteSAEError: the folder holds parts made with other settings, or files that are not an experiment's,
            or another run is writing to it.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        with locked(self.folder):
            self._begin(self.folder, json.dumps(settings, indent=2, sort_keys=True, default=np.generic.item))

    def _begin(self, folder: Path, text: str) -> None:
        """Note the settings in a new folder, or check those that it has; remove what is not whole."""
        path = folder / SETTINGS
        names = {entry.name for entry in folder.iterdir()} - {LOCK}
        leftovers = {name for name in names if _OLD_PART.fullmatch(name)}
        whole = _is_json(path)
        if not whole and path.exists():  # an earlier version lost power: nothing says what its parts are of
            leftovers |= {name for name in names if name == SETTINGS or _PART.fullmatch(name)}
        if not whole and names - leftovers:
            raise WriteSAEError(f"{folder} is not empty, and holds no progress of a run: give another folder")
        if whole and path.read_text(encoding="utf-8") != text:
            raise WriteSAEError(
                f"{folder} holds the progress of a run with other settings (see {SETTINGS}): "
                "resume with the same ones, remove the folder, or give another"
            )
        for name in leftovers:
            (folder / name).unlink()
        if not whole:
            write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove finished parts from a folder, and the folder if nothing else is in it."""
        for path in [*folder.glob("part_??????.csv"), folder / SETTINGS]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()

    def part(self, number: int, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The part from the folder if it is there and whole, else computed and kept."""
        if self.folder is None:
            return compute()
        path = self.folder / f"part_{number:06d}.csv"
        if path.exists() and (kept := _read_part(path)) is not None:
            return kept
        frame = compute()
        content = _as_csv(frame) + b"# %d rows\n" % len(frame)
        write_whole(path, lambda beside: beside.write_bytes(content))
        return frame


def _is_json(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        json.loads(path.read_text(encoding="utf-8"))
        return True
    return False


def _read_part(path: Path) -> pd.DataFrame | None:
    """A finished part, or None if its last line or some of its rows are missing."""
    content = path.read_bytes()
    end = _PARTS_END.search(content)
    if end is None:
        return None
    with contextlib.suppress(ValueError):  # what pandas raises for a table that is not one
        frame = read_table(io.BytesIO(content[: end.start()]))
        return frame if len(frame) == int(end[1]) else None
    return None
