"""Replacement test (paper, experiment 1): how well does an SAE's stand-in take a native write's place?"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

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
from hooked_models.bridge.lower_layers import LowerLayers
from hooked_models.hooked_recurrent import Cell
from writesae_lens import measures, statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.guards import Guards
from writesae_lens.experiments.firings import (
    Firings,
    activity,
    check_any_fires,
    firings_of,
    is_codes,
    native_cosines,
    native_of,
    stand_in,
)
from writesae_lens.experiments.later import later_divergences
from writesae_lens.experiments.options import Count, Natural, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import LowerOfPassages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.stand_ins import TITLES, Untrained, untrained
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, KL_FLOOR, RANDOM, new_figure
from writesae_lens.saes.rank1 import Factors

# Conditions of the win rate at matched norm and of the chain's ceiling, which are for the own position only.
_OWN_ONLY = ("native_random", "atom_matched")


@experiment(
    "replace",
    paper=1,
    question="How well do an SAE's stand-ins take the place of native writes?",
    row="a firing",
    table=(
        "median_recovered",
        "recovered",
        "median_recovered_later",
        "recovered_later",
        "median_recovered_both",
        "win_rate",
        "win_rate_matched_norm",
        "win_rate_both",
        "strict_chain_rate",
        "chain_over_ceiling",
        "own_share",
        "bits",
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
    random: swaps.Random = "atom",
    horizon: Natural = 0,
    kl: Literal["patched_base", "base_patched"] = "patched_base",
    replaces: Literal["write", "update"] = "write",
    max_firings: Count | None = None,
    max_firings_per_atom: Count | None = None,
    skip_positions: Natural = 0,
    context_size: Count | None = None,
    train_tokens: Int[Tensor, "passage pos"] | str | None = None,
    baselines: bool = True,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """At each firing, replace the native write by the SAE's stand-in, by nothing, and by a random matrix.

    Each condition changes one write (or update, see ``replaces``) of one cell at one position; its score
    is the KL divergence between the next-token distributions with and without the change, at that position
    and, with ``horizon``, over the following ones. The stand-in is the dominant atom at its coefficient, or
    what the active codes make (`writesae_lens.experiments.firings.stand_in`). What it *recovers* is
    1 - KL / KL of the deletion, as a ratio of sums and, which shrinking cannot raise, in the median. It
    *wins* when its KL is below the deletion's, the paper's measure, which shrinking does raise; the *strict
    chain* is stand-in < delete < random. Every KL equals that of a full forward pass with hooks on
    ``hook_write`` and ``hook_erase``.

    The baselines are untrained stand-ins, tested at the same firings: a lookup among as many training writes
    as the SAE has features; beside an SAE of codes, sides of as many training writes as it has codes, as many
    active, by matching pursuit, an encoder that no SAE has: where that recovers more, training has bought the
    one-shot encoder, not better codes (`writesae_lens.experiments.pursuit`); and the native write with its
    key or its value at the training writes' mean (`writesae_lens.experiments.stand_ins`). No SAE of this
    package chooses among its active features by the output, so the control of such a rule (the same rule over
    random atoms) is not among them.

    A firing is *at the floor* where the deletion's KL is not above what rounding alone gives there
    (`swaps.divergences`; on the shipped models about 1e-11 nats in float32, 3e-5 to 3e-4 in bfloat16):
    nothing is measured there, so rates and what is recovered leave it out, and it is counted, apart for the
    own position, the later ones and both together.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states (it then encodes the state, and still the
            write is replaced). Its cell is read from ``sae.cfg.metadata.hook_name``.
        tokens: passages ``[passage, pos]``, or a text.
        scale: whether the stand-in is written at its coefficient or at the native write's Frobenius norm; the
            random matrix gets the stand-in's norm.
        random: the control: another atom of the dictionary (of codes: other codes at the same coefficients),
            as in the paper; a Gaussian rank-1 matrix, a rank-1 matrix orthogonal to the native write on
            both sides, or a rank-1 matrix whose coordinates are drawn from the passage's other writes.
        horizon: over how many following positions KLs are summed too; firings with fewer tokens after them
            are left out, and counted.
        kl: direction of the KL divergence: KL(patched || base), as in the paper, or KL(base || patched).
        replaces: whether each condition replaces the native write k v^T alone, while the token's erase
            still happens, or the whole update, erase and write (they differ where an architecture erases;
            an atom trained on writes cannot stand in for the erase).
        max_firings: test a random choice of this many firings (None: all).
        max_firings_per_atom: test a random choice of this many firings of each atom, or of each dominant
            value code (None: all).
        skip_positions: leave out the first positions of every passage.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        train_tokens: passages or a text whose writes the baselines are made from (None: the SAE's training
            text where it is a file or folder of this machine, else the training part of the shipped text).
        baselines: whether the untrained stand-ins are tested too.
        seed: seed of the random matrices, the baselines' writes, the thinning and the bootstrap.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per firing: passage, position, token, atom, key_code (-1: no codes),
        coefficient, write_norm, cosine, kl_atom, kl_delete, kl_random, kl_native_random (the random matrix at
        the native norm), kl_atom_matched (the stand-in at the native norm), kl_lookup, kl_pursuit (SAEs of
        codes), kl_mean_key, kl_mean_value, kl_floor (KLs in nats); with ``horizon`` also kl_atom_later,
        kl_delete_later, ..., the sums over the following positions. ``summary`` has, at the own position,
        later (``_later``) and both (``_both``): recovered, median_recovered and win_rate with 95% intervals
        over passages (``_ci``), the same of each baseline in the list ``baselines``, of the pursuit with its
        bits; win_rate_matched_norm, strict_chain_rate, chain_ceiling (that of the exact native write) and
        chain_over_ceiling, own_share (median share of the own position in what a deletion does), n_at_floor,
        n_without_horizon, coverage (share of all positions at which the SAE fires: figures of firings alone
        can be raised by firing where it is easy); the guards (`writesae_lens.experiments.features.guards`);
        n_lookup (writes that the lookup has; where they are fewer than the SAE's features, it warns); medians
        of KLs, cosine and write norm over all firings.

    Raises:
        WriteSAEError: SAE and cell do not fit, a text is too short, or nothing fires.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    guards, firings, lower = Guards(), [], LowerOfPassages(model, site.cell)
    for n, passage in enumerate(tqdm(passages, desc="Firings", unit="passage", disable=not verbose)):
        with lower.kept(n):
            active = activity(model, sae, site, passage)
        guards.add(active)
        firings.append(firings_of(sae, active))
    last = passages.shape[1] - 1 - horizon
    kept = thin(firings, skip_positions, max_firings, max_firings_per_atom, seed, last)
    _check_any_kept(firings, kept, passages, horizon)
    codes: Any = sae.cfg if is_codes(sae) else None
    about = sae.cfg.d_sae, train_tokens, seed, codes, sae.cfg.metadata.dataset_path
    source = untrained(model, site.cell, *about) if baselines else None
    made_from: dict[str, Any] = source.made_from if source else {}
    run = Run("replace", model, sae, passages, locals(), **made_from)
    how = _How(scale, random, kl, replaces == "write", horizon)

    def test(n: int) -> pd.DataFrame:
        passage = n, passages[n], lower.of(n, passages[n]), firings[n], kept[n]
        return _test_passage(model, sae, site.cell, *passage, how, source, generator(seed, n))

    records = run.records([n for n, index in enumerate(kept) if len(index)], test, "Replacing")
    summary = measures.summarize(records, seed) | {
        "n_atoms_never_dominant": sae.cfg.d_sae - _n_dominant(firings),
        "n_without_horizon": sum(int((f.position > last).sum()) for f in firings),
        "coverage": sum(len(f.position) for f in firings) / passages.numel(),
        **guards.summary(source.train if source else None),
        "n_lookup": source.lookup.cfg.d_sae if source else None,
    }
    for caution in source.cautions(sae.cfg.d_sae) if source else ():
        run.warn(caution)
    for row in summary["baselines"]:
        if source and source.pursuit and row["name"] == "pursuit":
            row["bits"] = source.pursuit.bits(guards.native, generator(seed))
    result = run.result(records, summary, measures.headline(summary, horizon))
    # `Run.result` writes the option ``baselines`` (True or False) over the list of their figures.
    result.summary["baselines"] = summary["baselines"]
    return result


_PLACES = {"": "At the write's own token", "_later": "Over the next {} tokens", "_both": "Both together"}


class _How(NamedTuple):
    """How the conditions are written, and where their KLs are taken."""

    scale: str
    random: str
    kl: str
    erase: bool
    horizon: int


def _check_any_kept(
    firings: list[Firings], kept: list[Tensor], passages: Int[Tensor, "passage pos"], horizon: int
) -> None:
    """Refuse passages that leave no firing to test.

    Raises:
        WriteSAEError: the passages are too short for the horizon, or there is no firing to test.
    """
    if passages.shape[1] <= horizon:
        raise WriteSAEError(
            f"passages of {passages.shape[1]} tokens have no position with {horizon} tokens after it: give "
            "longer ones, or a smaller horizon"
        )
    n_firings, n_kept = sum(len(f.position) for f in firings), sum(map(len, kept))
    if horizon and n_firings and not n_kept:
        raise WriteSAEError(
            f"features fire, but skip_positions and horizon={horizon} left none of the firings to test: give "
            "longer passages, or a smaller horizon"
        )
    check_any_fires(n_firings, n_kept, passages)


def _n_dominant(firings: list[Firings]) -> int:
    """How many features dominate at a firing (of codes: on their side)."""
    dominant = torch.cat([x for f in firings for x in (f.atom, f.key_code) if x is not None])
    return len(dominant[dominant >= 0].unique())


def thin(
    firings: list[Firings],
    skip: int,
    total: int | None,
    per_atom: int | None,
    seed: int,
    last: int | None = None,
) -> list[Tensor]:
    """Indices of the firings to test, for each passage: a random choice from ``skip`` to ``last``."""
    frame = pd.DataFrame(
        {
            "passage": np.repeat(range(len(firings)), [len(f.position) for f in firings]),
            "index": np.concatenate([np.arange(len(f.position)) for f in firings]),
            "position": torch.cat([f.position for f in firings]).cpu().numpy(),
            "atom": torch.cat([f.atom for f in firings]).cpu().numpy(),
        }
    )
    in_range = frame.position.between(skip, np.inf if last is None else last)
    frame = frame.loc[in_range].sample(frac=1, random_state=seed)
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
    number: int,
    tokens: Int[Tensor, " pos"],
    lower: LowerLayers | None,
    every: Firings,
    kept: Int[Tensor, " firing"],
    how: _How,
    source: Untrained | None,
    rng: torch.Generator,
) -> pd.DataFrame:
    firings = every.subset(kept)
    native = native_of(firings)
    conditions = _conditions(sae, cell, every, kept, how, source, rng)
    position = firings.position
    kls, floor = swaps.divergences(
        model, cell, tokens, position, list(conditions.values()), how.kl, how.erase, lower
    )
    columns: dict[str, Any] = {
        "passage": number,
        "position": position,
        "token": tokens[position],
        "atom": firings.atom,
        "key_code": firings.key_code,
        "coefficient": firings.coefficient.double(),
        "write_norm": native.norm().double(),
        "cosine": native_cosines(firings, conditions["atom"]).double(),
    }
    columns |= {f"kl_{name}": values for name, values in zip(conditions, kls, strict=True)}
    columns["kl_floor"] = floor.double()
    if how.horizon:
        some = [name for name in conditions if name not in _OWN_ONLY]
        chosen = [conditions[name] for name in some]
        kls, floor = later_divergences(
            model, cell, tokens, position, native, chosen, how.horizon, how.kl, how.erase, lower
        )
        columns |= {f"kl_{name}_later": values for name, values in zip(some, kls, strict=True)}
        columns["kl_floor_later"] = floor.double()
    return pd.DataFrame({n: x.cpu().numpy() if isinstance(x, Tensor) else x for n, x in columns.items()})


