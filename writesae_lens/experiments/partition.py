"""Partition of the dictionary (paper, experiment 3): which atoms look like native writes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sae_lens import SAE
from scipy import stats
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.sides import PLURALS, features_by_side, side_cosines
from writesae_lens.experiments.firings import (
    Firings,
    atom_cosines,
    check_any_fires,
    find_firings,
    is_codes,
    native_of,
)
from writesae_lens.experiments.options import Count, Natural, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, new_figure
from writesae_lens.saes.sae import MatrixSAE

EVIDENCE = -10.0
"""Largest delta BIC that is taken for evidence of two classes ("very strong" in Kass and Raftery, 1995)."""
CLASS_COLORS = {"register": ATOM, "bundle": DELETE}
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@experiment(
    "partition",
    paper=3,
    question="Which features look like native writes (registers), and which less so (bundles)?",
    row="an atom of the dictionary",
    table=("n_register", "n_bundle", "n_dead", "delta_bic", "register_median_cosine"),
    max_passages=64,
)
def partition_atoms(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    min_firings: Count = 1,
    thresholds: tuple[float, ...] = THRESHOLDS,
    orders: tuple[Count, ...] = (1, 2, 3, 4),
    n_seeds: Count = 10,
    skip_positions: Natural = 0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Divide the atoms into registers, bundles and dead atoms by their alignment with native writes.

    An atom's alignment is the median, over its firings, of the signed cosine between its matrix and the
    native write (of a code: with its own side of the write, over the positions where it is the dominant code
    of that side). A two-component Gaussian mixture on these medians divides the atoms that fire: *registers*
    are those at or above the cosine where the posterior of the component with the larger mean rises through
    1/2, *bundles* those below; key codes and value codes are divided each by themselves. *Dead* atoms fire at
    no position of these passages; they may fire in other text.

    The classes are names for more and less aligned, by cosine alone. A mixture divides any atoms in two:
    whether there are two kinds at all is said by ``delta_bic``, and only at -10 or less is there evidence
    (``two_classes``). Atoms that start as training writes (``init_from_writes``, the default of this package)
    are aligned with writes by construction: their cosines are no finding.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states (the write is what its atoms are compared with).
        tokens: passages ``[passage, pos]``, or a text.
        min_firings: leave atoms with fewer firings out of the mixture (class "rare").
        thresholds: cosines; the registers that each would give in place of the mixture are counted.
        orders: numbers of components for which the BIC of a mixture is computed, where there are two atoms
            per component.
        n_seeds: fits, each from one random start, that the stability compares.
        skip_positions: leave out the first positions of every passage.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of the mixtures' starting points.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per atom of the dictionary: atom, n_firings, median_cosine
        (in [-1, 1]; NaN if dead), class ("register", "bundle", "rare" or "dead"), posterior (of the
        register component, as the mixture has it; NaN where it has none), side ("atom"; of codes "key" or
        "value"). ``summary`` has the counts n_register, n_bundle, n_rare and n_dead, delta_bic (of two
        components against one, negative where two are better), two_classes (whether it is -10 or less),
        bic_by_order, register_median_cosine, threshold (a cosine), n_register_by_threshold, stability (mean
        adjusted Rand index between seeds) and the mixture (weights, means, deviations, lower component
        first). With fewer than 4 atoms, or equal cosines, there is no mixture: these figures are None and all
        atoms registers. Of codes the figures are those of the value codes, and by_side has both sides'.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, no atom fires, or none
            ``min_firings`` times, or the model gives logits that are not finite.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    run = Run("partition", model, sae, passages, locals(), parts_depend_on_options=False)

    def align(n: int) -> pd.DataFrame:
        return _alignments(sae, site.cell, find_firings(model, sae, site, passages[n]))

    rows = run.records(range(len(passages)), align, "Firings")
    kept = rows.loc[rows.position >= skip_positions]
    check_any_fires(len(rows), len(kept), passages)
    sides = features_by_side(sae)
    parts, by_side = [], {}
    for side, features in sides.items():
        own, split = _divide(kept, features, min_firings, seed)
        cosines = own.loc[own["class"].isin(["register", "bundle"]), "median_cosine"].to_numpy()
        if not cosines.size:
            raise WriteSAEError(
                f"{(own['n_firings'] > 0).sum()} {PLURALS[side]} fire, but none min_firings={min_firings} "
                f"times in {own['n_firings'].sum()} firings: give more text or a smaller min_firings"
            )
        parts.append(own.assign(side=side))
        by_side[side] = _summarize(own, cosines, split, thresholds, orders, n_seeds, seed)
    summary = {"n_firings": len(kept) // len(sides), "n_passages": len(passages), **by_side[[*sides][-1]]}
    if len(sides) > 1:
        summary["by_side"] = by_side
    said = [_headline(side, found) for side, found in by_side.items()]
    if getattr(sae.cfg, "init_from_writes", True) and isinstance(sae, MatrixSAE):
        said.append("features that start as training writes are registers by construction")
    return run.result(pd.concat(parts, ignore_index=True), summary, "; ".join(said))


def _headline(side: str, found: dict[str, Any]) -> str:
    """The classes of one side, and whether there is evidence for them."""
    n_register, n_bundle, n_dead, delta = (
        found[name] for name in ("n_register", "n_bundle", "n_dead", "delta_bic")
    )
    what = PLURALS[side]
    if found["mixture"] is None:
        return f"{n_register} {what} not divided: too few, or of one cosine; {n_dead} dead"
    of = "" if side == "atom" else f" among the {what}"
    if found["two_classes"]:
        return f"{n_register} registers, {n_bundle} bundles, {n_dead} dead{of}, delta BIC {delta:.1f}"
    evidence = "none" if delta is None else f"{delta:.1f}, above {EVIDENCE:g}"
    return (
        f"no evidence for two classes of {what} (delta BIC {evidence}); cut by cosine {n_register} "
        f"registers, {n_bundle} bundles, {n_dead} dead"
    )


def _alignments(sae: SAE[Any], cell: Cell, firings: Firings) -> pd.DataFrame:
    """Position, feature and cosine of every firing; of codes a row for each side."""
    if is_codes(sae):
        native = native_of(firings)
        assert firings.key_code is not None
        found = {"key": firings.key_code, "value": firings.atom}
        chosen = [(codes, side_cosines(sae, side, codes, native)) for side, codes in found.items()]
    else:
        chosen = [(firings.atom, atom_cosines(sae, firings, cell))]
    frames = [
        {
            "position": firings.position.cpu().numpy(),
            "atom": atom.cpu().numpy(),
            "cosine": cosine.double().cpu().numpy(),
        }
        for atom, cosine in chosen
    ]
    return pd.concat([pd.DataFrame(frame) for frame in frames], ignore_index=True)


def class_names(split: statistics.Split) -> NDArray[Any]:
    """The class of each atom of a split: "register" or "bundle"."""
    return np.where(split.upper, "register", "bundle").astype(object)


def _divide(
    firings: pd.DataFrame, features: range, min_firings: int, seed: int
) -> tuple[pd.DataFrame, statistics.Split | None]:
    """The records of one side, one row a feature, and the split of those with ``min_firings`` firings."""
    count = np.bincount(firings["atom"].to_numpy(dtype=int), minlength=features.stop)
    median = np.full(features.stop, np.nan)
    for atom, cosines in firings.groupby("atom")["cosine"]:
        if int(str(atom)) in features:
            median[int(str(atom))] = np.median(cosines)
    count, median = (x[features.start : features.stop] for x in (count, median))
    alive = count >= min_firings
    classes = np.where(count > 0, "rare", "dead").astype(object)
    posterior = np.full(len(features), np.nan)
    split = statistics.split_in_two(median[alive], seed)
    if split is None:
        classes[alive] = "register"
    else:
        classes[alive], posterior[alive] = class_names(split), split.posterior
    columns = {"atom": features, "n_firings": count, "median_cosine": median, "class": classes}
    return pd.DataFrame(columns | {"posterior": posterior}), split


def _summarize(
    records: pd.DataFrame,
    cosines: NDArray[Any],
    split: statistics.Split | None,
    thresholds: tuple[float, ...],
    orders: tuple[int, ...],
    n_seeds: int,
    seed: int,
) -> dict[str, Any]:
    names = ("register", "bundle", "rare", "dead")
    summary: dict[str, Any] = {
        f"n_{name}": int((records["class"].to_numpy() == name).sum()) for name in names
    }
    bic = {order: statistics.mixture_bic(cosines, order, seed) for order in sorted({1, 2, *orders})}
    summary["delta_bic"] = None if bic[1] is None or bic[2] is None else bic[2] - bic[1]
    summary["two_classes"] = summary["delta_bic"] is not None and summary["delta_bic"] <= EVIDENCE
    summary["bic_by_order"] = {str(order): bic[order] for order in orders if bic[order] is not None}
    registers = records.loc[records["class"] == "register", "median_cosine"].to_numpy()
    summary["register_median_cosine"] = float(np.median(registers)) if registers.size else None
    summary["threshold"] = None if split is None else split.threshold
    summary["n_register_by_threshold"] = {f"{t:g}": int((cosines >= t).sum()) for t in thresholds}
    summary["stability"] = statistics.split_stability(cosines, n_seeds, seed)
    summary["mixture"] = split and {
        name: list(getattr(split, name)) for name in ("weights", "means", "deviations")
    }
    return summary


@figure("partition")
def plot_partition(result: ExperimentResult) -> Figure:
    """Median cosines by class under the mixture's densities; registers by threshold; BIC by order."""
    records, summary = result.records, result.summary
    figure, (histogram, sweep, orders) = new_figure(13.0, 4.0, 3)
    side = "value" if "by_side" in summary else "atom"  # the mixture is of the value codes
    if side == "value":
        records = records.loc[records["side"] == side]
    alive = records[records["class"].isin(list(CLASS_COLORS))]
    low, high = alive.median_cosine.min(), alive.median_cosine.max()
    margin = 0.05 * (high - low) + 0.01
    bins = np.linspace(low - margin, high + margin, 41)
    histogram.hist(
        [alive.loc[alive["class"] == name, "median_cosine"] for name in CLASS_COLORS],
        bins=list(bins), stacked=True, color=list(CLASS_COLORS.values()), alpha=0.55,
        label=[f"{name} ({summary[f'n_{name}']:,})" for name in CLASS_COLORS],
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
    whose = {"atom": "atom to the native write", "value": "code to the native value"}[side]
    histogram.set_xlabel(f"median cosine of the {whose}")
    histogram.set_ylabel(PLURALS[side])
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
    if delta is not None and delta > EVIDENCE:
        said += ", no evidence"
    orders.set_title(f"BIC by order: {said}", fontsize=11, loc="left")
    return figure
