"""Replacement test (paper, experiment 1): can an atom take a native write's place?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from sae_lens import SAE
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.firings import (
    Firings,
    atom_factors,
    check_any_fires,
    find_firings,
    native_cosines,
    native_of,
)
from writesae_lens.experiments.options import Count, Natural, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, KL_FLOOR, RANDOM, new_figure

CONDITIONS = ("atom", "delete", "random")


@experiment(
    "replace",
    paper=1,
    question="Can atoms take the place of native writes?",
    row="a firing",
    table=(
        "win_rate",
        "strict_chain_rate",
        "recovered",
        "median_recovered",
        "median_kl_atom",
        "median_kl_delete",
        "median_cosine",
    ),
    former_names=("replacement",),
)
def replacement_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    scale: Literal["coefficient", "matched_norm"] = "coefficient",
    random: swaps.Random = "gaussian",
    kl: Literal["patched_base", "base_patched"] = "patched_base",
    replaces: Literal["write", "update"] = "write",
    max_firings: Count | None = None,
    max_firings_per_atom: Count | None = None,
    skip_positions: Natural = 0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """At each firing, put the dominant atom, nothing, or something random in the native write's place.

    Each condition changes one write (or update, see ``replaces``) of one cell at one position; its score
    is the KL divergence between the next-token distributions at that position with and without the
    change. The atom *wins* when its KL is below the deletion's; the *strict chain* is atom < delete <
    random. Every condition equals a full forward pass with hooks on ``hook_write`` and ``hook_erase``
    (`HookedRecurrent.run_with_swapped_writes`).

    A firing is *at the floor* where the deletion's KL is not above what rounding alone gives there
    (`swaps.divergences`; on the shipped models about 1e-11 nats in float32, 3e-5 to 3e-4 in bfloat16):
    nothing is measured there, so win rate, chain and what is recovered leave it out, and it is counted.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states (it then encodes the state, and still the
            write is replaced). Its cell is read from ``sae.cfg.metadata.hook_name``.
        tokens: passages ``[passage, pos]``, or a text.
        scale: whether the atom is written at its coefficient or at the native write's Frobenius norm; the
            random matrix gets the atom's norm.
        random: the control: a Gaussian rank-1 matrix, another atom of the dictionary, a rank-1 matrix
            orthogonal to the native write on both sides, or a rank-1 matrix whose coordinates are drawn from
            the passage's other writes.
        kl: direction of the KL divergence: KL(patched || base), as in the paper, or KL(base || patched).
        replaces: whether each condition replaces the native write k v^T alone, while the token's erase
            still happens, or the whole update, erase and write (they differ where an architecture erases;
            an atom trained on writes cannot stand in for the erase).
        max_firings: test a random choice of this many firings (None: all).
        max_firings_per_atom: test a random choice of this many firings of each atom (None: all).
        skip_positions: leave out the first positions of every passage.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of the random matrices, the thinning and the bootstrap.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per firing: passage, position, token, atom, coefficient,
        write_norm, cosine, kl_atom, kl_delete, kl_random, kl_floor (KLs in nats). ``summary`` has win_rate
        and strict_chain_rate with 95% intervals, recovered (1 - sum of kl_atom / sum of kl_delete) and
        median_recovered, all over the firings above the floor (None where there are none); n_at_floor, and
        win_rate_with_floor and strict_chain_rate_with_floor over all firings; medians of KLs, cosine and
        write norm over all firings.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or no atom fires.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    firings = [
        find_firings(model, sae, site, passage)
        for passage in tqdm(passages, desc="Firings", unit="passage", disable=not verbose)
    ]
    kept = thin(firings, skip_positions, max_firings, max_firings_per_atom, seed)
    check_any_fires(sum(len(f.position) for f in firings), sum(map(len, kept)), passages)
    run = Run("replace", model, sae, passages, locals())

    def test(n: int) -> pd.DataFrame:
        how = (scale, random, kl, replaces)
        some = firings[n], kept[n]
        return _test_passage(model, sae, site.cell, passages[n], *some, n, *how, generator(seed, n))

    records = run.records([n for n, index in enumerate(kept) if len(index)], test, "Replacing")
    n_dominant = len(torch.cat([f.atom for f in firings]).unique())
    summary = _summarize(records, sae.cfg.d_sae - n_dominant, seed)
    interval = statistics.between(summary["win_rate_ci"], ".1%")
    headline = (
        f"win rate {statistics.share(summary['win_rate'])}{interval}, recovered "
        f"{statistics.share(summary['recovered'])} (median {statistics.share(summary['median_recovered'])}), "
        f"{len(records)} firings{swaps.floor_note(summary['n_at_floor'])}"
    )
    return run.result(records, summary, headline)


