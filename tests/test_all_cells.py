"""The tables of all cells: what they hold, and a small run from training to tables that goes on."""

import json
import sys

import pytest
import torch

from hooked_models import zoo
from hooked_models.hooked_recurrent import Cell
from tests.benchmarks import all_cells, cells_parts, cells_table
from writesae_lens import WriteSAEError
from writesae_lens.experiments.pursuit import matching_pursuit


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


def test_groups_hold_cells_of_one_layer():
    cells = [Cell(layer, head, 4, 4, "x") for layer in (0, 2) for head in range(5)]
    groups = all_cells.groups(cells)
    assert [[(c.layer, c.head) for c in g] for g in groups] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4)],
        [(2, 0), (2, 1), (2, 2), (2, 3)],
        [(2, 4)],
    ]


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
def test_a_run_trains_tests_prints_and_goes_on(tmp_path, monkeypatch, capsys):
    texts = {part: zoo.text(part)[:12_000] for part in zoo.PARTS}
    monkeypatch.setattr(zoo, "text", lambda part: texts[part])
    arguments = [
        *("--model", "tiny-gdn", "--cells", "1:1", "--out", str(tmp_path / "a"), "--part", "validation"),
        *("--training-tokens", "10240", "--firings", "12", "--horizon", "4"),
    ]

    def go(*more):
        monkeypatch.setattr(sys, "argv", ["all_cells", *arguments, *more])
        status = all_cells.main()
        return status, capsys.readouterr()

    status, said = go()
    assert status == 0, said.err
    done = [line.split(":")[0] for line in said.err.splitlines() if line.startswith(("trained ", "tested "))]
    assert done == ["trained 1", "tested 1"]
    assert "| 1:1 | " in said.out
    assert "| mean of 1 | " in said.out
    parts = json.loads((tmp_path / "a" / "L1H1" / "validation" / "parts.json").read_text())
    summary = json.loads((tmp_path / "a" / "L1H1" / "validation" / "summary.json").read_text())
    for where in ("", "_later"):
        name = f"median_recovered{where}"
        assert parts[cells_parts.AS_TRAINED][name] == pytest.approx(summary[name], abs=1e-4)
    monkeypatch.setattr(all_cells, "train_cells", lambda *_, **__: pytest.fail("it trained again"))
    monkeypatch.setattr(all_cells, "replacement_test", lambda *_, **__: pytest.fail("it tested again"))
    again = go()[1]
    assert again.out == said.out
    assert not again.err
    assert go("--table")[1].out == said.out
    table = columns(go("--table", "--seeds", str(tmp_path / "a"))[1].out.split("other seeds:\n\n")[1])
    assert table["1:1"]["above 0.9"].startswith("100 / ")
    for other in (("--horizon", "5"), ("--seed", "1")):
        with pytest.raises(WriteSAEError, match="other settings"):
            go(*other)
