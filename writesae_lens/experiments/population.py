"""Population test (paper, experiment 2): the replacement test for every feature that fires."""

from __future__ import annotations

from typing import Any

import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens import measures, statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import EXPERIMENTS, experiment, figure
from writesae_lens.experiments.features.sides import firings_by_feature
from writesae_lens.experiments.options import Count, Seed
from writesae_lens.experiments.origin import call_of, with_warnings
from writesae_lens.experiments.partition import CLASS_COLORS, class_names
from writesae_lens.experiments.replace import replacement_test
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import MEASURED_ON
from writesae_lens.figures import ATOM, DELETE, INK, RANDOM, new_figure


@experiment(
    "population",
    paper=2,
    question="What does each feature's stand-in recover, and how often does it win the replacement test?",
    row="a feature: an atom, a key code or a value code",
    table=("mean_recovered", "mean_win_rate", "n_atoms"),
    max_passages=64,
    passes_on="replace",
)
def population_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    max_firings_per_atom: Count | None = 30,
    min_firings: Count = 5,
    baselines: bool = False,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
    **options: Any,
) -> ExperimentResult:
    """What the replacement test finds for each feature; in its means frequent ones count no more than others.

    Runs `replacement_test` with at most ``max_firings_per_atom`` firings of each atom, drawn at random, and
    makes one row of every atom with at least ``min_firings`` of them above the floor of rounding, as
    `replacement_test` tells them. Of codes, each firing counts for its dominant key code and for its dominant
    value code: two rows' firings, whose stand-in is made of all that are active. The mean win rate over atoms
    is the paper's population figure. Classes are those of `partition_atoms`, from the median cosines of these
    atoms at these firings; codes have none.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        max_firings_per_atom: firings of an atom to test (None: all).
        min_firings: atoms with fewer tested firings above the floor are counted as too rare and left out.
        baselines: test the untrained stand-ins too. No figure here is theirs: they are of use only to a
            `replacement_test` that reads the same ``progress_folder``.
        seed: seed of the thinning, the random matrices, the bootstrap and the mixture.
        progress_folder: keeps finished passages, and resumes from them; `replacement_test` with the same
            settings, ``baselines`` among them, reads the same folder.
        verbose: show a progress bar.
        options: any other argument of `replacement_test`: scale, random, kl, replaces, skip_positions, ...

    Returns:
        a result. ``records`` has one row per feature: atom (its number), side ("atom", "key" or "value"),
        n_firings, recovered (median over its firings of 1 - kl_atom / kl_delete) and, with a horizon,
        recovered_later, win_rate, strict_chain_rate, median_cosine (signed, of the stand-in and the write),
        median_kl_atom, median_kl_delete (nats), class ("register", "bundle", or None for codes and where
        fewer than 4 atoms or equal cosines allow no partition). ``summary`` has mean and median over features
        of recovered (mean_recovered, median_recovered), recovered_later and win_rate, the means with 95%
        intervals (bootstrap over features; one feature that does harm can make a mean of recovered negative),
        mean_strict_chain_rate, of codes also the means of each side (mean_recovered_key, ...); win rate and
        number of atoms by class with the two-sided Mann-Whitney p between the classes, Pearson's and
        Spearman's correlation of win rate with median cosine, mean win rate and cosine in each fifth of the
        features by cosine, and n_at_floor, the firings that are left out.

    Raises:
        WriteSAEError: as `replacement_test`, or no atom has ``min_firings`` tested firings.
    """
    given = dict(locals())
    if max_firings_per_atom is not None and min_firings > max_firings_per_atom:
        raise WriteSAEError(
            f"min_firings={min_firings} is above max_firings_per_atom={max_firings_per_atom}, so no atom "
            "could count: give a smaller min_firings"
        )
    tested = replacement_test(
        model, sae, tokens, max_firings_per_atom=max_firings_per_atom, seed=seed,
        progress_folder=progress_folder, verbose=verbose, baselines=baselines, **options,
    )  # fmt: skip
    every = _by_feature(tested.records)
    records = every.loc[every.n_firings >= min_firings].reset_index(drop=True)
    n_at_floor = int((~swaps.above_floor(tested.records)).sum())
    if not len(records):
        floor = f" ({n_at_floor} more are at the floor of rounding)" if n_at_floor else ""
        raise WriteSAEError(
            f"{len(every)} features fire, but none min_firings={min_firings} times in "
            f"{len(tested.records) - n_at_floor} tested firings{floor}: give more text or a smaller "
            "min_firings"
        )
    of_atoms = list(records.side.unique()) == ["atom"]
    split = statistics.split_in_two(records.median_cosine, seed) if of_atoms else None
    records["class"] = None if split is None else class_names(split)
    summary = {
        **_summarize(records, seed),
        "n_at_floor": n_at_floor,
        "n_atoms_too_rare": len(every) - len(records),
        "n_atoms_never_dominant": tested.summary["n_atoms_never_dominant"],
        **{name: tested.summary[name] for name in (*MEASURED_ON, *EXPERIMENTS["replace"].own_options)},
        "experiment": "population",
        "min_firings": min_firings,
        "baselines": baselines,
    }
    recovered, won = (
        f"mean {summary[f'mean_{name}']:.1%}{statistics.between(summary[f'mean_{name}_ci'], '.1%')}"
        for name in ("recovered", "win_rate")
    )
    what = "atoms" if of_atoms else "codes"
    headline = (
        f"half of {len(records)} {what} recover {summary['median_recovered']:.1%} or more ({recovered}); "
        f"win rate {won}, strict chain {summary['mean_strict_chain_rate']:.1%}{swaps.floor_note(n_at_floor)}"
    )
    summary["call"] = call_of(model, [summary["hook_name"]], summary["text"], population_test, given)
    summary = {"headline": with_warnings(headline, summary["warnings"]), **summary}
    return ExperimentResult("population", records, summary)


