"""The reader trace against full edited forward passes: what every head reads, with and without the write."""

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    dominant_atoms,
    every_subject,
    is_rank_1,
    make_sae,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import reader_trace

HOW = {"n_atoms": 2, "max_horizon": 3, "verbose": False}


def reads(model, passage, position=None, matrices=None):
    """{layer: [row, pos, head, d_v]} of this and later layers, natively or with each matrix added."""
    read = {}

    def keep(layer):
        def hook(x, hook):
            read[layer] = x.double().clone()

        return hook

    def add(x, hook):
        x = x.clone()
        x[:, position] += matrices.flatten(1)
        return x

    layers = [n for n in model.mixers if n >= LAYER]
    hooks = [(model.hook_name(n, "recurrence_out"), keep(n)) for n in layers]
    if matrices is not None:
        hooks.append((model.write_hook_name(LAYER, HEAD), add))
    rows = passage.expand(1 if matrices is None else len(matrices), -1)
    with torch.no_grad():
        model.run_with_hooks(rows, fwd_hooks=hooks)
    return read


def leading_pair(matrix):
    left, _, right = torch.linalg.svd(matrix)
    return left[:, :1] * right[:1]


@every_subject
def test_every_change_is_that_of_a_full_edited_forward_pass(model, tokens, added, kind, options):
    sae = make_sae(model, kind, **options)
    magnitude = 2.0 if kind == "state" else 0.5 if options else 1.0
    how = {"n_atoms": 3, "magnitude": magnitude, "max_horizon": 5, "verbose": False}
    result = reader_trace(model, sae, tokens, seed=3, **how)
    records = result.records
    assert list(records.columns) == [
        "passage", "position", "kind", "atom", "layer", "head", "horizon", "change",
    ]  # fmt: skip
    layers = [n for n in model.mixers if n >= LAYER]
    n_heads = len([c for c in model.cells if c.layer == LAYER])
    assert len(records) == 2 * 6 * len(layers) * n_heads * 6
    atoms = records.atom[records.kind == "atom"].unique().tolist()
    assert len(atoms) == 3
    assert set(atoms) <= dominant_atoms(model, sae, tokens)
    size = magnitude * float(writes(model, tokens).flatten(2).norm(dim=-1).flatten().median())
    assert result.summary["write_norm"] == pytest.approx(size, rel=1e-5)
    mine = [leading_pair(matrix) * size for matrix in atoms_of(sae, model)[atoms]]
    drawn = []
    for n, part in records.groupby("passage"):
        (position,) = part.position.unique()
        assert 0 <= position <= 14
        (random,) = (
            edits.matrices[3:]
            for edits in added
            # The rows go on from a cache of what comes before t0.
            if set(edits.positions.tolist()) == {0}
            and tokens[n].tolist()[position : position + 6] == edits.passage
        )
        np.testing.assert_allclose(random.flatten(1).norm(dim=-1), size, rtol=1e-4)
        assert is_rank_1(random)
        drawn.append(random.flatten(1) / size)
        native = reads(model, tokens[n])
        moved = reads(model, tokens[n], position, torch.cat([torch.stack(mine), random]))
        names = [("atom", atom) for atom in atoms] + [("random", number) for number in range(3)]
        for row in part.itertuples():
            number, t = names.index((row.kind, row.atom)), position + row.horizon
            before = native[row.layer][0, t, row.head]
            change = (moved[row.layer][number, t, row.head] - before).norm() / before.norm()
            assert row.change == pytest.approx(float(change), rel=1e-4, abs=1e-5)
    # No random write is another one, in this or another passage.
    every = torch.cat(drawn)
    assert float((every @ every.T).fill_diagonal_(0).abs().max()) < 0.5
    beside = records[(records.layer == LAYER) & (records["head"] != HEAD)]
    assert len(beside)
    assert beside.change.max() < 1e-6
    check_summary(result.summary, records)


def check_summary(summary, records):
    """Every figure from the records, by its definition."""
    atoms = [r for r in records.itertuples() if r.kind == "atom"]

    def mean(rows, by):
        groups = {}
        for r in rows:
            groups.setdefault(by(r), []).append(r.change)
        return {name: np.mean(x) for name, x in groups.items()}

    own = [r for r in atoms if (r.layer, r.head) == (LAYER, HEAD)]
    later = [r for r in atoms if r.layer > LAYER]
    assert summary["own_change_by_horizon"] == pytest.approx(mean(own, lambda r: str(r.horizon)))
    assert summary["change_by_horizon"] == pytest.approx(mean(later, lambda r: str(r.horizon)))
    assert summary["change_by_layer"] == pytest.approx(mean(later, lambda r: str(r.layer)))
    heads = mean(later, lambda r: (r.layer, r.head))
    best = sorted(heads, key=lambda head: -heads[head])[:10]
    assert [(r["layer"], r["head"]) for r in summary["top_readers"]] == best
    assert [r["change"] for r in summary["top_readers"]] == pytest.approx([heads[head] for head in best])
    random = [r.change for r in records.itertuples() if r.kind == "random" and r.layer > LAYER]
    ratio = np.mean([r.change for r in later]) / np.mean(random)
    assert summary["ratio_to_random"] == pytest.approx(ratio)
    assert summary["n_passages"] == records.passage.nunique()


def test_a_cell_of_the_last_layer_has_no_later_readers(gdn, passages, tmp_path):
    result = reader_trace(gdn, make_sae(gdn, layer=3, head=0), passages, **HOW)
    assert set(result.records.layer) == {3}
    assert result.summary["top_readers"] == []
    assert result.summary["ratio_to_random"] is None
    assert result.summary["change_by_layer"] == {}
    assert set(result.summary["own_change_by_horizon"]) == {"0", "1", "2", "3"}
    result.save(tmp_path)  # the figure too, and no NaN


def test_horizons_from_none_to_the_whole_passage_and_no_further(gdn, passages):
    for max_horizon in (0, 19):
        result = reader_trace(gdn, make_sae(gdn), passages[:1], **(HOW | {"max_horizon": max_horizon}))
        assert sorted(result.records.horizon.unique()) == list(range(max_horizon + 1))
        result.plot()
    assert set(result.records.position) == {0}
    with pytest.raises(WriteSAEError, match="passages of 20 tokens have no room for a horizon of 20"):
        reader_trace(gdn, make_sae(gdn), passages, **(HOW | {"max_horizon": 20}))


def test_more_atoms_than_there_are_means_all(gdn, passages):
    sae = make_sae(gdn)
    result = reader_trace(gdn, sae, passages, n_atoms=99, max_horizon=1, verbose=False)
    alive = dominant_atoms(gdn, sae, passages)
    assert set(result.records.atom[result.records.kind == "atom"]) == alive
    assert result.summary["n_atoms"] == len(alive)


def test_another_seed_draws_other_atoms_and_positions(gdn, passages):
    one, other = (reader_trace(gdn, make_sae(gdn), passages, seed=s, **HOW).records for s in (1, 2))
    assert set(one.atom) != set(other.atom)
    assert one.position.tolist() != other.position.tolist()
