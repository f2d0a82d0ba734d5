"""Statistics of the paper's tables, by scipy and scikit-learn."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

N_RESAMPLES = 2000
# Of the bootstrap of a median, how many resamples are computed at a time.
_AT_ONCE = 100
# A mixture is fitted from this many random starts, and the likeliest fit is taken.
_STARTS = 10


def rate(wins: ArrayLike) -> float | None:
    """The share of trials that are won; None without trials."""
    won = np.asarray(wins, dtype=float)
    return float(won.mean()) if won.size else None


def wilson_interval(wins: ArrayLike, confidence: float = 0.95) -> list[float] | None:
    """Wilson score interval of a proportion; None without trials.

    Args:
        wins: booleans.
        confidence: coverage.
    """
    won = np.asarray(wins, dtype=bool)
    if not won.size:
        return None
    interval = stats.binomtest(int(won.sum()), won.size).proportion_ci(confidence, method="wilson")
    return [float(interval.low), float(interval.high)]


def ratio(above: float | None, below: float | None) -> float | None:
    """A ratio; None where one side is not there, or the lower one is 0."""
    return None if above is None or not below else above / below


def recovered(kl: ArrayLike, kl_delete: ArrayLike) -> tuple[float | None, float | None]:
    """What of the deletions' KL a stand-in avoids: 1 - sum KL / sum KL_delete, and the median over firings.

    Shrinking a stand-in cannot raise the median; a few saturated firings can raise the sum. Both None where
    no deletion has a KL.
    """
    own, deleted = np.asarray(kl, dtype=float), np.asarray(kl_delete, dtype=float)
    moves = deleted > 0
    if not moves.any():
        return None, None
    return float(1 - own.sum() / deleted.sum()), float(np.median(1 - own[moves] / deleted[moves]))


def recovered_interval(
    kl: ArrayLike, kl_delete: ArrayLike, clusters: ArrayLike, seed: int = 0, confidence: float = 0.95
) -> list[float] | None:
    """Percentile interval of 1 - sum KL / sum KL_delete, resampling whole clusters; None for a single one."""
    frame = pd.DataFrame(
        {"kl": np.asarray(kl, dtype=float), "deleted": np.asarray(kl_delete, dtype=float), "at": clusters}
    )
    per_cluster: Any = frame.groupby("at")[["kl", "deleted"]].sum()
    sums: NDArray[np.float64] = per_cluster.to_numpy()
    if len(sums) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(sums), (N_RESAMPLES, len(sums)))
    resampled = sums[draws].sum(axis=1)
    resampled = resampled[resampled[:, 1] > 0]
    if not len(resampled):
        return None
    tail = (1 - confidence) / 2
    return np.quantile(1 - resampled[:, 0] / resampled[:, 1], [tail, 1 - tail]).tolist()


def share(value: float | None) -> str:
    """A share as text, "12.3%"; "none" for None."""
    return "none" if value is None else f"{value:.1%}"


def cluster_bootstrap(
    wins: ArrayLike, clusters: ArrayLike, seed: int = 0, confidence: float = 0.95
) -> list[float] | None:
    """Percentile interval of a mean, resampling whole clusters; None if there is a single cluster.

    Args:
        wins: booleans, or rates.
        clusters: the cluster of each value.
        seed: seed of the 2,000 resamples.
        confidence: coverage.
    """
    frame = pd.DataFrame({"win": np.asarray(wins, dtype=float), "cluster": np.asarray(clusters)})
    grouped = frame.groupby("cluster")["win"].agg(["sum", "count"]).to_numpy()
    if len(grouped) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(grouped), (N_RESAMPLES, len(grouped)))
    resampled = grouped[draws].sum(axis=1)
    tail = (1 - confidence) / 2
    return np.quantile(resampled[:, 0] / resampled[:, 1], [tail, 1 - tail]).tolist()


def median_and_error(values: ArrayLike) -> tuple[float | None, float | None]:
    """Median and MAD / sqrt(n), the paper's error of a median; both None without values."""
    x = np.asarray(values, dtype=float)
    if not x.size:
        return None, None
    return float(np.median(x)), float(stats.median_abs_deviation(x) / np.sqrt(x.size))


