"""Figures of merit of stand-ins, from the KLs of a replacement test (`writesae_lens.experiments.replace`).

Each is there for the position of the write itself, for the positions after it (``_later``), and for both
together (``_both``); the last two only where the test had a horizon.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from writesae_lens import statistics
from writesae_lens.experiments.stand_ins import TITLES, UNTRAINED
from writesae_lens.experiments.swaps import floor_note

CONDITIONS = ("atom", "delete", "random")
"""The paper's stand-ins: the dictionary's own, nothing, and the control."""
# The untrained stand-ins that the headline names: the others keep one side of the write as it is.
_IN_HEADLINE = ("lookup", "pursuit")
WHEN = ("", "_later", "_both")
"""Suffixes of the figures: at the own position, over the next ``horizon``, over both."""


def kl(records: pd.DataFrame, name: str, when: str = "") -> NDArray[np.float64]:
    """The KLs of a stand-in (``kl_NAME`` and ``kl_NAME_later`` in the records), in nats."""
    if when == "_both":
        return kl(records, name) + kl(records, name, "_later")
    return records[f"kl_{name}{when}"].to_numpy(dtype=float)


def measured(records: pd.DataFrame, name: str, when: str = "") -> bool:
    """Whether the records have KLs of a stand-in there."""
    needed = ("", "_later") if when == "_both" else (when,)
    return all(f"kl_{name}{suffix}" in records for suffix in needed)


def moves(records: pd.DataFrame, when: str = "") -> NDArray[np.bool_]:
    """Whether deleting each write gives more KL than rounding alone does (its ``kl_floor``).

    Results of earlier versions have no floor: there it is 0.
    """
    floor = kl(records, "floor", when) if measured(records, "floor", when) else 0.0
    return kl(records, "delete", when) > floor


def _counted(records: pd.DataFrame, name: str, when: str) -> tuple[NDArray[Any], ...] | None:
    """KL of a stand-in, of the deletion, and passage, of the firings above the floor; None if unmeasured."""
    if not (measured(records, name, when) and measured(records, "delete", when)):
        return None
    counted = moves(records, when)
    columns = kl(records, name, when), kl(records, "delete", when), records.passage.to_numpy()
    return tuple(column[counted] for column in columns)


def standing(records: pd.DataFrame, name: str) -> dict[str, Any]:
    """What one stand-in recovers of the deletions' KL, pooled and in the median, and its win rate.

    Args:
        records: of the replacement test.
        name: the stand-in's, as in the column ``kl_NAME``.

    Returns:
        recovered, median_recovered and win_rate with each suffix of `WHEN`, over the firings above the floor
        there; None where there are none, or no later position was measured.
    """
    figures: dict[str, Any] = {}
    for when in WHEN:
        pooled = median = rate = None
        if (counted := _counted(records, name, when)) is not None:
            own, deleted, _ = counted
            pooled, median = statistics.recovered(own, deleted)
            rate = statistics.rate(own < deleted)
        figures[f"recovered{when}"] = pooled
        figures[f"median_recovered{when}"] = median
        figures[f"win_rate{when}"] = rate
    return figures


def intervals(records: pd.DataFrame, name: str, seed: int) -> dict[str, Any]:
    """95% intervals of the figures of `standing`, by a bootstrap over passages; keys end in ``_ci``."""
    ends: dict[str, Any] = {}
    for when in WHEN:
        pooled = median = rate = None
        if (counted := _counted(records, name, when)) is not None:
            own, deleted, passage = counted
            pooled = statistics.recovered_interval(own, deleted, passage, seed)
            median = statistics.median_interval(1 - own / deleted, passage, seed)
            rate = statistics.cluster_bootstrap(own < deleted, passage, seed)
        ends[f"recovered{when}_ci"] = pooled
        ends[f"median_recovered{when}_ci"] = median
        ends[f"win_rate{when}_ci"] = rate
    return ends


def own_share(records: pd.DataFrame) -> float | None:
    """The own position's share of what deleting a write does, kl_delete / (kl_delete + kl_delete_later).

    The median over firings above the floor of both together; None without a horizon.
    """
    if not measured(records, "delete", "_both"):
        return None
    counted = moves(records, "_both")
    shares = kl(records, "delete")[counted] / kl(records, "delete", "_both")[counted]
    return float(np.median(shares)) if len(shares) else None


def chain(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    """The strict chain, stand-in < delete < random, and its ceiling: the chain of the exact native write.

    The native write has a KL of 0, so its chain holds wherever a random matrix of its norm is worse than
    nothing: that share is the ceiling. It is a reference, not a bound: the chain's random matrix has the norm
    of the stand-in, the ceiling's that of the native write, so a larger stand-in can be above it.
    """
    counted = moves(records)
    deleted = kl(records, "delete")
    holds = (kl(records, "atom") < deleted) & (deleted < kl(records, "random"))
    rate = statistics.rate(holds[counted])
    ceiling = None
    if measured(records, "native_random"):
        ceiling = statistics.rate((deleted < kl(records, "native_random"))[counted])
    return {
        "strict_chain_rate": rate,
        "strict_chain_rate_ci": statistics.cluster_bootstrap(
            holds[counted], records.passage.to_numpy()[counted], seed
        ),
        "strict_chain_rate_with_floor": statistics.rate(holds),
        "chain_ceiling": ceiling,
        "chain_over_ceiling": statistics.ratio(rate, ceiling),
    }


def summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    """All figures of merit that follow from the records of a replacement test, by name."""
    atom, delete, other = (kl(records, name) for name in CONDITIONS)
    moved = moves(records)
    wins, by = atom < delete, records.loc[moved]
    summary: dict[str, Any] = {"n_firings": len(records)}
    for when in WHEN:
        there = measured(records, "delete", when)
        summary[f"n_at_floor{when}"] = int((~moves(records, when)).sum()) if there else None
    summary |= {
        "n_atoms": int(records.atom.nunique()),
        "n_passages": int(records.passage.nunique()),
        **standing(records, "atom"),
        **intervals(records, "atom", seed),
        "baselines": [
            {"name": name, **standing(records, name)}
            for name in (*UNTRAINED, "random")
            if measured(records, name)
        ],
        "win_rate_ci_by_passage": statistics.cluster_bootstrap(wins[moved], by.passage, seed),
        "win_rate_ci_by_atom": statistics.cluster_bootstrap(wins[moved], by.atom, seed),
        "win_rate_ci_wilson": statistics.wilson_interval(wins[moved]),
        "win_rate_with_floor": statistics.rate(wins),
        "win_rate_by_effect_quartile": statistics.mean_by_part(wins[moved], delete[moved], 4),
        "win_rate_matched_norm": standing(records, "atom_matched")["win_rate"],
        **chain(records, seed),
        "own_share": own_share(records),
    }
    for name, values in zip(CONDITIONS, (atom, delete, other), strict=True):
        median, error = statistics.median_and_error(values)
        summary[f"median_kl_{name}"] = median
        summary[f"median_kl_{name}_error"] = error
    medians = [summary[f"median_kl_{name}"] for name in CONDITIONS]
    summary["kl_ratio_atom_delete_random"] = [statistics.ratio(median, medians[0]) for median in medians]
    summary["cliffs_delta"] = statistics.cliffs_delta(delete[moved], atom[moved])
    summary["wilcoxon_p"] = statistics.paired_wilcoxon(delete[moved], atom[moved])
    summary["median_cosine"] = float(records.cosine.median())
    summary["median_write_norm"] = float(records.write_norm.median())
    return summary


def headline(summary: dict[str, Any], horizon: int) -> str:
    """The summary in a line: medians first, pooled beside them, then untrained stand-ins, then win rates."""

    def recovered(of: dict[str, Any], when: str) -> str:
        median, pooled = (statistics.share(of[f"{name}recovered{when}"]) for name in ("median_", ""))
        interval = statistics.between(of.get(f"median_recovered{when}_ci"), ".1%")
        return f"{median}{interval} (pooled {pooled})"

    words = f"recovered in the median {recovered(summary, '')}"
    words += f", over the next {horizon} tokens {recovered(summary, '_later')}" if horizon else ""
    for baseline in summary["baselines"]:
        if baseline["name"] in _IN_HEADLINE:
            words += f"; {TITLES[baseline['name']]} {recovered(baseline, '')}"
            words += f", over the next {horizon} {recovered(baseline, '_later')}" if horizon else ""
            if baseline.get("bits") is not None and summary.get("bits") is not None:
                words += f", at {baseline['bits']:.0f} bits a write (the SAE {summary['bits']:.0f})"
    rates = [statistics.share(summary[name]) for name in ("win_rate", "win_rate_matched_norm")]
    interval = statistics.between(summary["win_rate_ci"], ".1%")
    words += f"; win rate {rates[0]}{interval}, at matched norm {rates[1]}; {summary['n_firings']} firings"
    if summary["coverage"] < 0.9995:
        words += f" (the SAE fires at {summary['coverage']:.1%} of the positions)"
    return words + floor_note(summary["n_at_floor"])
