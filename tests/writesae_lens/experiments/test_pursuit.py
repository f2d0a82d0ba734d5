"""Untrained codes by matching pursuit, against a plain loop with least squares in float64."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import (
    LAYER,
    column,
    kl_nats,
    logits_with_swapped,
    make_codes,
    make_sae,
    read_passages,
)
from writesae_lens.experiments import replacement_test
from writesae_lens.experiments.pursuit import Pursuit, matching_pursuit
from writesae_lens.experiments.stand_ins import untrained
from writesae_lens.saes.rank1 import Factors


def by_hand(x, codes, k):
    """Orthogonal matching pursuit of one vector, by numpy's least squares."""
    units, chosen, left = codes / np.linalg.norm(codes, axis=1, keepdims=True), [], x
    for _ in range(k):
        scores = np.abs(units @ left)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        active = units[chosen].T
        left = x - active @ np.linalg.lstsq(active, x, rcond=None)[0]
    return x - left, chosen


def test_it_is_a_plain_loop_with_least_squares():
    rng = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(n, 12, generator=rng) for n in (40, 30))
    coded, chosen = matching_pursuit(x, codes, 5)
    for row, found, own in zip(x.double().numpy(), coded, chosen.tolist(), strict=True):
        expected, of_hand = by_hand(row, codes.double().numpy(), 5)
        assert own == of_hand
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # As many codes as dimensions give everything, and equal codes nothing more.
    torch.testing.assert_close(matching_pursuit(x, codes, 50)[0], x, atol=1e-4, rtol=1e-4)
    one = codes[:1].repeat(9, 1)
    torch.testing.assert_close(matching_pursuit(x, one, 4)[0], matching_pursuit(x, one, 1)[0])


def test_codes_are_sides_of_training_writes_and_bits_those_of_their_uses(gdn):
    cell = gdn.cell(LAYER, 1)
    sizes = make_codes(gdn, head=1, n_key=40, n_value=30, k_key=3, k_value=2).cfg
    made = untrained(gdn, cell, 70, read_passages(gdn, 5, 40)[2:], codes=sizes)
    train, pursuit = made.train, made.pursuit
    assert (len(pursuit.keys), len(pursuit.values)) == (40, 30)
    for codes, side in zip((pursuit.keys, pursuit.values), train, strict=True):
        cosines = codes @ torch.nn.functional.normalize(side[:, 0], dim=-1).T
        torch.testing.assert_close(cosines.amax(1), torch.ones(len(codes)))
    rng = torch.Generator().manual_seed(0)
    native = Factors(*(torch.randn(40, 1, d, generator=rng) for d in (cell.d_k, cell.d_v)))
    bits = 0.0
    sides = zip(native, (pursuit.keys, pursuit.values), (3, 2), strict=True)
    coded = []
    for side, codes, k in sides:
        rows = [by_hand(x, codes.double().numpy(), k) for x in side[:, 0].double().numpy()]
        uses = Counter(code for _, chosen in rows for code in chosen)
        bits -= sum(n * math.log2(n / uses.total()) for n in uses.values()) / len(rows)
        coded.append(np.stack([x for x, _ in rows]))
    assert pursuit.bits(native, rng) == pytest.approx(bits)
    expected = coded[0][:, :, None] * coded[1][:, None]
    np.testing.assert_allclose(pursuit.of(native).matrix(), expected, atol=1e-5)
    turned = Factors(-2 * native.key, native.value)
    torch.testing.assert_close(pursuit.of(turned).matrix(), -2 * pursuit.of(native).matrix())
    assert untrained(gdn, cell, 70, read_passages(gdn, 3, 40)).pursuit is None


def test_the_replacement_test_has_it_beside_codes_and_not_beside_atoms(gdn, monkeypatch):
    passages, sae = read_passages(gdn, 2, 40), make_codes(gdn)
    seen = []
    spied = Pursuit.of
    monkeypatch.setattr(Pursuit, "of", lambda *given: seen.append(spied(*given)) or seen[-1])
    result = replacement_test(gdn, sae, passages, horizon=4, max_firings=12, verbose=False)
    records, cell = result.records, gdn.site(sae.cfg.metadata.hook_name).cell
    assert "kl_pursuit_later" in records
    for (n, part), factors in zip(records.groupby("passage"), seen, strict=True):
        at = column(part, "position")
        matrices = list(factors.matrix().double())
        patched, base = logits_with_swapped(gdn, passages[n], at, matrices, cell.layer, cell.head)
        np.testing.assert_allclose(part.kl_pursuit, kl_nats(patched, base), atol=1e-4, rtol=1e-3)
    names = [row["name"] for row in result.summary["baselines"]]
    assert names == ["lookup", "pursuit", "mean_key", "mean_value", "random"]
    row = result.summary["baselines"][1]
    assert row["recovered_later"] == pytest.approx(
        1 - records.kl_pursuit_later.sum() / records.kl_delete_later.sum()
    )
    assert 0 < row["bits"] < 4 * 4
    assert f"untrained codes, matching pursuit {row['median_recovered']:.1%}" in result.headline
    of_atoms = replacement_test(gdn, make_sae(gdn), passages, max_firings=4, verbose=False)
    assert "kl_pursuit" not in of_atoms.records
    assert "pursuit" not in of_atoms.headline
