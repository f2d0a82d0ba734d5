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
from hooked_models.bridge.lower_layers import LowerLayers
from hooked_models.hooked_recurrent import Cell
from writesae_lens import measures, statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.firings import (
    Firings,
    check_any_fires,
    find_firings,
    is_codes,
    native_cosines,
    native_of,
    stand_in,
)
from writesae_lens.experiments.later import later_divergences
from writesae_lens.experiments.options import Count, Natural, Seed, as_list
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import LowerOfPassages
from writesae_lens.experiments.replace import thin
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.stand_ins import TITLES, UNTRAINED, Untrained, untrained
from writesae_lens.experiments.subjects import common_cell, find_site
from writesae_lens.figures import ATOM, DELETE, INK, KL_FLOOR, RANDOM, new_figure

DELETED, NO_ATOM = "delete", -1
# A control with the native write's norm, whose KLs are columns of the other stand-ins' rows.
_NATIVE_RANDOM = "native_random"


@experiment(
    "compare",
    paper=10,
    question="How do several dictionaries, untrained stand-ins and random controls do on the same firings?",
    row="a firing and stand-in",
    former_names=("comparison",),
)
def compare(
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str,
    random: Sequence[swaps.Random] = ("atom", "gaussian", "orthogonal", "native_marginals"),
    scale: Literal["coefficient", "matched_norm"] = "coefficient",
    kl: Literal["patched_base", "base_patched"] = "patched_base",
    horizon: Natural = 0,
    baselines: bool = True,
    max_firings: Count | None = None,
    skip_positions: Natural = 0,
    context_size: Count | None = None,
    train_tokens: Int[Tensor, "passage pos"] | str | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """The replacement test of several dictionaries of one cell, at the positions where all of them fire.

    Beside them are untrained stand-ins (`writesae_lens.experiments.stand_ins`) and random controls. Firings
    whose deletion is at the floor of rounding (see `replacement_test`) are counted and left out of every
    figure.

    Args:
        model: the model that the SAEs were trained on.
        saes: by name; on writes or on states, of any type; `writesae_lens.baselines` makes some. The first is
            the one that the others are compared with.
        tokens: passages ``[passage, pos]``, or a text.
        random: controls, any of "atom", "gaussian", "orthogonal", "native_marginals" (see
            `replacement_test`), with the norm of the first SAE's stand-in; the first is that of the chain.
        scale: stand-ins at the SAEs' coefficients, or at the native write's norm.
        kl: KL(patched || base), as in the paper, or the other way round.
        horizon: also measure the KL over so many positions after each firing (0: the own position alone).
        baselines: whether to compare with untrained stand-ins: a lookup among as many training writes as
            the first SAE has features, codes that nobody trained chosen by matching pursuit (as many as the
            first SAE of codes has; none without one), mean key x native value, native key x mean value.
        max_firings: test a random choice of this many positions (None: all).
        skip_positions: leave out the first positions of every passage.
        context_size: length of a passage where ``tokens`` is text (None: that of the first SAE's training,
            else 256).
        train_tokens: passages or a text whose writes the untrained stand-ins are made from (None: the first
            SAE's training text where it is a file or folder of this machine, else the training part of the
            shipped text).
        seed: seed of the random matrices, the thinning, the lookup and the bootstrap.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show progress bars.

    Returns:
        a result. ``records`` has one row per firing and stand-in: passage, position, token, name (of an
        SAE, "lookup", "pursuit", "mean_key", "mean_value", a control, or "delete"), atom and key_code
        (of codes; -1: none), coefficient, cosine (to the native write), kl, and of the firing kl_delete,
        kl_random (of the first control), kl_native_random (of that control at the native write's norm) and
        kl_floor; with a horizon the same with ``_later``, sums over the positions after the firing.
        ``summary`` has n_firings,
        n_at_floor, n_without_horizon (firings too near to the end of their passage for it, left out),
        chain_ceiling (see `replacement_test`) and ``table``, one row per stand-in: name, recovered,
        median_recovered and win_rate (against deletion) at the own position, with ``_later`` after it and
        with ``_both``, each with a 95% interval over passages (``_ci``), strict_chain_rate,
        chain_over_ceiling, median_kl, median_cosine, kl_over_delete (the ratio of medians), first_is_nearer
        (share of firings at which the first SAE's KL is smaller, of those where the two differ), coverage
        (share of all positions at which the SAE fires). Figures of which nothing is left are None.

    Raises:
        WriteSAEError: no SAEs, SAEs on different cells or that do not fit, one named like another stand-in,
            no position at which all fire, or a horizon that no passage has room for.
    """
    random = tuple(dict.fromkeys(as_list("random", random)))
    reserved = *swaps.RANDOM, *UNTRAINED, DELETED, _NATIVE_RANDOM
    cell, first = common_cell(model, saes, reserved, "compare"), next(iter(saes.values()))
    passages = find_passages(model, first, tokens, context_size)
    sites = {name: find_site(model, sae) for name, sae in saes.items()}
    lower, found = LowerOfPassages(model, cell), []
    for n, passage in enumerate(passages):
        with lower.kept(n):
            found.append({name: find_firings(model, sae, sites[name], passage) for name, sae in saes.items()})
    shared = [_shared(firings) for firings in found]
    heads = [next(iter(firings.values())) for firings in shared]
    last = passages.shape[1] - 1 - horizon
    kept = thin(heads, skip_positions, max_firings, None, seed, last)
    if all(len(f.position) for of in found for f in of.values()) and not any(len(f.position) for f in heads):
        raise WriteSAEError("the SAEs fire, but at no position all of them: compare fewer at a time")
    n_without = sum(int((f.position > last).sum()) for f in heads)
    if n_without and not sum(map(len, kept)):
        raise WriteSAEError(
            f"no firing that is tested has horizon={horizon} tokens after it in passages of "
            f"{passages.shape[1]} tokens: give longer passages or a smaller horizon"
        )
    check_any_fires(sum(len(f.position) for f in heads), sum(map(len, kept)), passages)
    about: dict[str, Any] = {}
    others = None
    if baselines:
        codes: Any = next((sae.cfg for sae in saes.values() if is_codes(sae)), None)
        trained_on = first.cfg.metadata.dataset_path
        others = untrained(model, cell, first.cfg.d_sae, train_tokens, seed, codes, trained_on)
        about = others.made_from
    run = Run("compare", model, list(saes.values()), passages, locals(), names=list(saes), **about)
    for caution in others.cautions(first.cfg.d_sae) if others else ():
        run.warn(caution)

    def test(n: int) -> pd.DataFrame:
        how = random, scale, kl, horizon, generator(seed, n)
        about = passages[n], lower.of(n, passages[n]), shared[n], kept[n]
        frame = _test(model, saes, cell, *about, others, *how)
        frame.insert(0, "passage", n)
        return frame

    records = run.records([n for n, index in enumerate(kept) if len(index)], test, "Comparing")
    coverage = {name: sum(len(f[name].position) for f in found) / passages.numel() for name in saes}
    summary = _summarize(records, list(saes), coverage, seed)
    summary["n_without_horizon"] = n_without
    return run.result(records, summary, _headline(summary, list(saes)))


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
    lower: LowerLayers | None,
    every: Mapping[str, Firings],
    kept: Int[Tensor, " firing"],
    others: Untrained | None,
    random: Sequence[str],
    scale: str,
    kl: str,
    horizon: int,
    rng: torch.Generator,
) -> pd.DataFrame:
    firings = {name: f.subset(kept) for name, f in every.items()}
    first = next(iter(firings.values()))
    native, conditions = native_of(first), {}
    for name, f in firings.items():
        own = stand_in(saes[name], f, cell)
        conditions[name] = own if scale == "coefficient" else swaps.with_norm(own, native.norm())
    norm = next(iter(conditions.values())).norm()
    conditions |= {} if others is None else others.of(native)
    for kind in random:
        drawn = swaps.random_like(kind, *next(iter(zip(saes.values(), every.values()))), kept, cell, rng)
        conditions[kind] = swaps.with_norm(drawn, norm)
    conditions[DELETED] = swaps.zeros_like(native)
    shown = dict(conditions)
    if random:
        conditions[_NATIVE_RANDOM] = swaps.with_norm(conditions[random[0]], native.norm())
    given = list(conditions.values())
    kls = {"": swaps.divergences(model, cell, tokens, first.position, given, kl, lower=lower)}
    if horizon:
        kls["_later"] = later_divergences(
            model, cell, tokens, first.position, native, given, horizon, kl, lower=lower
        )
    about: dict[str, Any] = {"position": first.position, "token": tokens[first.position]}
    for when, (values, floor) in kls.items():
        by_name = dict(zip(conditions, values, strict=True))
        columns = {
            "delete": DELETED,
            "random": random[0] if random else None,
            "native_random": _NATIVE_RANDOM,
        }
        about |= {f"kl_{column}{when}": by_name[of] for column, of in columns.items() if of in by_name}
        about[f"kl_floor{when}"] = floor
    frames = []
    for number, (name, condition) in enumerate(shown.items()):
        own = _about(firings.get(name), first) | {"cosine": native_cosines(first, condition)}
        own |= {f"kl{when}": values[number] for when, (values, _) in kls.items()}
        frames.append(_frame(about | own).assign(name=name))
    return pd.concat(frames, ignore_index=True).pipe(_in_order)


