"""Which cells are trained together: within memory, in as few groups as that and the workers allow."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_models.hooked_recurrent import Cell
from writesae_lens import WriteSAEError
from writesae_lens.sweep import plan_sweep
from writesae_lens.sweep.plan import plan_groups

# Bytes of a shared forward pass, and of each cell.
PASS, EACH = 100, 7


def bytes_of(cells):
    return PASS + EACH * len(cells)


@given(
    heads=st.dictionaries(st.integers(0, 40), st.integers(1, 12), min_size=1, max_size=8),
    n_bytes=st.integers(PASS + EACH, PASS + 200 * EACH),
    workers=st.integers(1, 20),
)
def test_groups(heads, n_bytes, workers):
    cells = [Cell(layer, head, 4, 4, "mamba2") for layer in heads for head in range(heads[layer])]
    groups = plan_groups(cells, bytes_of, n_bytes, workers)
    assert [cell for group in groups for cell in group.cells] == sorted(
        cells, key=lambda c: (c.layer, c.head)
    )
    assert all(group.n_bytes == PASS + EACH * len(group.cells) <= n_bytes for group in groups)
    # No fewer would do: for memory, and for the workers, whose groups differ by rounding up alone.
    fit = (n_bytes - PASS) // EACH
    fewest = max(math.ceil(len(cells) / fit), min(workers, len(cells)))
    assert math.ceil(len(cells) / math.ceil(len(cells) / fewest)) == len(groups)


def test_a_cell_that_does_not_fit_is_refused():
    cells = [Cell(0, 0, 4, 4, "mamba2")]
    with pytest.raises(WriteSAEError, match=r"raise --memory"):
        plan_groups(cells, bytes_of, PASS, 1)


def test_the_text_of_a_plan(tmp_path):
    plan = plan_sweep("tiny-gdn", "0,3:*", tmp_path / "new", training_tokens=10_000, workers=2)
    lines = str(plan).splitlines()
    assert "8 cells of 12 in 2 groups, 10,000 tokens each" in lines[0]
    assert lines[1].startswith("group 1: 0:0 to 0:3 (4 cells): ")
    assert lines[2].startswith("group 2: 3:0 to 3:3 (4 cells): ")
    assert lines[3].startswith("training ")
    assert "experiments (replace)" in lines[3]
    assert not (tmp_path / "new").exists()
