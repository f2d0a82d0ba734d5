"""Results on disk, and the progress of a run."""

import csv
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from writesae_lens import WriteSAEError
from writesae_lens.experiments import ExperimentResult
from writesae_lens.experiments.result import Progress, read_table, write_table


def test_texts_and_numbers_come_back_as_they_were(tmp_path):
    texts = ["a\rb", "c\r\nd", "1", "True", "nan", "NA", " 1", 'say "x", y', "\u202e\u2028"]
    frame = pd.DataFrame({"text": texts, "coefficient": np.random.default_rng(0).normal(size=len(texts))})
    write_table(tmp_path / "x.csv", frame)
    back = read_table(tmp_path / "x.csv")
    assert back.text.tolist() == texts
    assert back.coefficient.tolist() == frame.coefficient.tolist()
    for column in (["1", "2"], ["True", "False"], ["inf", "3"]):
        write_table(tmp_path / "x.csv", pd.DataFrame({"text": column}))
        assert read_table(tmp_path / "x.csv").text.tolist() == column


# What spreadsheets take for formulas, and texts that look like what stands in their place.
STARTS = [
    "=1+1",
    "+a",
    "-a",
    "@a",
    "\t=",
    "\r=",
    "\n-",
    " =1",
    "'=1",
    "''=1",
    "'s",
    "'",
    "\uff1d1",
    "-0.5",
    "a=b",
    "  ",
]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.sampled_from(STARTS), st.text(st.sampled_from("'=+-@ \t\ra,\"\n"))), min_size=1))
def test_no_text_of_a_table_starts_a_formula_and_all_come_back(texts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.csv")
        frame = pd.DataFrame({"text": texts, "token": texts, "=x": -np.arange(len(texts)) - 0.5})
        write_table(path, frame)
        back = read_table(path)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                for cell in row[:2]:
                    assert not cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d"))
                    assert not cell.startswith(("\t", "\r", "\n"))
    assert list(back) == ["text", "token", "=x"]
    assert back["=x"].tolist() == frame["=x"].tolist()  # negative numbers are numbers
    assert back.text.fillna("").tolist() == texts


def result(name, **summary):
    return ExperimentResult(name, pd.DataFrame({"a": [1]}), summary)


def test_settings_of_numpy_are_saved_and_a_former_name_becomes_the_present_one(tmp_path):
    (tmp_path / "training.png").write_bytes(b"")
    saved = result("", experiment="erasure", seed=np.int64(3)).save(tmp_path)
    back = ExperimentResult.load(saved)
    assert (back.name, back.summary) == ("erase", {"experiment": "erase", "seed": 3})
    assert list(back.figures) == ["erase"]  # whatever pictures are in the folder


def test_results_of_unknown_experiments_are_refused(tmp_path):
    unknown = "no experiment is called 'x': there are replace"
    with pytest.raises(WriteSAEError, match=unknown):
        ExperimentResult.load(result("x", experiment="x").save(tmp_path))
    with pytest.raises(WriteSAEError, match=unknown):
        result("x").plot()


def test_progress_keeps_off_folders_that_are_not_its_own(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WriteSAEError, match="is not empty, and holds no progress"):
        Progress(tmp_path, {})
    own = tmp_path / "own"
    progress = Progress(own, {"seed": 0})
    progress.part(3, lambda: pd.DataFrame({"a": [1]}))
    (own / "settings.json").rename(tmp_path / "kept.json")
    with pytest.raises(WriteSAEError, match="is not empty"):  # parts whose settings are gone
        Progress(own, {"seed": 0})


def test_clearing_removes_what_progress_wrote_and_nothing_else(tmp_path):
    progress = Progress(tmp_path / "p", {"seed": 0})
    progress.part(3, lambda: pd.DataFrame({"a": [1]}))
    (tmp_path / "p" / "notes.txt").write_text("mine")
    Progress.clear(tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["notes.txt"]
    (tmp_path / "p" / "notes.txt").unlink()
    Progress.clear(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    Progress.clear(tmp_path / "p")
