"""What the atlas reads of a sweep's folder and of a memory map, and what it refuses."""

import pandas as pd
import pytest

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.report.sweep_folders import write_map, write_sweep
from writesae_lens import WriteSAEError
from writesae_lens.experiments import as_passages, memory_map
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.result import write_table
from writesae_lens.report.atlas import make_atlas
from writesae_lens.report.cell_figures import MEANINGS, meaning_of
from writesae_lens.report.cell_table import CellTable

LOOKUP = "replace_lookup_median_recovered"
REASON = "RuntimeError: out of memory"


def test_trained_cells_that_are_not_tested(tmp_path):
    write_sweep(tmp_path / "sweep", [(0, 0), (0, 1), (1, 0)])
    table = pd.read_csv(tmp_path / "sweep" / "cells.csv")
    write_table(tmp_path / "sweep" / "cells.csv", table.head(2))
    text = make_atlas(tmp_path / "sweep").read_text("utf-8")
    assert "1 cell is trained and not tested yet: the same sweep goes on with them." in text
    assert CellTable.read(tmp_path / "sweep").headline.startswith("2 of 3 cells")


def test_cells_without_experiments_have_no_results(tmp_path):
    write_sweep(tmp_path / "sweep", [(0, 0), (0, 1)])
    table = pd.read_csv(tmp_path / "sweep" / "cells.csv")
    times = ["layer", "head", "architecture", "d_k", "d_v", "training_seconds"]
    write_table(tmp_path / "sweep" / "cells.csv", table[times])
    said = CellTable.read(tmp_path / "sweep").headline
    assert said.startswith("2 of 2 cells of tiny-gdn are trained. No experiment was run on them")
    assert "tested on" not in make_atlas(tmp_path / "sweep").read_text("utf-8")


def test_damaged_folders_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(WriteSAEError, match=message) as caught:
            make_atlas(tmp_path / "sweep")
        assert len(str(caught.value)) < 300 + len(str(tmp_path))

    refused("is no folder of a sweep")
    write_sweep(tmp_path / "sweep", [(0, 0), (0, 1)], failed=[(0, 2, "training", REASON)])
    cells, whole = tmp_path / "sweep" / "cells.csv", (tmp_path / "sweep" / "cells.csv").read_bytes()
    cells.unlink()
    refused(
        r"no cell of the sweep in .* is finished \(failed.csv has the reasons\): run the same sweep again"
    )
    for content, message in (
        (b"", "does not read as a table"),
        (b'"a","b"\n1,2\n', "its column 'layer' has no whole numbers"),
        (b'"layer","head"\n0,0.5\n', "its column 'head' has no whole numbers"),
        (b'"layer","head"\n0,-1\n', "its column 'head' has no whole numbers"),
        (b'"layer","head"\n0,1\n0,1\n', "has two rows of layer 0, head 1"),
    ):
        cells.write_bytes(content)
        refused(message)
    cells.write_bytes(whole)
    (tmp_path / "sweep" / "failed.csv").write_text('"layer","head"\n0,1\n')
    refused("lacks the columns step and reason")
    (tmp_path / "sweep" / "failed.csv").unlink()
    write_map(tmp_path / "sweep", [(0, 0)], model="another")
    refused("the map in .* is of another, the sweep of tiny-gdn")
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    refused("is no JSON object")


def test_every_column_of_a_map_is_explained(tmp_path):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    tokens = as_passages(model, zoo.held_out_text()[:6000], 24)[:2]
    result = memory_map(model, tokens, max_firings=2, horizon=2, verbose=False)
    columns = set(result.records) - {"layer", "head", "d_k", "d_v"}
    figures_of_map = {name for name in columns if not name.endswith(("_low", "_high"))}
    assert figures_of_map == set(MEANINGS["map"])
    cells = [(cell.layer, cell.head) for cell in model.cells]
    write_sweep(tmp_path / "sweep", cells[:3])
    result.save(tmp_path / "sweep" / "map")
    table = CellTable.read(tmp_path / "sweep")
    assert len(table.figures) == len(cells)
    read = table.figures.map_kl_own.to_dict()
    truth = result.records.set_index(["layer", "head"]).kl_own.to_dict()
    assert read == pytest.approx(truth)
    make_atlas(tmp_path / "sweep")


def test_every_figure_of_the_catalogue_is_explained():
    """Names of columns as the sweep makes them; experiments on several SAEs are not for a sweep."""
    for experiment in EXPERIMENTS.values():
        if experiment.name in ("compare", "stability"):
            continue
        for path in experiment.table:
            column = f"{experiment.name}_{path.replace('.', '_')}"
            assert path.replace(".", "_") in MEANINGS[experiment.name]
            assert meaning_of(column).about
    assert meaning_of(LOOKUP).label == "recovered, median: untrained lookup"
    assert meaning_of("replace_seconds").unit == "s"
    assert meaning_of("of_another_day") == ("of another day", "", "")
