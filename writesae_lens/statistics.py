"""The statistics of the paper's tables, on scipy; only the cluster bootstrap is written here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

N_RESAMPLES = 2000


def wilson_interval(wins: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        wins: booleans, at least one.
        confidence: coverage.
    """
    won = np.asarray(wins, dtype=bool)
    interval = stats.binomtest(int(won.sum()), won.size).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_bootstrap(
    wins: ArrayLike, clusters: ArrayLike, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a win rate when whole clusters (atoms, passages) are resampled.

    Args:
        wins: booleans.
        clusters: the cluster of each.
        seed: of the resampling; 2,000 resamples.
    """
    frame = pd.DataFrame({"win": np.asarray(wins, dtype=float), "cluster": np.asarray(clusters)})
    grouped = frame.groupby("cluster")["win"].agg(["sum", "count"]).to_numpy()
    draws = np.random.default_rng(seed).integers(0, len(grouped), (N_RESAMPLES, len(grouped)))
    resampled = grouped[draws].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [tail, 1 - tail])
    return float(low), float(high)


def median_and_error(values: ArrayLike) -> tuple[float, float]:
    """Median and MAD / sqrt(n), the paper's error of a median."""
    x = np.asarray(values, dtype=float)
    return float(np.median(x)), float(stats.median_abs_deviation(x) / np.sqrt(x.size))


def cliffs_delta(larger: ArrayLike, smaller: ArrayLike) -> float:
    """P(larger > smaller) - P(larger < smaller) over all pairs, in [-1, 1]."""
    a, b = np.asarray(larger, dtype=float), np.asarray(smaller, dtype=float)
    u = stats.mannwhitneyu(a, b).statistic
    return float(2 * u / (a.size * b.size) - 1)


def paired_wilcoxon(larger: ArrayLike, smaller: ArrayLike) -> float:
    """p of the one-sided paired Wilcoxon test that ``larger`` exceeds ``smaller`` (1: all pairs equal)."""
    difference = np.asarray(larger, dtype=float) - np.asarray(smaller, dtype=float)
    if not difference.any():
        return 1.0
    test: Any = stats.wilcoxon(difference, alternative="greater")
    return float(test.pvalue)


def rate_by_quartile(wins: ArrayLike, size: ArrayLike) -> list[float | None]:
    """Win rate in each quarter of the firings, from the smallest ``size`` to the largest; None if empty."""
    won = np.asarray(wins, dtype=float)
    quarters: list[NDArray[Any]] = np.array_split(np.argsort(size, kind="stable"), 4)
    return [float(won[q].mean()) if q.size else None for q in quarters]
