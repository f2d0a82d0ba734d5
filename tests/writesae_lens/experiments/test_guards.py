"""The guards against plain loops over firings."""

import math

import numpy as np
import pytest
import torch

from writesae_lens.experiments.features import guards
from writesae_lens.experiments.features.activity import Activity
from writesae_lens.experiments.features.guards import Guards, nearest_cosines
from writesae_lens.saes.rank1 import Factors

SIDES = {"atom": {"atom": range(32)}, "codes": {"key": range(20), "value": range(20, 32)}}
N_KEY = {"atom": 0, "codes": 20}


def some_acts(seed, n=60):
    """Sparse coefficients with few features that are used often, some positions without any."""
    rng = torch.Generator().manual_seed(seed)
    likely = torch.linspace(0.02, 0.5, 32).square()
    acts = torch.rand(n, 32, generator=rng) * (torch.rand(n, 32, generator=rng) < likely)
    acts[:4] = 0
    return acts


def rank_1(n, rng):
    return Factors(torch.randn(n, 1, 5, generator=rng), torch.randn(n, 1, 7, generator=rng))


def active(acts, native, n_key=0):
    return Activity.of([acts], native.key[:, 0], native.value[:, 0], n_key)


@pytest.mark.parametrize("kind", SIDES)
def test_every_figure_is_a_loop_over_the_firings(kind):
    rng, counted = torch.Generator().manual_seed(0), Guards()
    parts = [(some_acts(seed), rank_1(60, rng)) for seed in (1, 2)]
    train = rank_1(40, rng)
    for acts, native in parts:
        counted.add(active(acts, native, N_KEY[kind]))
    firings, cosines, alive = [], [], set()
    for acts, native in parts:
        for row, write in zip(acts.tolist(), native.matrix(), strict=True):
            on = [[i for i in side if row[i] > 0] for side in SIDES[kind].values()]
            if not all(on):
                continue
            alive |= {i for side in on for i in side}
            firings.append([[max(range(32), key=row.__getitem__)]] if kind == "atom" else on)
            others = [torch.cosine_similarity(write.flatten(), x.flatten(), 0) for x in train.matrix()]
            cosines.append(float(max(others)))
    sides = range(len(SIDES[kind]))
    uses = [[i for firing in firings for i in firing[side]] for side in sides]
    bits = [
        sum(-math.log2(uses[side].count(i) / len(uses[side])) for side in sides for i in firing[side])
        for firing in firings
    ]
    seen = [all(uses[side].count(i) >= 5 for side in sides for i in firing[side]) for firing in firings]
    # Writes are 5 x 7.
    free = [
        1 if kind == "atom" else min(len(firing[0]), 5) + min(len(firing[1]), 7) - 1 for firing in firings
    ]
    summary = counted.summary(train)
    assert 0 < len(firings) < 120
    assert summary["bits"] == pytest.approx(np.mean(bits), rel=1e-9)
    assert summary["free_dimensions"] == pytest.approx(np.mean(free))
    assert summary["seen_share"] == pytest.approx(np.mean(seen))
    assert 0 < summary["seen_share"] < 1
    assert summary["free_dimensions_of_a_write"] == 11
    assert summary["n_train_writes"] == 40
    assert summary["n_features_active"] == len(alive)
    assert summary["nearest_train_cosine"] == pytest.approx(np.median(cosines), abs=1e-5)
    assert counted.summary()["nearest_train_cosine"] is None


def test_features_that_are_used_equally_have_the_bits_of_their_number():
    counted = Guards()
    counted.add(active(torch.eye(32), rank_1(32, torch.Generator().manual_seed(0))))
    assert counted.summary()["bits"] == pytest.approx(5)
    assert counted.summary()["seen_share"] == 0


def test_no_firing_has_no_figures():
    counted = Guards()
    counted.add(active(torch.zeros(3, 32), rank_1(3, torch.Generator().manual_seed(0))))
    names = "bits", "free_dimensions", "free_dimensions_of_a_write", "seen_share", "nearest_train_cosine"
    for train, n in ((None, None), (rank_1(2, torch.Generator().manual_seed(1)), 2)):
        expected = dict.fromkeys(names) | {"n_train_writes": n, "n_features_active": 0}
        assert counted.summary(train) == expected


def test_a_write_among_the_others_is_its_own_nearest(monkeypatch):
    monkeypatch.setattr(guards, "_COSINES", 50)  # several blocks
    writes = rank_1(30, torch.Generator().manual_seed(0))
    same = Factors(-3 * writes.key, -writes.value)
    torch.testing.assert_close(nearest_cosines(writes, same), torch.ones(30))
    opposite = Factors(writes.key[:1], -writes.value[:1])
    assert float(nearest_cosines(writes[:1], opposite)[0]) == pytest.approx(-1)
