"""Stability against trying all matchings, and against dictionaries whose common features are known."""

from itertools import permutations

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import atoms_of, encoded, make_sae, silenced, writes
from writesae_lens import WriteSAEError
from writesae_lens.experiments import stability


def few(model, seed, kind="write", **options):
    """An SAE of five atoms, all of which fire somewhere."""
    return make_sae(model, kind, **({"seed": seed, "d_sae": 5, "k": 3} | options))


def unit_rows(matrices):
    flat = matrices.flatten(1).double()
    return flat / flat.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"decoder": "dense", "encoder": "dense"}, {"kind": "flat"}]
)
def test_atoms_are_matched_as_by_trying_all_matchings(gdn, passages, options):
    saes = {name: few(gdn, seed, **options) for seed, name in enumerate(("a", "b", "c"))}
    result = stability(gdn, saes, passages, verbose=False)
    uses = {name: (encoded(gdn, sae, passages) > 0).sum((0, 1)) for name, sae in saes.items()}
    alive = {name: [i for i in range(5) if uses[name][i]] for name in saes}
    rows = {(row["first"], row["second"]): row for row in result.summary["table"]}
    controls = [(name, "lookup") for name in saes] + [("lookup", "lookup"), ("random", "random")]
    assert list(rows) == [("a", "b"), ("a", "c"), ("b", "c"), *controls]
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        cosines = unit_rows(atoms_of(saes[one], gdn)) @ unit_rows(atoms_of(saes[other], gdn)).T
        small, large = sorted((alive[one], alive[other]), key=len)
        turned = cosines if small is alive[one] else cosines.T
        best = max(
            permutations(large, len(small)),
            key=lambda order: sum(float(turned[i, j]) for i, j in zip(small, order, strict=True)),
        )
        expected = sorted(zip(small, best, strict=True))
        pairs = expected if small is alive[one] else sorted((j, i) for i, j in expected)
        part = result.records[(result.records["first"] == one) & (result.records.second == other)]
        assert sorted(zip(part.feature, part.match, strict=True)) == pairs
        np.testing.assert_allclose(
            part.cosine, [cosines[i, j] for i, j in zip(part.feature, part.match)], atol=1e-5
        )
        assert part.uses.tolist() == uses[one][part.feature.tolist()].tolist()
        assert part.match_uses.tolist() == uses[other][part.match.tolist()].tolist()
        row = rows[one, other]
        assert (row["side"], row["n_first"], row["n_second"]) == ("atom", len(alive[one]), len(alive[other]))
        assert row["median_cosine"] == pytest.approx(np.median(part.cosine))


def test_shared_atoms_are_found_in_any_order_and_weighted_by_use(gdn, passages):
    one, other = (make_sae(gdn, seed=seed, encoder="tied", k=4) for seed in (0, 1))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name in ("dec_key", "dec_value"):
            mine, theirs = getattr(one, name), getattr(other, name)
            theirs[order[:20]] = mine[:20]
        other.dec_key[order[:20]] *= 2  # norms do not matter
        other.dec_value[order[0]] *= -1  # signs do: this atom writes the opposite
    result = stability(gdn, {"one": one, "other": other}, passages, verbose=False)
    uses = [(encoded(gdn, sae, passages) > 0).sum((0, 1)) for sae in (one, other)]
    shared = [i for i in range(1, 20) if uses[0][i] and uses[1][order[i]]]
    (row,) = (row for row in result.summary["table"] if row["second"] == "other")
    n = int((uses[0] > 0).sum() + (uses[1] > 0).sum())
    weight = sum(int(uses[0][i] + uses[1][order[i]]) for i in shared) / int(uses[0].sum() + uses[1].sum())
    for level in ("07", "09"):
        assert row[f"share_above_{level}"] == pytest.approx(2 * len(shared) / n)
        assert row[f"share_of_uses_above_{level}"] == pytest.approx(weight)
        assert result.summary[f"share_above_{level}"] == pytest.approx(2 * len(shared) / n)
        assert result.summary[f"random_share_above_{level}"] == 0
    found = result.records[(result.records.second == "other") & (result.records.cosine > 0.9)]
    assert sorted(found.feature) == shared
    assert found.match.tolist() == order[found.feature.tolist()].tolist()


def test_lookups_are_writes_of_the_text_drawn_once(gdn, passages):
    sae = make_sae(gdn)
    result = stability(gdn, [sae], passages, verbose=False)
    assert {row["first"] for row in result.summary["table"]} == {"SAE 1", "lookup", "random"}
    assert result.summary["share_above_07"] is None
    native = unit_rows(writes(gdn, passages).flatten(0, 1))
    units = unit_rows(atoms_of(sae, gdn))
    part = result.records[(result.records["first"] == "SAE 1") & (result.records.second == "lookup")]
    cosines = units @ native.T
    for row in part.itertuples():
        assert float((cosines[row.feature] - row.cosine).abs().min()) < 1e-5
    pairs = result.records[(result.records["first"] == "lookup") & (result.records.second == "lookup")]
    among = (native @ native.T).fill_diagonal_(9)
    for cosine in pairs.cosine:
        assert float((among - cosine).abs().min()) < 1e-5
    assert len(pairs) == min(20, int((encoded(gdn, sae, passages) > 0).any(1).any(0).sum()))
    assert result.summary["lookup_median_cosine"] == pytest.approx(pairs.cosine.median())


@pytest.mark.usefixtures("without_type_checks")
def test_saes_that_cannot_be_matched_are_refused(gdn, passages):
    sae = make_sae(gdn)
    for saes, message in (
        ({}, "no SAEs to match"),
        ({"a": sae, "b": make_sae(gdn, head=1)}, "^b belong to another cell"),
        ({"a": sae, "lookup": make_sae(gdn, seed=1)}, "lookup are reserved names"),
        ({"a": sae, "b": silenced(make_sae(gdn, seed=1))}, "no atom fires"),
        (sae, "saes must be a list of SAEs or a dict of names and SAEs, got a WriteSAE"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            stability(gdn, saes, passages, verbose=False)