def _by_feature(firings: pd.DataFrame) -> pd.DataFrame:
    """A row for each feature that is tested; without firings above the floor its figures are NaN.

    Args:
        firings: records of the replacement test.
    """
    firings = firings.assign(
        win=firings.kl_atom < firings.kl_delete,
        chain=(firings.kl_atom < firings.kl_delete) & (firings.kl_delete < firings.kl_random),
        recovered=1 - firings.kl_atom / firings.kl_delete,
    )
    if "kl_atom_later" in firings:
        later = 1 - firings.kl_atom_later / firings.kl_delete_later
        firings["recovered_later"] = later.where(measures.moves(firings, "_later"))
    counted = firings_by_feature(firings)
    figures = {
        "n_firings": ("win", "size"),
        "recovered": ("recovered", "median"),
        "recovered_later": ("recovered_later", "median"),
        "win_rate": ("win", "mean"),
        "strict_chain_rate": ("chain", "mean"),
        "median_cosine": ("cosine", "median"),
        "median_kl_atom": ("kl_atom", "median"),
        "median_kl_delete": ("kl_delete", "median"),
    }
    figures = {name: how for name, how in figures.items() if how[0] in counted}
    groups = counted.loc[swaps.above_floor(counted)].groupby(["side", "atom"]).agg(**figures)
    every: Any = counted.groupby(["side", "atom"], as_index=False).size()[["atom", "side"]]
    table = every.join(groups, on=["side", "atom"])
    return table.assign(n_firings=table.n_firings.fillna(0).astype(int)).sort_values(
        "atom", ignore_index=True
    )


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    rate, cosine = records.win_rate.to_numpy(), records.median_cosine.to_numpy()
    summary: dict[str, Any] = {"n_atoms": len(records), "n_firings": int(records.n_firings.sum())}
    for name in ("recovered", "recovered_later", "win_rate"):
        if name in records:
            known = records.loc[records[name].notna()]
            summary[f"mean_{name}"] = statistics.rate(known[name])
            summary[f"median_{name}"] = statistics.median_and_error(known[name])[0]
            summary[f"mean_{name}_ci"] = statistics.cluster_bootstrap(known[name], known.atom, seed)
    summary["mean_strict_chain_rate"] = float(records.strict_chain_rate.mean())
    summary["share_of_atoms_above_half"] = float((rate > 0.5).mean())
    for side, own in records.groupby("side") if records.side.nunique() > 1 else []:
        means: Any = own[["recovered", "win_rate"]].mean()
        summary |= {f"mean_{name}_{side}": float(value) for name, value in means.items()}
        summary[f"n_{side}"] = len(own)
    groups = {name: rate[(records["class"] == name).to_numpy()] for name in ("register", "bundle")}
    for name, values in groups.items():
        summary[f"n_{name}"] = len(values)
        summary[f"win_rate_{name}"] = float(values.mean()) if len(values) else None
    summary["mann_whitney_p"] = statistics.mann_whitney(groups["register"], groups["bundle"])
    for method in ("pearson", "spearman"):
        value, p = statistics.correlation(rate, cosine, method)
        summary[f"{method}_win_rate_cosine"], summary[f"{method}_p"] = value, p
    summary["win_rate_by_cosine_quintile"] = statistics.mean_by_part(rate, cosine, 5)
    summary["cosine_by_quintile"] = statistics.mean_by_part(cosine, cosine, 5)
    return summary