def _about(firings: Firings | None, first: Firings) -> dict[str, Tensor]:
    """The features and coefficient of an SAE's firings; for other stand-ins -1 and NaN."""
    nothing = torch.full_like(first.atom, NO_ATOM)
    if firings is None:
        missing = torch.full_like(first.coefficient, float("nan"))
        return {"atom": nothing, "key_code": nothing, "coefficient": missing}
    key_code = nothing if firings.key_code is None else firings.key_code
    return {"atom": firings.atom, "key_code": key_code, "coefficient": firings.coefficient}


def _frame(columns: Mapping[str, Tensor]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: (x.double() if x.is_floating_point() else x).cpu().numpy() for name, x in columns.items()}
    )


def _in_order(records: pd.DataFrame) -> pd.DataFrame:
    """The records with the firing and its stand-in in the first columns, then the KLs."""
    first = ["position", "token", "name", "atom", "key_code", "coefficient", "cosine"]
    return pd.DataFrame(records[[*first, *sorted(set(records) - set(first))]])


def _summarize(
    records: pd.DataFrame, saes: list[str], coverage: dict[str, float], seed: int
) -> dict[str, Any]:
    groups = {name: records.loc[records.name == name] for name in dict.fromkeys(records.name)}
    moves = swaps.above_floor(groups[DELETED])  # the same firings in every group
    first, delete = groups[saes[0]]["kl"].to_numpy(), float(groups[DELETED]["kl"].median())
    table, ceiling = [], None
    for name, part in groups.items():
        kl = part["kl"].to_numpy()
        tested = part.rename(columns={"kl": "kl_atom", "kl_later": "kl_atom_later"})
        row: dict[str, Any] = {"name": name}
        if name != DELETED:
            row |= measures.standing(tested, "atom") | measures.intervals(tested, "atom", seed)
        if name in saes and "kl_random" in part:
            chain = measures.chain(tested, seed)
            ceiling = chain["chain_ceiling"]
            row |= {key: chain[key] for key in ("strict_chain_rate", "chain_over_ceiling")}
        table.append(
            row
            | {
                "median_kl": float(part["kl"].median()),
                "kl_over_delete": statistics.ratio(float(part["kl"].median()), delete),
                "median_cosine": None if name == DELETED else float(part["cosine"].median()),
                "first_is_nearer": None
                if name == saes[0]
                else statistics.rate((first < kl)[moves & (kl != first)]),
                "coverage": coverage.get(name),
            }
        )
    keys = dict.fromkeys(key for row in table for key in row)
    return {
        "table": [dict.fromkeys(keys) | row for row in table],
        "n_firings": len(groups[DELETED]),
        "n_at_floor": int((~moves).sum()),
        "chain_ceiling": ceiling,
    }


