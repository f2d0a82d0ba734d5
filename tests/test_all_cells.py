"""The tables of all cells: what they hold, and those of a small sweep."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.benchmarks import all_cells, cells_parts, cells_table
from writesae_lens import WriteSAEError
from writesae_lens.experiments.pursuit import matching_pursuit
from writesae_lens.sweep import sweep


def summary(median, pooled, lookup, chain=0.5):
    """A replacement test's summary with the same figures at the own position, later and in both."""
    where = ("", "_later", "_both")
    baseline = {"name": "lookup"} | {f"median_recovered{w}": lookup for w in where}
    return (
        {f"median_recovered{w}": median for w in where}
        | {f"recovered{w}": pooled for w in where}
        | {"baselines": [baseline], "chain_over_ceiling": chain, "bits": 12.34, "n_at_floor": 3}
        | {"headline": "a text", "win_rate": None}
    )


def columns(table):
    """Cells of a Markdown table by row and title."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_the_table_has_a_row_a_cell_and_the_mean():
    table = columns(
        cells_table.cells_table({(0, 1): summary(0.5, 0.6, 0.2), (3, 2): summary(0.8, 0.7, None)})
    )
    assert list(table) == ["0:1 *", "3:2", "mean of 2"]
    assert table["0:1 *"]["median recovered: own / later / both"] == "50 / 50 / 50"
    assert table["mean of 2"]["median recovered: own / later / both"] == "65 / 65 / 65"
    assert table["3:2"]["lookup, median"] == "- / - / -"
    assert table["mean of 2"]["lookup, median"] == "20 (1) / 20 (1) / 20 (1)"
    assert table["3:2"]["bits to name the codes: this / pursuit"] == "12.3 / -"
    assert table["3:2"]["win rate: own / both"] == "- / -"
    assert table["3:2"]["at the floor: own / later / both"] == "3 / - / -"


def test_the_targets_count_the_cells_that_reach_them():
    table = columns(
        cells_table.targets_table({(0, 1): summary(0.5, 0.6, 0.2, 0.95), (3, 2): summary(0.9, 0.9, 0.8, 0.8)})
    )
    assert table["median recovered, later"] == {
        "aimed at": "80.0%",
        "mean": "70.0%",
        "worst cell": "50.0% (0:1)",
        "cells that reach it": "1 of 2",
    }
    ahead = table["median: ahead of the lookup"]
    assert (ahead["mean"], ahead["worst cell"]) == ("20.0%", "10.0% (3:2)")
    assert table["chain over its ceiling"]["worst cell"] == "80.0% (3:2)"
    assert table["win rate, both"]["cells that reach it"] == "0 of 2"


def test_matching_pursuit_finds_the_sum_of_few_codes():
    rng = torch.Generator().manual_seed(0)
    codes = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q
    weights = torch.zeros(5, 12)
    for row in weights:
        row[torch.randperm(12, generator=rng)[:3]] = torch.rand(3, generator=rng) + 0.5
    x = weights @ codes
    torch.testing.assert_close(matching_pursuit(x, 3 * codes, 3)[0], x, atol=1e-5, rtol=1e-5)
    left = [float((x - matching_pursuit(x, codes, k)[0]).square().sum()) for k in (1, 2, 3)]
    expected = [float(weights.sort(dim=1).values[:, :-k].square().sum()) for k in (1, 2, 3)]
    assert left == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_tables_of_a_sweep(tmp_path, monkeypatch):
    """What is noted of the parts is what the test itself found, and it is not measured again."""
    options = {"training_tokens": 10_240, "max_passages": 2, "verbose": False}
    options |= {"experiments": {"replace": {"horizon": 4, "max_firings": 12}}}
    done = sweep("tiny-gdn", [(1, 1)], tmp_path, **options)
    monkeypatch.setattr(all_cells, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    printed = all_cells.tables(tmp_path, 1, [tmp_path])
    assert "| 1:1 | " in printed
    assert "| mean of 1 | " in printed
    parts = json.loads((tmp_path / "results" / "L1H1" / all_cells.PARTS).read_text())
    for where in ("", "_later"):
        name = f"median_recovered{where}"
        assert parts[cells_parts.AS_TRAINED][name] == pytest.approx(
            done.cells[f"replace_{name}"][0], abs=1e-4
        )
    assert columns(printed.split("other seeds:\n\n")[1])["1:1"]["above 0.9"].startswith("100 / ")
    monkeypatch.setattr(all_cells, "parts_of_the_error", lambda *_: pytest.fail("it measured again"))
    assert all_cells.tables(tmp_path, 1, [tmp_path]) == printed


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(WriteSAEError, match="holds no sweep"):
        all_cells.tables(tmp_path)