@figure("population")
def plot_population(result: ExperimentResult) -> Figure:
    """What each feature recovers and its win rate against its median cosine, by class or side."""
    records, summary = result.records, result.summary
    if "recovered" not in records:  # of an earlier version
        records = records.assign(side="atom", recovered=1 - records.median_kl_atom / records.median_kl_delete)
    figure, axes = new_figure(11.0, 4.4, 2)
    of_codes = records.side.nunique() > 1
    groups = records.side + " codes" if of_codes else records["class"].fillna("not divided")
    colors = {"key codes": ATOM, "value codes": DELETE} if of_codes else CLASS_COLORS
    for axis, name in zip(axes, ("recovered", "win_rate"), strict=True):
        for group in sorted(groups.unique(), reverse=True):
            part: pd.DataFrame = records.loc[groups == group]
            axis.scatter(
                part.median_cosine, part[name].clip(lower=-1), s=4 + 1.2 * part.n_firings.clip(upper=60),
                alpha=0.5, lw=0, color=colors.get(group, RANDOM), rasterized=True,
                label=f"{group}: {len(part):,}, mean {part[name].mean():.1%}",
            )  # fmt: skip
        axis.set_xlabel("median cosine of the stand-in to the native write")
        axis.legend(frameon=False, fontsize=9, loc="lower left")
    fifths = [summary["cosine_by_quintile"], summary["win_rate_by_cosine_quintile"]]
    points = [pair for pair in zip(*fifths, strict=True) if None not in pair]
    axes[1].plot(*zip(*points, strict=True), "o-", color=INK, lw=1.5, ms=4)
    axes[1].axhline(0.5, color=INK, lw=0.8, ls="--")
    axes[0].axhline(0, color=INK, lw=0.8, ls="--")
    axes[0].set(ylim=(-1.05, 1.03), ylabel="median recovered (below -100%: drawn there)")
    axes[1].set(ylim=(-0.03, 1.03), ylabel="win rate (line: fifths of the features)")
    interval = statistics.between(summary["mean_win_rate_ci"], ".1%")
    title = f"Mean win rate of a feature {summary['mean_win_rate']:.1%}"
    axes[1].set_title(
        f"{title}\n95% interval{interval or ': none, for one feature'}", fontsize=11, loc="left"
    )
    mean = statistics.share(summary.get("mean_recovered"))
    axes[0].set_title(f"A feature recovers {mean} in the median (their mean)", fontsize=11, loc="left")
    return figure
