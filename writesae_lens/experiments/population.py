"""Population test (paper, experiment 2): the replacement test for every atom that fires."""

from __future__ import annotations

from typing import Any

import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import EXPERIMENTS, experiment, figure
from writesae_lens.experiments.options import Count, Seed
from writesae_lens.experiments.origin import call_of, with_warnings
from writesae_lens.experiments.partition import CLASS_COLORS, class_names
from writesae_lens.experiments.replace import replacement_test
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import MEASURED_ON
from writesae_lens.figures import INK, RANDOM, new_figure


@experiment(
    "population",
    paper=2,
    question="How often does each atom win the replacement test, and which atoms win more often?",
    row="an atom",
    table=("mean_win_rate", "n_atoms"),
    max_passages=64,
    passes_on="replace",
)
def population_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    max_firings_per_atom: Count | None = 30,
    min_firings: Count = 5,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
    **options: Any,
) -> ExperimentResult:
    """The replacement test's win rate of each atom, in whose mean frequent atoms count no more than others.

    Runs `replacement_test` with at most ``max_firings_per_atom`` firings of each atom, drawn at random, and
    makes one row of every atom with at least ``min_firings`` of them above the floor of rounding, as
    `replacement_test` tells them. The mean over atoms is the paper's population figure. Classes are those of
    `partition_atoms`, from the median cosines of these atoms at these firings.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        max_firings_per_atom: firings of an atom to test (None: all).
        min_firings: atoms with fewer tested firings above the floor are counted as too rare and left out.
        seed: seed of the thinning, the random matrices, the bootstrap and the mixture.
        progress_folder: keeps finished passages, and resumes from them; `replacement_test` with the same
            settings reads the same folder.
        verbose: show a progress bar.
        options: any other argument of `replacement_test`: scale, random, kl, replaces, skip_positions, ...

    Returns:
        a result. ``records`` has one row per atom: atom, n_firings, win_rate, strict_chain_rate,
        median_cosine (signed), median_kl_atom, median_kl_delete (nats), class ("register", "bundle", or
        None where fewer than 4 atoms or equal cosines allow no partition). ``summary`` has
        mean_win_rate with a 95% interval (bootstrap over atoms), win rate and number of atoms by class
        with the two-sided Mann-Whitney p between the classes, Pearson's and Spearman's correlation of
        win rate with median cosine, mean win rate and cosine in each fifth of the atoms by cosine, and
        n_at_floor, the firings that are left out.

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
        progress_folder=progress_folder, verbose=verbose, **options,
    )  # fmt: skip
    firings = tested.records.assign(
        win=lambda f: f.kl_atom < f.kl_delete, chain=lambda f: f.win & (f.kl_delete < f.kl_random)
    )
    moves = swaps.above_floor(firings)
    by_atom = (
        firings.loc[moves]
        .groupby("atom", as_index=False)
        .agg(
            n_firings=("win", "size"),
            win_rate=("win", "mean"),
            strict_chain_rate=("chain", "mean"),
            median_cosine=("cosine", "median"),
            median_kl_atom=("kl_atom", "median"),
            median_kl_delete=("kl_delete", "median"),
        )
    )
    records = by_atom.loc[by_atom.n_firings >= min_firings].reset_index(drop=True)
    n_atoms, n_at_floor = firings.atom.nunique(), int((~moves).sum())
    if not len(records):
        floor = f" ({n_at_floor} more are at the floor of rounding)" if n_at_floor else ""
        raise WriteSAEError(
            f"{n_atoms} atoms fire, but none min_firings={min_firings} times in {moves.sum()} tested "
            f"firings{floor}: give more text or a smaller min_firings"
        )
    split = statistics.split_in_two(records.median_cosine, seed)
    records["class"] = None if split is None else class_names(split)
    summary = {
        **_summarize(records, seed),
        "n_at_floor": n_at_floor,
        "n_atoms_too_rare": n_atoms - len(records),
        "n_atoms_never_dominant": tested.summary["n_atoms_never_dominant"],
        **{name: tested.summary[name] for name in (*MEASURED_ON, *EXPERIMENTS["replace"].own_options)},
        "experiment": "population",
        "min_firings": min_firings,
    }
    interval = statistics.between(summary["mean_win_rate_ci"], ".1%")
    headline = (
        f"mean win rate {summary['mean_win_rate']:.1%}{interval}, strict chain "
        f"{summary['mean_strict_chain_rate']:.1%}, {len(records)} atoms{swaps.floor_note(n_at_floor)}"
    )
    summary["call"] = call_of(model, [summary["hook_name"]], summary["text"], population_test, given)
    summary = {"headline": with_warnings(headline, summary["warnings"]), **summary}
    return ExperimentResult("population", records, summary)


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    rate, cosine = records.win_rate.to_numpy(), records.median_cosine.to_numpy()
    summary: dict[str, Any] = {
        "n_atoms": len(records),
        "n_firings": int(records.n_firings.sum()),
        "mean_win_rate": float(rate.mean()),
        "mean_win_rate_ci": statistics.cluster_bootstrap(rate, records.atom, seed),
        "mean_strict_chain_rate": float(records.strict_chain_rate.mean()),
        "share_of_atoms_above_half": float((rate > 0.5).mean()),
    }
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
    """Each atom's win rate against its median cosine, by class, with the means of fifths of the atoms."""
    records, summary = result.records, result.summary
    figure, (axis,) = new_figure(6.4, 4.4, 1)
    classes = records["class"].fillna("not divided")
    for name in sorted(classes.unique(), reverse=True):
        part = records[classes == name]
        axis.scatter(
            part.median_cosine, part.win_rate, s=4 + 1.2 * part.n_firings.clip(upper=60), alpha=0.5, lw=0,
            color=CLASS_COLORS.get(name, RANDOM), rasterized=True,
            label=f"{name}: {len(part):,} atoms, mean {part.win_rate.mean():.1%}",
        )  # fmt: skip
    fifths = [summary["cosine_by_quintile"], summary["win_rate_by_cosine_quintile"]]
    points = [pair for pair in zip(*fifths, strict=True) if None not in pair]
    axis.plot(*zip(*points, strict=True), "o-", color=INK, lw=1.5, ms=4, label="fifths of the atoms")
    axis.axhline(0.5, color=INK, lw=0.8, ls="--")
    axis.set(ylim=(-0.03, 1.03))
    axis.set_xlabel("median cosine of the atom to the native write")
    axis.set_ylabel("win rate of the atom")
    interval = statistics.between(summary["mean_win_rate_ci"], ".1%")
    title = f"The mean atom wins at {summary['mean_win_rate']:.1%} of its firings"
    axis.set_title(f"{title}\n95% interval{interval or ': none, for one atom'}", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return figure
