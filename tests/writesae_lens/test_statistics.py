"""Statistics against closed forms and brute force."""

import math

import numpy as np
import pytest
from scipy import stats

from writesae_lens import statistics


def test_wilson_interval_is_the_closed_form():
    n, wins, z = 4851, 4482, 1.959964
    p = wins / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = statistics.wilson_interval([True] * wins + [False] * (n - wins))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    # The paper's pooled figure: 0.924 with interval 0.916 to 0.931.
    assert (round(low, 3), round(high, 3)) == (0.916, 0.931)


def test_cluster_bootstrap_widens_with_the_clusters_and_is_reproducible():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 50)
    wins = rng.random(2000) < rng.beta(2, 1, 40)[clusters]
    low, high = statistics.cluster_bootstrap(wins, clusters, seed=1)
    assert statistics.cluster_bootstrap(wins, clusters, seed=1) == [low, high]
    # Equal clusters: the spread is that of the cluster means.
    spread = wins.reshape(40, 50).mean(1).std() / math.sqrt(40)
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert low < wins.mean() < high
    wilson = statistics.wilson_interval(wins)
    assert high - low > 2 * (wilson[1] - wilson[0])
    assert statistics.cluster_bootstrap([True] * 6, [1, 1, 2, 2, 3, 3]) == [1, 1]
    assert statistics.cluster_bootstrap([True, False], [1, 1]) is None


def test_cliffs_delta_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    pairs = np.sign(a[:, None] - b[None]).mean()
    assert statistics.cliffs_delta(a, b) == pytest.approx(pairs)
    assert statistics.cliffs_delta([2, 3], [0, 1]) == 1


def test_medians_quartiles_and_wilcoxon():
    assert statistics.median_and_error([1, 2, 3, 4, 100]) == (3, pytest.approx(1 / math.sqrt(5)))
    rates = statistics.mean_by_part([0, 0, 0, 1, 1, 0, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8], 4)
    assert rates == [0, 0.5, 0.5, 1]
    x = np.linspace(1, 2, 20)
    # All 20 differences positive and distinct: one of 2^20 equally likely sign patterns.
    assert statistics.paired_wilcoxon(x + np.arange(1, 21), x) == pytest.approx(0.5**20)
    assert statistics.paired_wilcoxon(x, x) == 1


def test_median_survival_is_kaplan_and_meiers_with_an_interval_over_clusters():
    # One of three is halved after 1; of the two that are still seen at 4, both: 2/3, then 0.
    assert statistics.median_survival([1, 2, 4], [True, False, True], [0, 0, 0]) == (4, None)
    assert statistics.median_survival([1, 9, 9], [True, False, False], [0, 0, 0]) == (np.inf, None)
    rng = np.random.default_rng(0)
    for n in range(20):
        times, over = rng.integers(1, 12, 60), rng.random(60) < rng.uniform(0.2, 1)
        clusters = np.arange(60) // 6
        median, interval = statistics.median_survival(times, over, clusters, seed=n)
        data = stats.CensoredData(uncensored=times[over].astype(float), right=times[~over].astype(float))
        survival = stats.ecdf(data).sf
        below = np.flatnonzero(survival.probabilities <= 0.5 + 1e-9)
        assert median == (survival.quantiles[below[0]] if len(below) else np.inf)
        assert interval is not None
        low, high = interval
        assert low <= median <= high
    # Where every cluster has the same trials, resampling changes nothing.
    same = statistics.median_survival([1, 3, 8] * 5, [True, True, False] * 5, np.repeat(range(5), 3))
    assert same == (3, [3, 3])
