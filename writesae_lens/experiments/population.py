"""Population test (paper, experiment 2): the replacement test for every atom that fires."""

from __future__ import annotations

import inspect
from typing import Any

import pandas as pd
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.inputs import check_at_least
from writesae_lens.experiments.partition import class_names
from writesae_lens.experiments.replace import replacement_test
from writesae_lens.experiments.result import ExperimentResult


def population_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    max_firings_per_atom: int | None = 30,
    min_firings: int = 5,
    seed: int = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
    **options: Any,
) -> ExperimentResult:
    """How often each atom wins the replacement test, so that frequent atoms do not speak for the rest.

    Runs `replacement_test` with at most ``max_firings_per_atom`` firings of each atom, drawn at random, and
    makes one row of every atom with at least ``min_firings``. The mean over atoms is the paper's
    population figure. Classes are those of `partition_atoms`, from the median cosines of these atoms at
    these firings.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        max_firings_per_atom: firings of an atom to test (None: all).
        min_firings: atoms with fewer are counted as too rare, and left out.
        seed: of the thinning, the random matrices, the bootstrap and the mixture.
        progress_folder: keeps finished passages, and resumes from them; `replacement_test` with the same
            settings reads the same folder.
        verbose: show a progress bar.
        options: any other argument of `replacement_test`: scale, random, kl, replaces, skip_positions, ...

    Returns:
        a result whose ``records`` have a row an atom: atom, n_firings, win_rate, strict_chain_rate,
        median_cosine (signed), median_kl_atom, median_kl_delete (nats), class ("register", "bundle", or
        None where fewer than 4 atoms or equal cosines allow no partition). Its ``summary`` has
        mean_win_rate with a 95% interval (bootstrap over atoms), win rate and number of atoms by class
        with the two-sided Mann-Whitney p between the classes, Pearson's and Spearman's correlation of
        win rate with median cosine, and mean win rate and cosine in each fifth of the atoms by cosine.

    Raises:
        WriteSAEError: as `replacement_test`, or no atom has ``min_firings`` tested firings.
    """
    check_at_least(1, min_firings=min_firings)
    check_at_least(1, optional=True, max_firings_per_atom=max_firings_per_atom)
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
    by_atom = firings.groupby("atom", as_index=False).agg(
        n_firings=("win", "size"),
        win_rate=("win", "mean"),
        strict_chain_rate=("chain", "mean"),
        median_cosine=("cosine", "median"),
        median_kl_atom=("kl_atom", "median"),
        median_kl_delete=("kl_delete", "median"),
    )
    records = by_atom.loc[by_atom.n_firings >= min_firings].reset_index(drop=True)
    if not len(records):
        raise WriteSAEError(
            f"{len(by_atom)} atoms fire, but none min_firings={min_firings} times in {len(firings)} tested "
            "firings: give more text or a smaller min_firings"
        )
    split = statistics.split_in_two(records.median_cosine, seed)
    records["class"] = None if split is None else class_names(split)
    known = inspect.signature(replacement_test).parameters.keys() | {
        "architecture",
        "hook_name",
        "sae_fingerprints",
    }
    summary = {
        **_summarize(records, seed),
        "n_atoms_too_rare": len(by_atom) - len(records),
        "n_atoms_never_dominant": tested.summary["n_atoms_never_dominant"],
        "experiment": "population",
        "min_firings": min_firings,
        **{name: value for name, value in tested.summary.items() if name in known},
    }
    interval = statistics.between(summary["mean_win_rate_ci"], ".1%")
    headline = f"mean win rate {summary['mean_win_rate']:.1%}{interval}, {len(records)} atoms"
    summary = {"headline": headline, **summary}
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