def _headline(summary: Mapping[str, Any], saes: list[str]) -> str:
    """What the dictionaries and the untrained stand-ins recover, then the win rates of the dictionaries."""
    rows = {row["name"]: row for row in summary["table"]}
    later = any(row["median_recovered_both"] is not None for row in summary["table"])
    when = "_both" if later else ""
    recovered = ", ".join(
        f"{TITLES.get(name, name)} {statistics.share(rows[name][f'median_recovered{when}'])}"
        for name in (*saes, *UNTRAINED)
        if name in rows
    )
    rates = ", ".join(f"{name} {statistics.share(rows[name][f'win_rate{when}'])}" for name in saes)
    where = "own and later positions" if later else "the own position"
    return (
        f"median recovered at {where} of {summary['n_firings']} shared firings: {recovered}; "
        f"win rates {rates}{swaps.floor_note(summary['n_at_floor'])}"
    )


@figure("compare")
def plot_compare(result: ExperimentResult) -> Figure:
    """What every stand-in recovers, and its win rate, with intervals, and the distribution of its KL."""
    records, table = result.records, result.summary["table"]
    figure, (recovered, rates, spread) = new_figure(15.0, 0.9 + 0.42 * len(table), 3)
    saes = set(result.summary["names"])
    names = [row["name"] for row in table][::-1]
    for place, row in enumerate(reversed(table)):
        color = ATOM if row["name"] in saes else DELETE if row["name"] == DELETED else RANDOM
        _dots(recovered, place, row, "median_recovered", color)
        _dots(rates, place, row, "win_rate", color)
        logs = np.log10(records.loc[records["name"] == row["name"], "kl"].clip(lower=KL_FLOOR))
        box = spread.boxplot([logs], positions=[place], orientation="horizontal", showfliers=False,
                             widths=0.55, patch_artist=True)  # fmt: skip
        box["boxes"][0].set(facecolor=color, alpha=0.4)
        box["medians"][0].set(color=INK)
    recovered.axvline(0, color=INK, lw=0.8, ls="--")
    rates.axvline(0.5, color=INK, lw=0.8, ls="--")
    recovered.set(xlim=(-1, 1))
    rates.set(xlim=(0, 1))
    recovered.set_xlabel("median recovered (ring: own and later positions; below -100%: at the edge)")
    rates.set_xlabel("win rate against deletion")
    recovered.set_title(f"{result.summary['n_firings']:,} shared firings", fontsize=11, loc="left")
    rates.set_title("How often nearer than deletion", fontsize=11, loc="left")
    spread.set_xlabel("log10 KL to the native distribution (nats)")
    spread.set_title("How far from native", fontsize=11, loc="left")
    for axis in (recovered, rates, spread):
        axis.set_yticks(range(len(names)), [TITLES.get(name, name.replace("_", " ")) for name in names])
    return figure


def _dots(axis: Any, place: int, row: Mapping[str, Any], figure: str, color: str) -> None:
    """A figure of one stand-in with its interval: at the own position a dot, with the later ones a ring."""
    for when, face in (("", color), ("_both", "white")):
        value, interval = row.get(f"{figure}{when}"), row.get(f"{figure}{when}_ci")
        if value is None:
            continue
        height = place + (0.18 if when else 0)
        if interval is not None:
            axis.plot(interval, [height, height], color=color, lw=2, clip_on=True)
        axis.plot([max(value, -1)], [height], "o", color=color, markerfacecolor=face)
        if not when:
            axis.text(1.02, place, f"{value:.1%}", va="center", fontsize=9)
