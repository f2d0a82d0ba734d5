"""Selectivity against full edited forward passes, sets and overlaps in plain Python."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import (
    atoms_of,
    bootstrap_interval,
    column,
    dominant_atoms,
    every_subject,
    is_rank_1,
    kl_nats,
    logits_with_added,
    make_sae,
    writes,
)
from writesae_lens.experiments import selectivity

HOW = {"n_atoms": 2, "n_positions": 2, "top_k": 5, "verbose": False}


@every_subject
def test_every_row_is_a_full_edited_forward_pass(model, tokens, swapped, kind, options):
    sae = make_sae(model, kind, **options)
    magnitude = 2.0 if kind == "state" else 0.5 if options else 1.0
    how = {"n_atoms": 3, "n_positions": 2, "top_k": 7, "magnitude": magnitude, "verbose": False}
    result = selectivity(model, sae, tokens, seed=3, **how)
    records = result.records
    columns = ["passage", "position", "kind", "atom", "kl", "kl_floor", "max_shift", "top"]
    assert list(records.columns) == columns
    atoms = records.atom[records.kind == "atom"].unique()
    assert len(atoms) == 3
    assert set(atoms) <= dominant_atoms(model, sae, tokens)
    assert set(records.atom[records.kind == "random"]) == {0, 1, 2}
    places = records[["passage", "position"]].drop_duplicates()
    assert places.passage.tolist() == [0, 0, 1, 1]
    assert len(records) == len(records.drop_duplicates(["passage", "position", "kind", "atom"])) == 4 * 6
    native, decoder = writes(model, tokens), atoms_of(sae, model)
    drawn = {0: [], 1: [], 2: []}
    for n, part in records.groupby("passage"):
        matrices = []
        for row in part.itertuples():
            size = magnitude * native[n, row.position].norm()
            if row.kind == "atom":
                matrices.append(size * decoder[row.atom] / decoder[row.atom].norm())
                continue
            changes = [
                matrix - native[n, row.position]
                for edits in swapped
                if edits.passage == tokens[n].tolist()
                for matrix in edits.matrices[edits.positions == row.position]
            ]
            assert len(changes) == 6
            # The random ones come after the atoms, in the order of their numbers.
            matrices.append(changes[3 + row.atom])
            assert float(matrices[-1].norm()) == pytest.approx(float(size), rel=1e-4)
            assert is_rank_1(matrices[-1])
            drawn[row.atom].append(matrices[-1].flatten() / matrices[-1].norm())
        after, before = logits_with_added(model, tokens[n], column(part, "position"), matrices)
        np.testing.assert_allclose(part.kl, kl_nats(after, before), rtol=1e-3, atol=1e-6)
        shift = after - before
        shift = (shift - shift.mean(-1, keepdim=True)).numpy()
        for row, moved in zip(part.itertuples(), shift, strict=True):
            top = json.loads(row.top)
            assert len(set(top)) == 7
            largest = np.sort(np.abs(moved))[::-1][:7]
            np.testing.assert_allclose(np.abs(moved[top]), largest, rtol=0, atol=1e-5)
            assert row.max_shift == pytest.approx(moved[top[0]], abs=1e-5)
    # Each random matrix is drawn once, and is not another one.
    for own in drawn.values():
        assert len(own) == 4
        assert all(float(a @ own[0]) > 0.999 for a in own)
    assert all(abs(float(a[0] @ b[0])) < 0.5 for a, b in combinations(drawn.values(), 2))
    check_summary(result.summary, records, 7, model.cfg.d_vocab)


def check_summary(summary, records, top_k, d_vocab):
    """Every figure from the records, by its definition."""
    assert summary["n_writes"] == len(records)
    assert summary["n_at_floor"] == sum(r.kl <= r.kl_floor for r in records.itertuples())
    assert summary["chance_overlap"] == pytest.approx(top_k / d_vocab)
    for kind in ("atom", "random"):
        rows = [r for r in records.itertuples() if r.kind == kind and r.kl > r.kl_floor]
        own, other = {}, []
        for a, b in combinations(rows, 2):
            common = len(set(json.loads(a.top)) & set(json.loads(b.top))) / top_k
            if a.atom == b.atom:
                own.setdefault(a.atom, []).append(common)
            elif (a.passage, a.position) == (b.passage, b.position):
                other.append(common)
        every = [x for overlaps in own.values() for x in overlaps]
        assert summary[f"own_overlap_{kind}"] == pytest.approx(np.mean(every))
        assert summary[f"other_overlap_{kind}"] == pytest.approx(np.mean(other))
        assert summary[f"selectivity_{kind}"] == pytest.approx(np.mean(every) - np.mean(other), abs=1e-9)
        interval = bootstrap_interval(list(own.values()), np.mean) - np.mean(other)
        assert summary[f"selectivity_ci_{kind}"] == pytest.approx(interval, abs=1e-9)
        assert summary[f"median_kl_{kind}"] == pytest.approx(np.median([r.kl for r in rows]))


def test_a_set_of_all_tokens_is_the_same_for_all(gdn, passages):
    result = selectivity(gdn, make_sae(gdn), passages, **(HOW | {"top_k": 10**6}))
    assert result.summary["top_k"] == gdn.cfg.d_vocab
    assert all(sorted(json.loads(top)) == list(range(gdn.cfg.d_vocab)) for top in result.records.top)
    for name in ("own_overlap_atom", "other_overlap_atom", "own_overlap_random", "chance_overlap"):
        assert result.summary[name] == 1.0
    assert result.summary["selectivity_atom"] == 0.0


def test_a_set_of_one_token(gdn, passages):
    result = selectivity(gdn, make_sae(gdn), passages, **(HOW | {"top_k": 1}))
    assert all(len(json.loads(top)) == 1 for top in result.records.top)
    assert result.summary["own_overlap_atom"] in {n / 12 for n in range(13)}


def test_one_position_or_one_living_atom_leave_no_overlap(gdn, passages, tmp_path):
    result = selectivity(gdn, make_sae(gdn), passages[:1], **(HOW | {"n_positions": 1}))
    assert result.summary["own_overlap_atom"] is None
    assert result.summary["selectivity_ci_atom"] is None
    assert result.summary["other_overlap_atom"] is not None
    result.save(tmp_path / "one position")  # the figure too, and no NaN
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc[7] = 10.0
    result = selectivity(gdn, sae, passages, **HOW)
    assert set(result.records.atom[result.records.kind == "atom"]) == {7}
    assert result.summary["other_overlap_atom"] is None
    assert result.summary["own_overlap_atom"] is not None
    result.save(tmp_path / "one atom")


def test_more_positions_and_atoms_than_there_are_means_all(gdn, passages):
    sae = make_sae(gdn)
    result = selectivity(gdn, sae, passages[:1, :5], n_atoms=99, n_positions=99, top_k=5, verbose=False)
    atoms = result.records[result.records.kind == "atom"]
    assert set(atoms.atom) == dominant_atoms(gdn, sae, passages[:1, :5])
    assert result.summary["n_atoms"] == atoms.atom.nunique()
    assert sorted(atoms.position.unique()) == [0, 1, 2, 3, 4]


def test_another_seed_draws_other_atoms_positions_and_random_writes(gdn, passages):
    one, other = (selectivity(gdn, make_sae(gdn), passages, seed=s, **HOW).records for s in (1, 2))
    assert one.position.tolist() != other.position.tolist()
    assert set(one.atom) != set(other.atom)
    assert not np.allclose(*(x.kl[x.kind == "random"] for x in (one, other)), rtol=1e-3, atol=0)
