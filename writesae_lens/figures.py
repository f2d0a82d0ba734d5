"""Figures of the experiments' results."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from writesae_lens.statistics import between

if TYPE_CHECKING:
    import pandas as pd

    from writesae_lens.experiments.result import ExperimentResult

ATOM, DELETE, RANDOM, INK = "#2166ac", "#b2182b", "#8c8c8c", "#222222"
# KLs below this are rounding noise of the logits; log axes need a floor.
_FLOOR = 1e-12


class _Shown(Figure):
    """A figure that a notebook shows, whether or not it has imported pyplot."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def as_png(figure: Figure, dpi: int = 100) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list]:
    figure = _Shown(figsize=(width, height), layout="constrained")
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


def plot_replacement_by_effect(result: ExperimentResult) -> Figure:
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
    """Loss, unexplained share, cosine of the dominant atom, L0 and dead atoms over the steps, as recorded."""
    panels = (
        ("loss", "loss", (0, None)),
        ("unexplained", "share of |X|² unexplained", (0, 1.05)),
        ("cosine", "cosine of dominant atom", (0, 1.02)),
        ("l0", "atoms per write (L0)", (0, None)),
        ("dead", "dead atoms", (0, None)),
    )
    known = [
        panel for panel in panels if panel[0] in history and bool(history[panel[0]].notna().to_numpy().any())
    ]
    figure, axes = _figure(2.6 * len(known), 2.8, len(known))
    for axis, (column, title, limits) in zip(axes, known, strict=True):
        axis.plot(history["step"], history[column], color=ATOM, lw=1.4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(xlabel="step", ylim=limits)
    return figure


def plot_formula(result: ExperimentResult) -> Figure:
    """The paper's figure of the audit: predicted against measured shifts, and R2 by size and by horizon."""
    records, summary = result.records, result.summary
    figure, (scatter, sizes, horizons) = _figure(13.0, 4.2, 3)
    epsilons = sorted(records.epsilon.unique())
    shades = [ATOM, "#67a9cf", "#ef8a62", DELETE]
    for number, epsilon in reversed(list(enumerate(epsilons))):
        part = records[records.epsilon == epsilon]
        part = part.sample(min(len(part), 2000), random_state=0)
        label, color = f"{epsilon:g}", shades[number % len(shades)]
        scatter.scatter(part.predicted, part.measured, s=5, alpha=0.4, lw=0, color=color, label=label,
                        rasterized=True)  # fmt: skip
    ends = np.quantile(records.measured, [0.0, 1.0])
    scatter.plot(ends, ends, color=INK, lw=1, ls="--")
    linear = max(float(records.measured.abs().quantile(0.5)), 1e-12)
    scatter.set_xscale("symlog", linthresh=linear)
    scatter.set_yscale("symlog", linthresh=linear)
    scatter.tick_params(axis="x", labelrotation=45)
    scatter.set_xlabel("predicted shift of the logit")
    scatter.set_ylabel("measured shift of the logit")
    r2 = summary["median_r2"]
    title = "nothing moves" if r2 is None else f"median R² {r2:.4f}"
    scatter.set_title(f"{summary['form']}: {title}", fontsize=11, loc="left")
    scatter.legend(
        frameon=False, fontsize=9, markerscale=3, title=f"size ({summary['eps_unit'].replace('_', ' ')}s)"
    )
    for axis, level, title in (
        (sizes, "eps", "by size of what is added"),
        (horizons, "horizon", "by horizon t − t0"),
    ):
        medians = {float(at): x for at, x in summary[f"median_r2_by_{level}"].items() if x is not None}
        axis.plot(list(medians), [max(x, -1) for x in medians.values()], "o-", color=ATOM, lw=1.5)
        axis.set(ylim=(min([0.0, *(max(x, -1) for x in medians.values())]) - 0.02, 1.02))
        axis.axhline(1, color=INK, lw=0.8, ls="--")
        axis.set_title(f"Median R² {title}", fontsize=11, loc="left")
    sizes.set_xscale("log")
    return figure


_CLASSES = {"register": ATOM, "bundle": DELETE}


def plot_population(result: ExperimentResult) -> Figure:
    """Each atom's win rate against its median cosine, by class, with the means of fifths of the atoms."""
    records, summary = result.records, result.summary
    figure, (axis,) = _figure(6.4, 4.4, 1)
    classes = records["class"].fillna("not divided")
    for name in sorted(classes.unique(), reverse=True):
        part = records[classes == name]
        axis.scatter(
            part.median_cosine, part.win_rate, s=4 + 1.2 * part.n_firings.clip(upper=60), alpha=0.5, lw=0,
            color=_CLASSES.get(name, RANDOM), rasterized=True,
            label=f"{name}: {len(part):,} atoms, mean {part.win_rate.mean():.1%}",
        )  # fmt: skip
    fifths = [summary["cosine_by_quintile"], summary["win_rate_by_cosine_quintile"]]
    points = [pair for pair in zip(*fifths, strict=True) if None not in pair]
    axis.plot(*zip(*points, strict=True), "o-", color=INK, lw=1.5, ms=4, label="fifths of the atoms")
    axis.axhline(0.5, color=INK, lw=0.8, ls="--")
    axis.set(ylim=(-0.03, 1.03))
    axis.set_xlabel("median cosine of the atom to the native write")
    axis.set_ylabel("win rate of the atom")
    interval = between(summary["mean_win_rate_ci"], ".1%")
    title = f"The mean atom wins at {summary['mean_win_rate']:.1%} of its firings"
    axis.set_title(f"{title}\n95% interval{interval or ': none, for one atom'}", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def plot_partition(result: ExperimentResult) -> Figure:
    """Median cosines by class under the mixture's densities; registers by threshold; BIC by order."""
    records, summary = result.records, result.summary
    figure, (histogram, sweep, orders) = _figure(13.0, 4.0, 3)
    alive = records[records["class"].isin(list(_CLASSES))]
    low, high = alive.median_cosine.min(), alive.median_cosine.max()
    margin = 0.05 * (high - low) + 0.01
    bins = np.linspace(low - margin, high + margin, 41)
    histogram.hist(
        [alive.loc[alive["class"] == name, "median_cosine"] for name in _CLASSES],
        bins=list(bins), stacked=True, color=list(_CLASSES.values()), alpha=0.55,
        label=[f"{name} ({summary[f'n_{name}']:,})" for name in _CLASSES],
    )  # fmt: skip
    mixture, threshold = summary["mixture"], summary["threshold"]
    if mixture:
        grid = np.linspace(bins[0], bins[-1], 400)
        unit = len(alive) * (bins[1] - bins[0])
        components = zip(*(mixture[name] for name in ("weights", "means", "deviations")), strict=True)
        curves = [unit * w * stats.norm.pdf(grid, m, d) for w, m, d in components]
        for curve, color in zip(curves, (DELETE, ATOM), strict=True):
            histogram.plot(grid, curve, color=color, lw=1.8)
        histogram.plot(grid, sum(curves), color=INK, lw=1, ls=":", label="mixture")
    if threshold is not None:
        for axis in (histogram, sweep):
            axis.axvline(threshold, color=INK, lw=1, ls="--", label=f"posterior 1/2 at {threshold:.2f}")
    histogram.set_xlim(bins[0], bins[-1])
    histogram.set_xlabel("median cosine of the atom to the native write")
    histogram.set_ylabel("atoms")
    title = (
        f"{summary['n_register']:,} registers, {summary['n_bundle']:,} bundles, {summary['n_dead']:,} dead"
    )
    histogram.set_title(title, fontsize=11, loc="left")
    histogram.legend(frameon=False, fontsize=9, loc="upper left")

    counts = summary["n_register_by_threshold"]
    sweep.plot([float(t) for t in counts], list(counts.values()), "o-", color=ATOM, lw=1.5)
    sweep.set(ylim=(0, None))
    sweep.set_xlabel("cosine threshold in the mixture's place")
    sweep.set_ylabel("registers")
    sweep.set_title("Registers by threshold", fontsize=11, loc="left")

    bic = summary["bic_by_order"]
    orders.plot(list(bic), list(bic.values()), "o-", color=ATOM, lw=1.5)
    orders.set_xlabel("components of the mixture")
    orders.set_ylabel("BIC (lower is better)")
    delta = summary["delta_bic"]
    said = "no mixture could be fitted" if delta is None else f"two against one {delta:+,.1f}"
    orders.set_title(f"BIC by order: {said}", fontsize=11, loc="left")
    return figure


def plot_erasure(result: ExperimentResult) -> Figure:
    """Change of the watched token's log-probability by condition, and its median by dose."""
    records, summary = result.records, result.summary
    figure, (spread, doses) = _figure(10.0, 4.0, 2)
    colors = {"firing": ATOM, "elsewhere": DELETE, "random": RANDOM}
    names = [name for name in colors if summary[f"n_{name}"]]
    at = records[records.dose == summary["dose"]]
    groups = [at.loc[at.condition == name, "delta_logp"] for name in names]
    boxes = spread.boxplot(groups, tick_labels=names, showfliers=False, patch_artist=True, widths=0.5)
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=colors[name], alpha=0.4)
    for line in boxes["medians"]:
        line.set(color=INK)
    spread.axhline(0, color=INK, lw=0.8, ls="--")
    token = summary["preferred_token_text"] or summary["preferred_token"]
    spread.set_ylabel(f"change of log p of {token!r} (nats)")
    interval = between(summary["delta_logp_ci_firing"], "+.3f")
    title = f"Atom {summary['atom']} erased: {summary['median_delta_logp_firing']:+.3f}"
    spread.set_title(f"{title}{interval}", fontsize=11, loc="left")
    for name in names:
        medians = summary[f"median_delta_logp_by_dose_{name}"]
        doses.plot([float(d) for d in medians], list(medians.values()), "o-", color=colors[name], label=name)
    doses.axhline(0, color=INK, lw=0.8, ls="--")
    doses.set_xlabel("dose (multiples of what the atom writes)")
    doses.set_title("Median change by dose", fontsize=11, loc="left")
    doses.legend(frameon=False, fontsize=9)
    return figure


def plot_signs(result: ExperimentResult) -> Figure:
    """Measured against predicted shifts, for the prediction of the direction and for the true derivative."""
    records, summary = result.records, result.summary
    panels = [("linear", "agreement_linear", "derivative")]
    if summary["direction"] != "jacobian":  # whose predictions are the derivative's
        panels.insert(0, ("predicted", "agreement", summary["direction"]))
    figure, axes = _figure(4.5 * len(panels), 4.2, len(panels))
    limit = max(float(records.measured.abs().quantile(0.5)), 1e-12)
    for axis, (column, rate, title) in zip(axes, panels, strict=True):
        agrees = np.sign(records[column]) == np.sign(records.measured)
        for mask, color, label in ((agrees, ATOM, "signs agree"), (~agrees, DELETE, "signs differ")):
            part = records[mask]
            axis.scatter(part[column], part.measured, s=6, alpha=0.4, lw=0, color=color, label=label,
                         rasterized=True)  # fmt: skip
        axis.axhline(0, color=INK, lw=0.8)
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_xscale("symlog", linthresh=max(float(np.median(records[column].abs())), 1e-12))
        axis.set_yscale("symlog", linthresh=limit)
        axis.set_xlabel("predicted shift of the logit")
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_title(f"{title}: signs agree in {summary[rate]:.1%}", fontsize=11, loc="left")
    axes[0].set_ylabel("measured shift of the logit")
    axes[0].legend(frameon=False, fontsize=9, markerscale=3)
    return figure


def plot_install(result: ExperimentResult) -> Figure:
    """Target in the continuation by stratum and by magnitude, installed, native and with a random write."""
    summary = result.summary
    figure, axes = _figure(10.0, 4.0, 2)
    bars = (("target", ATOM, summary["direction"]), ("control_target", RANDOM, "random write"),
            ("native_target", DELETE, "native"))  # fmt: skip
    for axis, column in zip(axes, ("stratum", "magnitude"), strict=True):
        groups = summary[f"by_{column}"]
        for shift, (name, color, label) in zip((-0.27, 0, 0.27), bars, strict=True):
            heights = [group[f"{name}_in_continuation"] for group in groups.values()]
            axis.bar(np.arange(len(groups)) + shift, heights, width=0.25, color=color, label=label)
        names = [name.replace("_", " ") if column == "stratum" else f"{float(name):g} x" for name in groups]
        axis.set_xticks(range(len(groups)), names)
        axis.set(ylim=(0, 1.05), xlim=(-0.6, max(len(names), 3) - 0.4))  # one group is no wall of color
        axis.set_title(f"By {column}", fontsize=11, loc="left")
    axes[0].set_ylabel(f"target in the next {summary['n_tokens']} tokens")
    axes[1].legend(frameon=False, fontsize=9)
    low, high = summary["target_in_continuation_ci"]
    said = f"Target said in {summary['target_in_continuation']:.1%} of {summary['n_installs']:,} installs"
    figure.suptitle(f"{said} ({low:.1%} to {high:.1%})", fontsize=11, x=0.02, ha="left")
    return figure


def plot_splice(result: ExperimentResult) -> Figure:
    """Each passage's loss after the splice and after the deletion, against its native loss."""
    records, summary = result.records, result.summary
    figure, (axis,) = _figure(5.4, 4.6, 1)
    for name, color in (("deleted", DELETE), ("spliced", ATOM)):
        rise = summary["increase_percent" + ("_deleted" if name == "deleted" else "")]
        axis.scatter(records.nll_native, records[f"nll_{name}"] - records.nll_native, s=14, alpha=0.7, lw=0,
                     color=color, label=f"{name}: perplexity {rise:+.2f}%")  # fmt: skip
    axis.axhline(0, color=INK, lw=0.8, ls="--")
    axis.set_xlabel("native loss of the second half (nats a token)")
    axis.set_ylabel("rise of the loss (nats a token)")
    heads = f"{summary['n_heads']} head{'s' * (summary['n_heads'] > 1)}"
    axis.set_title(f"The first half's memory replaced in {heads}", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9)
    return figure


def plot_amplification(result: ExperimentResult) -> Figure:
    """Each text statistic by condition, a point a text."""
    records, summary = result.records, result.summary
    by = summary["by_condition"]
    names = {
        "newlines_per_400": "newlines in 400 tokens",
        "distinct_tokens": "share of different tokens",
        "repeated_4grams": "share of repeated 4-grams",
        "characters_per_token": "characters a token",
    }
    figure, axes = _figure(13.0, 3.6, len(names))
    jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(records))
    place = records.condition.map({name: i for i, name in enumerate(by)}).to_numpy() + jitter
    for axis, (column, title) in zip(axes, names.items(), strict=True):
        axis.scatter(place, records[column], s=10, alpha=0.5, lw=0, color=RANDOM)
        axis.plot(range(len(by)), [group[column] for group in by.values()], "o-", color=ATOM)
        axis.set_xticks(range(len(by)), list(by), fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
    return figure


def plot_selectivity(result: ExperimentResult) -> Figure:
    """Overlap of the moved tokens: the same matrix elsewhere, others at the same place, chance."""
    summary = result.summary
    figure, (axis,) = _figure(5.6, 4.0, 1)
    for shift, kind, color in ((-0.18, "atom", ATOM), (0.18, "random", RANDOM)):
        heights = [summary[f"{name}_overlap_{kind}"] or 0 for name in ("own", "other")]
        label = "atoms" if kind == "atom" else "random rank-1"
        axis.bar(np.arange(2) + shift, heights, width=0.34, color=color, label=label)
        for i, height in enumerate(heights):
            axis.text(i + shift, height + 0.01, f"{height:.2f}", ha="center", fontsize=9)
    axis.axhline(summary["chance_overlap"], color=INK, lw=0.8, ls="--", label="chance")
    axis.set_xticks([0, 1], ["same matrix,\nother position", "other matrix,\nsame position"])
    axis.set_ylabel(f"shared part of the {summary['top_k']} tokens moved most")
    axis.margins(y=0.3)
    axis.set_title("Are the tokens that an atom moves its own?", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9)
    return figure


def plot_readers(result: ExperimentResult) -> Figure:
    """Change of what each head reads, by layer and head, and by horizon for the own head and later layers."""
    records, summary = result.records, result.summary
    figure, (heads, horizons) = _figure(10.0, 3.8, 2)
    atoms = records[records.kind == "atom"]
    table = atoms.pivot_table(index="layer", columns="head", values="change", aggfunc="mean")
    image = heads.imshow(table.to_numpy(), cmap="Blues", aspect="auto", vmin=0)
    heads.set_xticks(range(table.shape[1]), list(table.columns))
    heads.set_yticks(range(table.shape[0]), list(table.index))
    heads.set(xlabel="head", ylabel="layer")
    heads.set_title("Change of what a head reads, mean over horizons", fontsize=11, loc="left")
    figure.colorbar(image, ax=heads, shrink=0.8)
    for name, color, label in (
        ("own_change_by_horizon", ATOM, "the atom's own head"),
        ("change_by_horizon", DELETE, "later layers, mean of heads"),
    ):
        found = summary[name]
        horizons.plot([int(h) for h in found], list(found.values()), "o-", ms=3, color=color, label=label)
    horizons.set(xlabel="tokens since the write", ylim=(0, None))
    horizons.set_title("For how long", fontsize=11, loc="left")
    horizons.legend(frameon=False, fontsize=9)
    return figure


def plot_contexts(result: ExperimentResult) -> Figure:
    """How pure in tokens the atoms' strongest contexts are, and how strong they are."""
    records = result.records
    figure, (purity, strength) = _figure(9.0, 3.8, 2)
    shares = records.groupby("atom").token.agg(lambda t: t.value_counts().iloc[0] / len(t))
    purity.hist(shares[records.groupby("atom").size() > 1], bins=list(np.linspace(0, 1, 21)), color=ATOM)
    purity.set(xlabel="share of the most common token", ylabel="atoms", xlim=(0, 1))
    purity.set_title("Top contexts of an atom on one token", fontsize=11, loc="left")
    first = records[records["rank"] == 1]
    strength.scatter(first.cosine, first.coefficient, s=6, alpha=0.4, lw=0, color=ATOM, rasterized=True)
    strength.set(xlabel="cosine to the native write there", ylabel="largest coefficient", yscale="log")
    strength.set_title("Each atom's strongest position", fontsize=11, loc="left")
    return figure


def plot_comparison(result: ExperimentResult) -> Figure:
    """Win rate with its interval, and the distribution of KL, of every stand-in."""
    records, table = result.records, result.summary["table"]
    figure, (rates, spread) = _figure(11.0, 0.9 + 0.42 * len(table), 2)
    saes = set(result.summary["names"])
    names = [row["name"] for row in table][::-1]
    for place, row in enumerate(reversed(table)):
        color = ATOM if row["name"] in saes else DELETE if row["name"] == "delete" else RANDOM
        if row["win_rate"] is not None:
            rates.plot(row["win_rate_ci"], [place, place], color=color, lw=2)
            rates.plot([row["win_rate"]], [place], "o", color=color)
            rates.text(1.02, place, f"{row['win_rate']:.1%}", va="center", fontsize=9)
        logs = np.log10(records.loc[records["name"] == row["name"], "kl"].clip(lower=_FLOOR))
        box = spread.boxplot([logs], positions=[place], orientation="horizontal", showfliers=False,
                             widths=0.55, patch_artist=True)  # fmt: skip
        box["boxes"][0].set(facecolor=color, alpha=0.4)
        box["medians"][0].set(color=INK)
    rates.axvline(0.5, color=INK, lw=0.8, ls="--")
    rates.set(xlim=(0, 1))
    rates.set_xlabel("win rate against deletion")
    rates.set_title(f"{result.summary['n_firings']:,} shared firings", fontsize=11, loc="left")
    spread.set_xlabel("log10 KL to the native distribution (nats)")
    spread.set_title("How far from native", fontsize=11, loc="left")
    for axis in (rates, spread):
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    return figure


# By experiment: file stem to what draws it from the result.
FIGURES: dict[str, dict[str, Callable[[ExperimentResult], Figure]]] = {
    "replacement": {"replacement": plot_replacement, "replacement_by_effect": plot_replacement_by_effect},
    "population": {"population": plot_population},
    "partition": {"partition": plot_partition},
    "formula": {"formula": plot_formula},
    "erasure": {"erasure": plot_erasure},
    "sign": {"signs": plot_signs},
    "install": {"install": plot_install},
    "splice": {"splice": plot_splice},
    "amplification": {"amplification": plot_amplification},
    "selectivity": {"selectivity": plot_selectivity},
    "readers": {"readers": plot_readers},
    "contexts": {"contexts": plot_contexts},
    "comparison": {"comparison": plot_comparison},
}
