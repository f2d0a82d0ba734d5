"""Figures of the experiments' results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

if TYPE_CHECKING:
    import pandas as pd

    from writesae_lens.experiments.result import ExperimentResult

ATOM, DELETE, RANDOM, INK = "#2166ac", "#b2182b", "#8c8c8c", "#222222"
# KLs below this are rounding noise of the logits; log axes need a floor.
_FLOOR = 1e-12


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def plot_replacement(result: ExperimentResult) -> Figure:
    """The paper's figure 3: KL of atom against deletion with y = x, and the density of their log ratio."""
    records, summary = result.records, result.summary
    atom, delete, other = (
        records[f"kl_{n}"].to_numpy().clip(min=_FLOOR) for n in ("atom", "delete", "random")
    )
    figure, (scatter, density) = _figure(10.0, 4.4, 2)
    wins = atom < delete
    for mask, color, label in ((wins, ATOM, "atom nearer"), (~wins, DELETE, "deletion nearer")):
        scatter.scatter(
            delete[mask], atom[mask], s=7, alpha=0.45, lw=0, color=color, rasterized=True,
            label=f"{label} ({mask.mean():.1%})",
        )  # fmt: skip
    both = np.concatenate([atom, delete])
    ends = [both.min() / 2, both.max() * 2]
    scatter.plot(ends, ends, color=INK, lw=1, ls="--")
    scatter.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    scatter.set_xlabel("KL, write deleted (nats)")
    scatter.set_ylabel("KL, atom in its place (nats)")
    low, high = summary["win_rate_ci"]
    title = f"The atom wins at {summary['win_rate']:.1%} of {summary['n_firings']:,} firings"
    scatter.set_title(f"{title}\n95% interval {low:.1%} to {high:.1%}", fontsize=11, loc="left")
    scatter.legend(frameon=False, fontsize=9, loc="upper left")

    for values, color, label in (
        (np.log10(atom / delete), ATOM, "atom / delete"),
        (np.log10(other / delete), RANDOM, "random / delete"),
    ):
        low, high = np.quantile(values, [0.002, 0.998])
        grid = np.linspace(low - 0.3, high + 0.3, 300)
        if np.ptp(values) > 0:
            curve = stats.gaussian_kde(values)(grid)
            density.plot(grid, curve, color=color, lw=2)
            density.fill_between(grid, curve, alpha=0.18, color=color, lw=0)
        density.axvline(np.median(values), color=color, lw=1, ls=":")
        density.plot([], [], color=color, lw=2, label=f"{label}, median x{10 ** np.median(values):.2f}")
    density.axvline(0, color=INK, lw=1, ls="--")
    density.set(ylim=(0, None), yticks=[])
    density.spines["left"].set_visible(False)
    density.set_xlabel("log10 of the ratio of KLs (left of 0: nearer to native than deletion)")
    density.set_title("How much nearer", fontsize=11, loc="left")
    low, high = density.get_ylim()
    density.set_ylim(low, high * 1.22)  # room for the legend above the curves
    density.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def plot_win_rate_by_effect(result: ExperimentResult) -> Figure:
    """Where the atom fails: win rate by quartile of the deletion's effect, and by cosine to the write."""
    records, summary = result.records, result.summary
    wins = (records.kl_atom < records.kl_delete).to_numpy()
    figure, (effect, cosine) = _figure(10.0, 3.6, 2)
    rates = [rate or 0 for rate in summary["win_rate_by_effect_quartile"]]
    effect.bar(range(4), rates, color=ATOM, width=0.7)
    for i, rate in enumerate(rates):
        effect.text(i, rate + 0.015, f"{rate:.0%}", ha="center", fontsize=9, color=INK)
    effect.set_xticks(range(4), ["smallest", "2nd", "3rd", "largest"])
    effect.set_xlabel("quarter of the firings by the deletion's KL")
    effect.set_title("Win rate by what the write matters", fontsize=11, loc="left")

    order = np.argsort(records.cosine.to_numpy())
    bins = [b for b in np.array_split(order, min(10, len(order))) if len(b)]
    centers = [records.cosine.to_numpy()[b].mean() for b in bins]
    cosine.plot(centers, [wins[b].mean() for b in bins], "o-", color=ATOM, lw=1.5)
    cosine.set_xlabel("cosine of the atom to the native write (tenths of the firings)")
    cosine.set_title("Win rate by alignment", fontsize=11, loc="left")
    for axis in (effect, cosine):
        axis.set_ylim(0, 1.05)
        axis.axhline(0.5, color=INK, lw=0.8, ls="--")
    return figure


def plot_training(history: pd.DataFrame) -> Figure:
    """Unexplained share, cosine of the dominant atom, L0 and dead atoms over the steps."""
    figure, axes = _figure(10.0, 2.8, 4)
    panels = (
        ("unexplained", "share of |X|² unexplained", (0, 1.05)),
        ("cosine", "cosine of dominant atom", (0, 1.02)),
        ("l0", "atoms per write (L0)", (0, None)),
        ("dead", "dead atoms", (0, None)),
    )
    for axis, (column, title, limits) in zip(axes, panels, strict=True):
        axis.plot(history["step"], history[column], color=ATOM, lw=1.4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(xlabel="step", ylim=limits)
    return figure
