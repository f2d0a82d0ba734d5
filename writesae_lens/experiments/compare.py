"""Comparison (paper, experiment 10): several dictionaries and random controls on the same firings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
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
from writesae_lens.experiments.options import Count, Natural, Seed, as_list
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.replace import thin
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, KL_FLOOR, RANDOM, new_figure

DELETED, NO_ATOM = "delete", -1


@experiment(
    "compare",
    paper=10,
    question="How do several dictionaries and random controls do on the same firings?",
    row="a firing and stand-in",
    former_names=("comparison",),
)
def compare(
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str,
    random: Sequence[swaps.Random] = swaps.RANDOM,
    scale: Literal["coefficient", "matched_norm"] = "coefficient",
    kl: Literal["patched_base", "base_patched"] = "patched_base",
    max_firings: Count | None = None,
    skip_positions: Natural = 0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """The replacement test of several dictionaries of one cell, at the positions where all of them fire.

    Firings whose deletion is at the floor of rounding (see `replacement_test`) are counted and left out of
    every rate.

    Args:
        model: the model that the SAEs were trained on.
        saes: by name; on writes or on states, of any type; `writesae_lens.baselines` makes some. The first is
            the one that the others are compared with.
        tokens: passages ``[passage, pos]``, or a text.
        random: controls, any of "gaussian", "atom", "orthogonal", "native_marginals" (see
            `replacement_test`), with the norm of the first SAE's atom.
        scale: atoms at their coefficients, or at the native write's norm.
        kl: KL(patched || base), as in the paper, or the other way round.
        max_firings: test a random choice of this many positions (None: all).
        skip_positions: leave out the first positions of every passage.
        context_size: length of a passage where ``tokens`` is text (None: that of the first SAE's training,
            else 256).
        seed: seed of the random matrices and the thinning.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show progress bars.

    Returns:
        a result. ``records`` has one row per firing and stand-in: passage, position, token, name (of an
        SAE, a control, or "delete"), atom (-1: none), coefficient, cosine (to the native write), kl,
        kl_delete, kl_floor. ``summary`` has n_firings, n_at_floor and ``table``, one row per stand-in: name,
        win_rate (against deletion) with a 95% interval, median_kl, median_cosine, kl_over_delete (the ratio
        of medians), first_is_nearer (share of firings at which the first SAE's KL is smaller, of those where
        the two differ), coverage (share of all positions at which the SAE fires). Figures of which nothing is
        left are None.

    Raises:
        WriteSAEError: no SAEs, SAEs on different cells or that do not fit, one named like a control, or no
            position at which all fire.
    """
    random = tuple(dict.fromkeys(as_list("random", random)))
    if not isinstance(saes, Mapping):
        raise WriteSAEError(
            f"saes must be a dict of names and SAEs, got a {type(saes).__name__}: {{name: sae}}"
        )
    if not saes:
        raise WriteSAEError("there are no SAEs to compare: give one at least")
    twice = set(saes) & {*swaps.RANDOM, DELETED}
    if twice:
        raise WriteSAEError(f"{', '.join(sorted(twice))} are reserved names: give the SAEs others")
    first = next(iter(saes.values()))
    sites = {name: find_site(model, sae) for name, sae in saes.items()}
    cell = find_site(model, first).cell
    other = [name for name, site in sites.items() if site.cell != cell]
    if other:
        raise WriteSAEError(
            f"{', '.join(other)} belong to another cell than layer {cell.layer} head {cell.head}: only SAEs "
            "of one cell have firings in common"
        )
    passages = find_passages(model, first, tokens, context_size)
    found = [{name: find_firings(model, sae, sites[name], p) for name, sae in saes.items()} for p in passages]
    shared = [_shared(firings) for firings in found]
    kept = thin([firings[next(iter(saes))] for firings in shared], skip_positions, max_firings, None, seed)
    if all(len(f.position) for of in found for f in of.values()) and not any(
        len(next(iter(f.values())).position) for f in shared
    ):
        raise WriteSAEError("the SAEs fire, but at no position all of them: compare fewer at a time")
    check_any_fires(sum(len(next(iter(f.values())).position) for f in shared), sum(map(len, kept)), passages)
    run = Run("compare", model, list(saes.values()), passages, locals(), names=list(saes))

    def test(n: int) -> pd.DataFrame:
        how = random, scale, kl, generator(seed, n)
        frame = _test(model, saes, cell, passages[n], shared[n], kept[n], *how)
        frame.insert(0, "passage", n)
        return frame

    records = run.records([n for n, index in enumerate(kept) if len(index)], test, "Comparing")
    coverage = {name: sum(len(f[name].position) for f in found) / passages.numel() for name in saes}
    table = _table(records, list(saes), list(random), coverage)
    n_stand_ins = len(saes) + len(random) + 1
    n_at_floor = int((~swaps.above_floor(records)).sum()) // n_stand_ins
    summary = {"table": table, "n_firings": len(records) // n_stand_ins, "n_at_floor": n_at_floor}
    rates = [f"{row['name']} {statistics.share(row['win_rate'])}" for row in table if row["name"] != DELETED]
    headline = f"win rates at {summary['n_firings']} shared firings: {', '.join(rates)}"
    headline += swaps.floor_note(n_at_floor)
    return run.result(records, summary, headline)


def _shared(firings: Mapping[str, Firings]) -> dict[str, Firings]:
    """The firings at the positions where all SAEs have one."""
    common = next(iter(firings.values())).position
    for f in firings.values():
        common = common[torch.isin(common, f.position)]
    return {name: f.subset(torch.isin(f.position, common)) for name, f in firings.items()}


@torch.no_grad()
def _test(
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    every: Mapping[str, Firings],
    kept: Int[Tensor, " firing"],
    random: Sequence[str],
    scale: str,
    kl: str,
    rng: torch.Generator,
) -> pd.DataFrame:
    firings = {name: f.subset(kept) for name, f in every.items()}
    first = next(iter(firings.values()))
    native, conditions, about = native_of(first), {}, {}
    nothing = torch.full_like(first.atom, NO_ATOM), torch.full_like(first.coefficient, float("nan"))
    for name, sae in saes.items():
        f = firings[name]
        atoms = atom_factors(sae, f.atom, cell.d_k, cell.d_v)
        size = f.coefficient if scale == "coefficient" else native.norm() / atoms.norm().clamp(min=1e-30)
        conditions[name] = swaps.scaled(atoms, size)
        about[name] = f.atom, f.coefficient
    norm = next(iter(conditions.values())).norm()
    for kind in random:
        drawn = swaps.random_like(kind, *next(iter(zip(saes.values(), every.values()))), kept, cell, rng)
        conditions[kind], about[kind] = swaps.with_norm(drawn, norm), nothing
    conditions[DELETED], about[DELETED] = swaps.zeros_like(native), nothing
    kls, floor = swaps.divergences(model, cell, tokens, first.position, list(conditions.values()), kl)
    frames = [
        pd.DataFrame(
            {
                "position": first.position.cpu().numpy(),
                "token": tokens[first.position].cpu().numpy(),
                "name": name,
                "atom": about[name][0].cpu().numpy(),
                "coefficient": about[name][1].cpu().double().numpy(),
                "cosine": native_cosines(first, condition).cpu().double().numpy(),
                "kl": values.cpu().numpy(),
                "kl_delete": kls[-1].cpu().numpy(),
                "kl_floor": floor.cpu().double().numpy(),
            }
        )
        for (name, condition), values in zip(conditions.items(), kls, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)


def _table(
    records: pd.DataFrame, saes: list[str], random: list[str], coverage: dict[str, float]
) -> list[dict[str, Any]]:
    groups = {name: records.loc[records["name"] == name] for name in (*saes, *random, DELETED)}
    moves = swaps.above_floor(groups[DELETED])  # the same firings in every group
    first, delete = groups[saes[0]]["kl"].to_numpy(), float(groups[DELETED]["kl"].median())
    table = []
    for name, part in groups.items():
        kl = part["kl"].to_numpy()
        wins, differ = (kl < part["kl_delete"].to_numpy())[moves], moves & (kl != first)
        is_delete = name == DELETED
        table.append(
            {
                "name": name,
                "win_rate": None if is_delete else statistics.rate(wins),
                "win_rate_ci": None if is_delete else statistics.wilson_interval(wins),
                "median_kl": float(part["kl"].median()),
                "kl_over_delete": statistics.ratio(float(part["kl"].median()), delete),
                "median_cosine": None if is_delete else float(part["cosine"].median()),
                "first_is_nearer": None if name == saes[0] else statistics.rate((first < kl)[differ]),
                "coverage": coverage.get(name),
            }
        )
    return table


@figure("compare")
def plot_compare(result: ExperimentResult) -> Figure:
    """Win rate with its interval, and the distribution of KL, of every stand-in."""
    records, table = result.records, result.summary["table"]
    figure, (rates, spread) = new_figure(11.0, 0.9 + 0.42 * len(table), 2)
    saes = set(result.summary["names"])
    names = [row["name"] for row in table][::-1]
    for place, row in enumerate(reversed(table)):
        color = ATOM if row["name"] in saes else DELETE if row["name"] == "delete" else RANDOM
        if row["win_rate"] is not None:
            rates.plot(row["win_rate_ci"], [place, place], color=color, lw=2)
            rates.plot([row["win_rate"]], [place], "o", color=color)
            rates.text(1.02, place, f"{row['win_rate']:.1%}", va="center", fontsize=9)
        logs = np.log10(records.loc[records["name"] == row["name"], "kl"].clip(lower=KL_FLOOR))
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
