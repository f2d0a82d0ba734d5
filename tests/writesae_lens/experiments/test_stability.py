"""Stability against trying all matchings, and against dictionaries whose common features are known."""

from itertools import permutations

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import atoms_of, encoded, make_codes, make_sae, silenced, writes
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


def test_codes_are_matched_side_by_side_whatever_signs_each_sae_sees(gdn, passages):
    """The same codes in another order, twice as long, of an SAE that sees every write as (-k)(-v)^T."""
    one, other = make_codes(gdn, k_key=3, k_value=3), make_codes(gdn, seed=1, k_key=3, k_value=3)
    generator = torch.Generator().manual_seed(3)
    orders = {side: torch.randperm(16, generator=generator) for side in ("key", "value")}
    with torch.no_grad():
        for side, order in orders.items():
            getattr(other, f"sign_{side}").copy_(-getattr(one, f"sign_{side}"))
            for part in ("dec", "enc"):
                scale = 2 if part == "dec" else 1
                getattr(other, f"{part}_{side}")[order] = -scale * getattr(one, f"{part}_{side}")
    result = stability(gdn, {"one": one, "other": other}, passages, verbose=False)
    uses = [(encoded(gdn, sae, passages) > 0).sum((0, 1)) for sae in (one, other)]
    found = result.records[result.records.second == "other"]
    for side, first in (("key", 0), ("value", 16)):
        part, order = found[found.side == side], first + orders[side]
        assert uses[1][order].tolist() == uses[0][first : first + 16].tolist()
        active = [i for i in range(16) if uses[0][first + i]]
        assert part.feature.tolist() == [first + i for i in active]
        assert part.match.tolist() == order[active].tolist()
        np.testing.assert_allclose(part.cosine, 1, atol=1e-5)
        assert part.uses.tolist() == part.match_uses.tolist() == uses[0][part.feature.tolist()].tolist()
    assert {row["side"] for row in result.summary["table"]} == {"key", "value"}
    assert result.summary["share_above_09"] == 1
    assert result.summary["random_share_above_09"] == 0
    assert "value codes with a partner above 0.7: 100.0%" in result.headline
    with pytest.raises(WriteSAEError, match="b and a have features of different kinds"):
        stability(gdn, {"a": make_sae(gdn), "b": one}, passages, verbose=False)


@pytest.mark.parametrize("side", ["key", "value"])
def test_codes_are_matched_with_the_sides_of_writes_as_they_see_them(gdn, passages, side):
    """The lookup's directions are unit keys or values, each with the sign that the SAE sees."""
    sae = make_codes(gdn)
    result = stability(gdn, [sae], passages, verbose=False)
    left, _, right = torch.linalg.svd(writes(gdn, passages).flatten(0, 1), full_matrices=False)
    key, value = left[:, :, 0], right[:, 0]
    seen = key @ sae.sign_key.double() + value @ sae.sign_value.double()
    native = torch.where(seen < 0, -1.0, 1.0)[:, None] * (key if side == "key" else value)
    records, first = result.records, 0 if side == "key" else 16
    part = records[(records["first"] == "SAE 1") & (records.second == "lookup") & (records.side == side)]
    cosines = unit_rows(getattr(sae, f"dec_{side}").detach()) @ native.T
    assert len(part)
    for row in part.itertuples():
        assert float((cosines[row.feature - first] - row.cosine).abs().min()) < 1e-5


@pytest.mark.usefixtures("without_type_checks")
def test_saes_that_cannot_be_matched_are_refused(gdn, passages):
    sae = make_sae(gdn)
    for saes, message in (
        ({}, "no SAEs to match"),
        ({"a": sae, "b": make_sae(gdn, head=1)}, "^b belong to another cell"),
        ({"a": sae, "lookup": make_sae(gdn, seed=1)}, "lookup are reserved names"),
        ({"a": sae, "b": silenced(make_sae(gdn, seed=1))}, "nothing fires"),
        (sae, "saes must be a list of SAEs or a dict of names and SAEs, got a WriteSAE"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            stability(gdn, saes, passages, verbose=False)