def _conditions(
    sae: SAE[Any],
    cell: Cell,
    every: Firings,
    kept: Int[Tensor, " firing"],
    how: _How,
    source: Untrained | None,
    rng: torch.Generator,
) -> dict[str, Factors]:
    """What each condition puts in the place of the kept firings' native writes, by its name."""
    firings = every.subset(kept)
    native, stand = native_of(firings), stand_in(sae, firings, cell)
    matched = swaps.with_norm(stand, native.norm())
    atom = stand if how.scale == "coefficient" else matched
    other = swaps.random_like(how.random, sae, every, kept, cell, rng)
    conditions = {
        "atom": atom,
        "delete": swaps.zeros_like(native),
        "random": swaps.with_norm(other, atom.norm()),
        "native_random": swaps.with_norm(other, native.norm()),
        "atom_matched": matched,
    }
    return conditions | (source.of(native) if source else {})


@figure("replace")
def plot_recovered(result: ExperimentResult) -> Figure:
    """What the SAE's stand-ins recover beside their baselines: medians with intervals, and pooled."""
    summary = result.summary
    panels = [when for when in measures.WHEN if summary.get(f"median_recovered{when}") is not None] or [""]
    rows = [summary, *(summary.get("baselines") or [])]
    names = [TITLES.get(row.get("name", ""), "this SAE") for row in rows]
    figure, axes = new_figure(2.2 + 3.2 * len(panels), 1.3 + 0.42 * len(rows), len(panels))
    for axis, when in zip(axes, panels, strict=True):
        for place, row in enumerate(reversed(rows)):
            color = ATOM if row is summary else RANDOM
            median, pooled = row[f"median_recovered{when}"], row[f"recovered{when}"]
            if median is None:
                continue
            ends = row.get(f"median_recovered{when}_ci")
            if ends:
                axis.plot(ends, [place, place], color=color, lw=2)
            axis.plot([median], [place], "o", color=color)
            axis.plot([pooled], [place], "|", color=color, ms=10)
            axis.annotate(
                f"{median:.0%}", (max(median, -1), place), (0, 5), textcoords="offset points", fontsize=8,
                ha="center",
            )  # fmt: skip
        axis.axvline(0, color=INK, lw=0.8, ls="--")
        axis.set(xlim=(-1.05, 1.05), ylim=(-0.6, len(rows) - 0.2))
        axis.set_xlabel("share of the deletion's KL that is avoided")
        axis.set_title(_PLACES[when].format(summary.get("horizon")), fontsize=11, loc="left")
        axis.set_yticks(range(len(rows)), names[::-1] if axis is axes[0] else [""] * len(rows))
    figure.suptitle(
        "dot: median and its 95% interval; stroke: pooled over firings", fontsize=9, x=0.99, ha="right"
    )
    return figure