def median_interval(
    values: ArrayLike, clusters: ArrayLike, seed: int = 0, confidence: float = 0.95
) -> list[float] | None:
    """Percentile interval of a median, resampling whole clusters (passages); None for a single cluster."""
    x = np.asarray(values, dtype=float)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.argsort(x, kind="stable")
    x, cluster = x[order], cluster[order]
    if len(names) < 2:
        return None
    rng, medians = np.random.default_rng(seed), []
    # The values are sorted already: running counts of the draws give the two in the middle. A few draws at a
    # time, for each has as many counts as there are values.
    for start in range(0, N_RESAMPLES, _AT_ONCE):
        draws = rng.integers(0, len(names), (min(_AT_ONCE, N_RESAMPLES - start), len(names)))
        draws += len(names) * np.arange(len(draws))[:, None]
        times = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
        up_to = times[:, cluster].cumsum(axis=1)
        total = up_to[:, -1:]
        low, high = ((up_to <= middle).sum(axis=1) for middle in ((total - 1) // 2, total // 2))
        medians.append((x[low] + x[high]) / 2)
    tail = (1 - confidence) / 2
    return np.quantile(np.concatenate(medians), [tail, 1 - tail]).tolist()


def median_survival(
    times: ArrayLike, is_over: ArrayLike, clusters: ArrayLike, seed: int = 0, confidence: float = 0.95
) -> tuple[float, list[float] | None]:
    """The median time until an event by Kaplan and Meier, and its percentile interval over whole clusters.

    Args:
        times: until each trial's event, or until it was last seen.
        is_over: whether the event was seen.
        clusters: the cluster of each trial.
        seed: seed of the 2,000 resamples.
        confidence: coverage.

    Returns:
        the median, infinite where more than half of the trials outlive what was seen; and its interval, whose
        ends can be infinite, too (None for a single cluster).
    """
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    at, nth = np.unique(np.asarray(times, dtype=float), return_inverse=True)
    ended, last_seen = np.zeros((2, len(names), len(at)))
    np.add.at(ended, (cluster, nth), np.asarray(is_over, dtype=float))
    np.add.at(last_seen, (cluster, nth), 1.0)
    at_risk = last_seen[:, ::-1].cumsum(axis=1)[:, ::-1]

    def medians(drawn: NDArray[Any]) -> NDArray[np.float64]:
        """The median of each row of ``drawn``: how often each cluster counts."""
        survival = np.cumprod(1 - drawn @ ended / np.maximum(drawn @ at_risk, 1), axis=1)
        below = survival <= 0.5 + 1e-9
        return np.where(below.any(axis=1), at[below.argmax(axis=1)], np.inf)

    median = float(medians(np.ones((1, len(names))))[0])
    if len(names) < 2:
        return median, None
    draws = np.random.default_rng(seed).integers(0, len(names), (N_RESAMPLES, len(names)))
    draws += len(names) * np.arange(N_RESAMPLES)[:, None]
    drawn = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    tail = (1 - confidence) / 2
    # Without interpolation, for that between two infinite medians is not a number.
    ends = np.quantile(medians(drawn), [tail, 1 - tail], method="inverted_cdf")
    return median, ends.tolist()


def between(interval: list[float] | None, form: str) -> str:
    """An interval as text, " (low to high)" with both ends in a format; empty for None."""
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def cliffs_delta(larger: ArrayLike, smaller: ArrayLike) -> float | None:
    """P(larger > smaller) - P(larger < smaller) over all pairs, in [-1, 1]; None where a side is empty."""
    a, b = np.asarray(larger, dtype=float), np.asarray(smaller, dtype=float)
    if not a.size or not b.size:
        return None
    u = stats.mannwhitneyu(a, b).statistic
    return float(2 * u / (a.size * b.size) - 1)


def cohens_d(a: ArrayLike, b: ArrayLike) -> float | None:
    """Difference of two means in units of the pooled deviation (a - b); None where nothing varies."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    freedom = x.size + y.size - 2
    if freedom < 1:
        return None
    pooled = (((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / freedom
    return float((x.mean() - y.mean()) / np.sqrt(pooled)) if pooled > 0 else None


def paired_wilcoxon(larger: ArrayLike, smaller: ArrayLike) -> float | None:
    """p of the one-sided paired Wilcoxon test that ``larger`` exceeds ``smaller``.

    1 where all pairs are equal, None without pairs.
    """
    difference = np.asarray(larger, dtype=float) - np.asarray(smaller, dtype=float)
    if not difference.size:
        return None
    if not difference.any():
        return 1.0
    test: Any = stats.wilcoxon(difference, alternative="greater")
    return float(test.pvalue)


def mean_by_part(values: ArrayLike, size: ArrayLike, parts: int) -> list[float | None]:
    """Mean in each of several equally large parts of the trials, in order of ``size``; None where empty."""
    x = np.asarray(values, dtype=float)
    pieces: list[NDArray[Any]] = np.array_split(np.argsort(size, kind="stable"), parts)
    return [float(x[piece].mean()) if piece.size else None for piece in pieces]


def correlation(x: ArrayLike, y: ArrayLike, method: str) -> tuple[float | None, float | None]:
    """Correlation and its two-sided p; both None for fewer than 3 pairs or a constant.

    Args:
        method: "pearson" or "spearman".
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.size < 3 or not np.ptp(a) or not np.ptp(b):
        return None, None
    test: Any = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method](a, b)
    return float(test.statistic), float(test.pvalue)


def mann_whitney(a: ArrayLike, b: ArrayLike) -> float | None:
    """p of the two-sided Mann-Whitney test of two samples (1: all values equal; None: a sample is empty)."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not x.size or not y.size:
        return None
    if not np.ptp(np.concatenate([x, y])):
        return 1.0
    return float(stats.mannwhitneyu(x, y).pvalue)


class Split(NamedTuple):
    """Values divided by a two-component Gaussian mixture; the component with the larger mean is the upper.

    A wide component outweighs a narrow one on both sides of it, so the plain posterior would count the
    smallest values to the upper component. Hence one threshold: where the posterior of the upper one
    *rises* through 1/2 (None: it nowhere does, and one component has all values).
    """

    upper: NDArray[np.bool_]
    """Whether each value is at or above the threshold."""
    posterior: NDArray[np.float64]
    """Posterior of the upper component, for each value."""
    threshold: float | None
    weights: tuple[float, float]
    """Weight of the lower and of the upper component; means and deviations likewise."""
    means: tuple[float, float]
    deviations: tuple[float, float]


def can_be_mixed(values: ArrayLike, order: int) -> bool:
    """Whether a mixture can be fitted: two values per component, and as many different ones as components."""
    x = np.asarray(values, dtype=float)
    return x.size >= 2 * order and np.unique(x.round(6)).size >= order


def mixture_bic(values: ArrayLike, order: int, seed: int = 0) -> float | None:
    """BIC of a Gaussian mixture of ``order`` components (smaller is better); None unless `can_be_mixed`."""
    if not can_be_mixed(values, order):
        return None
    x = np.asarray(values, dtype=float)[:, None]
    return float(_fit_mixture(x, order, seed, _STARTS).bic(x))


def split_in_two(values: ArrayLike, seed: int = 0, starts: int = _STARTS) -> Split | None:
    """Divide values by a two-component Gaussian mixture; None unless `can_be_mixed`.

    Args:
        values: numbers, in any order.
        seed: seed of the fits' random starts.
        starts: number of fits, of which the likeliest is taken.
    """
    if not can_be_mixed(values, 2):
        return None
    x = np.asarray(values, dtype=float)
    fit: Any = _fit_mixture(x[:, None], 2, seed, starts)
    order = np.argsort(fit.means_[:, 0], kind="stable")
    weights, means = fit.weights_[order], fit.means_[order, 0]
    deviations = np.sqrt(fit.covariances_[order, 0, 0])
    threshold = _rise(weights, means, deviations)
    posterior = fit.predict_proba(x[:, None])[:, order[1]]
    upper = posterior > 0.5 if threshold is None else x >= threshold
    low, high = ([float(v[i]) for v in (weights, means, deviations)] for i in (0, 1))
    return Split(upper, posterior, threshold, *zip(low, high))


def split_stability(values: ArrayLike, n_seeds: int, seed: int = 0) -> float | None:
    """Mean adjusted Rand index over all pairs of splits, each from one random start; None without splits."""
    states = np.random.SeedSequence(seed).generate_state(n_seeds)
    splits = [split_in_two(values, int(state), starts=1) for state in states]
    pairs = [
        adjusted_rand_score(a.upper, b.upper)
        for a, b in combinations(splits, 2)
        if a is not None and b is not None
    ]
    return float(np.mean(pairs)) if pairs else None


def _fit_mixture(x: NDArray[Any], order: int, seed: int, starts: int) -> GaussianMixture:
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    fit = GaussianMixture(order, n_init=starts, max_iter=1000, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit.fit(x)


def _rise(weights: NDArray[Any], means: NDArray[Any], deviations: NDArray[Any]) -> float | None:
    """Where log(upper / lower) of two weighted normal densities crosses 0 upwards."""
    precision = 1 / deviations**2
    curve = np.polynomial.Polynomial(
        [
            np.diff(np.log(weights / deviations) - means**2 * precision / 2)[0],
            np.diff(means * precision)[0],
            -np.diff(precision)[0] / 2,
        ]
    ).trim()
    rising = [r.real for r in curve.roots() if abs(r.imag) < 1e-12 and curve.deriv()(r.real) > 0]
    return float(rising[0]) if rising else None