def thin(
    firings: list[Firings], skip: int, total: int | None, per_atom: int | None, seed: int
) -> list[Tensor]:
    """Indices of the firings to test, for each passage: a random choice after ``skip`` positions."""
    frame = pd.DataFrame(
        {
            "passage": np.repeat(range(len(firings)), [len(f.position) for f in firings]),
            "index": np.concatenate([np.arange(len(f.position)) for f in firings]),
            "position": torch.cat([f.position for f in firings]).cpu().numpy(),
            "atom": torch.cat([f.atom for f in firings]).cpu().numpy(),
        }
    )
    frame = frame.loc[frame.position >= skip].sample(frac=1, random_state=seed)
    if per_atom is not None:
        frame = frame.groupby("atom").head(per_atom)
    if total is not None:
        frame = frame.head(total)
    frame = pd.DataFrame(frame).sort_values(by=["passage", "index"])
    return [
        torch.as_tensor(frame.loc[frame.passage == n, "index"].to_numpy(copy=True))
        for n in range(len(firings))
    ]


@torch.no_grad()
def _test_passage(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    every: Firings,
    kept: Int[Tensor, " firing"],
    number: int,
    scale: str,
    random: str,
    kl: str,
    replaces: str,
    rng: torch.Generator,
) -> pd.DataFrame:
    firings = every.subset(kept)
    atoms, native = atom_factors(sae, firings.atom, cell.d_k, cell.d_v), native_of(firings)
    norm = atoms.norm().clamp(min=1e-30)
    size = firings.coefficient if scale == "coefficient" else native.norm() / norm
    other = swaps.with_norm(swaps.random_like(random, sae, every, kept, cell, rng), size * norm)
    conditions = [swaps.scaled(atoms, size), swaps.zeros_like(atoms), other]
    kls, floor = swaps.divergences(
        model, cell, tokens, firings.position, conditions, kl, erase=replaces == "write"
    )
    columns: dict[str, Any] = {
        "passage": number,
        "position": firings.position.cpu().numpy(),
        "token": tokens[firings.position].cpu().numpy(),
        "atom": firings.atom.cpu().numpy(),
        "coefficient": firings.coefficient.cpu().numpy().astype(float),
        "write_norm": native.norm().cpu().numpy().astype(float),
        "cosine": native_cosines(firings, atoms).cpu().numpy().astype(float),
    }
    columns |= {f"kl_{name}": kls[i].cpu().numpy() for i, name in enumerate(CONDITIONS)}
    columns["kl_floor"] = floor.cpu().double().numpy()
    return pd.DataFrame(columns)