@figure("replace", stem="replace_kls")
def plot_replacement(result: ExperimentResult) -> Figure:
    """The paper's figure 3: KL of stand-in against deletion, and the density of the log of their ratio."""
    records, summary = result.records, result.summary
    atom, delete, other = (
        records[f"kl_{n}"].to_numpy().clip(min=KL_FLOOR) for n in ("atom", "delete", "random")
    )
    figure, (scatter, density) = new_figure(10.0, 4.4, 2)
    wins, moves = (records.kl_atom < records.kl_delete).to_numpy(), swaps.above_floor(records)
    groups = [(wins & moves, ATOM, "stand-in nearer"), (~wins & moves, DELETE, "deletion nearer")]
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
    scatter.set_ylabel("KL, stand-in in its place (nats)")
    title = f"The stand-in wins at {statistics.share(summary['win_rate'])} of {moves.sum():,} firings"
    interval = statistics.between(summary["win_rate_ci"], ".1%")
    scatter.set_title(f"{title}\n95% interval{interval or ': none'}", fontsize=11, loc="left")
    scatter.legend(frameon=False, fontsize=9, loc="upper left")

    for values, color, label in (
        (np.log10(atom / delete), ATOM, "stand-in / delete"),
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
    """Where the stand-in fails: win rate by quartile of the deletion's effect, and by cosine to the write."""
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
    cosine.set_xlabel("cosine of the stand-in to the native write (tenths of the firings)")
    cosine.set_title("Win rate by alignment", fontsize=11, loc="left")
    for axis in (effect, cosine):
        axis.set_ylim(0, 1.05)
        axis.axhline(0.5, color=INK, lw=0.8, ls="--")
    return figure