def _summarize(records: pd.DataFrame, n_never_dominant: int, seed: int) -> dict[str, Any]:
    atom, delete, other = (records[f"kl_{name}"].to_numpy() for name in CONDITIONS)
    moves = swaps.above_floor(records)
    wins, chain = atom < delete, (atom < delete) & (delete < other)
    recovered, median_recovered = statistics.recovered(atom[moves], delete[moves])
    by = records.loc[moves]
    summary: dict[str, Any] = {
        "n_firings": len(records),
        "n_at_floor": int((~moves).sum()),
        "n_atoms": int(records.atom.nunique()),
        "n_atoms_never_dominant": n_never_dominant,
        "n_passages": int(records.passage.nunique()),
        "win_rate": statistics.rate(wins[moves]),
        "win_rate_ci": statistics.wilson_interval(wins[moves]),
        "win_rate_ci_by_atom": statistics.cluster_bootstrap(wins[moves], by.atom, seed),
        "win_rate_ci_by_passage": statistics.cluster_bootstrap(wins[moves], by.passage, seed),
        "win_rate_with_floor": statistics.rate(wins),
        "win_rate_by_effect_quartile": statistics.mean_by_part(wins[moves], delete[moves], 4),
        "strict_chain_rate": statistics.rate(chain[moves]),
        "strict_chain_rate_ci": statistics.wilson_interval(chain[moves]),
        "strict_chain_rate_with_floor": statistics.rate(chain),
        "recovered": recovered,
        "median_recovered": median_recovered,
    }
    for name, values in zip(CONDITIONS, (atom, delete, other), strict=True):
        median, error = statistics.median_and_error(values)
        summary[f"median_kl_{name}"] = median
        summary[f"median_kl_{name}_error"] = error
    medians = [summary[f"median_kl_{name}"] for name in CONDITIONS]
    summary["kl_ratio_atom_delete_random"] = [statistics.ratio(median, medians[0]) for median in medians]
    summary["cliffs_delta"] = statistics.cliffs_delta(delete[moves], atom[moves])
    summary["wilcoxon_p"] = statistics.paired_wilcoxon(delete[moves], atom[moves])
    summary["median_cosine"] = float(records.cosine.median())
    summary["median_write_norm"] = float(records.write_norm.median())
    return summary


@figure("replace")
def plot_replacement(result: ExperimentResult) -> Figure:
    """The paper's figure 3: KL of atom against deletion with y = x, and the density of their log ratio."""
    records, summary = result.records, result.summary
    atom, delete, other = (
        records[f"kl_{n}"].to_numpy().clip(min=KL_FLOOR) for n in ("atom", "delete", "random")
    )
    figure, (scatter, density) = new_figure(10.0, 4.4, 2)
    wins, moves = (records.kl_atom < records.kl_delete).to_numpy(), swaps.above_floor(records)
    groups = [(wins & moves, ATOM, "atom nearer"), (~wins & moves, DELETE, "deletion nearer")]
    groups += [(~moves, RANDOM, "deletion at the floor")] if not moves.all() else []
    for mask, color, label in groups:
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
    title = f"The atom wins at {statistics.share(summary['win_rate'])} of {moves.sum():,} firings"
    interval = statistics.between(summary["win_rate_ci"], ".1%")
    scatter.set_title(f"{title}\n95% interval{interval or ': none'}", fontsize=11, loc="left")
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


@figure("replace", stem="replace_by_effect")
def plot_replacement_by_effect(result: ExperimentResult) -> Figure:
    """Where the atom fails: win rate by quartile of the deletion's effect, and by cosine to the write."""
    records, summary = result.records.loc[swaps.above_floor(result.records)], result.summary
    wins = (records.kl_atom < records.kl_delete).to_numpy()
    figure, (effect, cosine) = new_figure(10.0, 3.6, 2)
    rates = [rate or 0 for rate in summary["win_rate_by_effect_quartile"]]
    effect.bar(range(4), rates, color=ATOM, width=0.7)
    for i, rate in enumerate(rates):
        effect.text(i, rate + 0.015, f"{rate:.0%}", ha="center", fontsize=9, color=INK)
    effect.set_xticks(range(4), ["smallest", "2nd", "3rd", "largest"])
    effect.set_xlabel("quarter of the firings by the deletion's KL")
    effect.set_title("Win rate by how much the write matters", fontsize=11, loc="left")

    order = np.argsort(records.cosine.to_numpy())
    bins = [b for b in np.array_split(order, max(1, min(10, len(order)))) if len(b)]
    centers = [records.cosine.to_numpy()[b].mean() for b in bins]
    cosine.plot(centers, [wins[b].mean() for b in bins], "o-", color=ATOM, lw=1.5)
    cosine.set_xlabel("cosine of the atom to the native write (tenths of the firings)")
    cosine.set_title("Win rate by alignment", fontsize=11, loc="left")
    for axis in (effect, cosine):
        axis.set_ylim(0, 1.05)
        axis.axhline(0.5, color=INK, lw=0.8, ls="--")
    return figure
