"""Memory map: what every head's memory does to a text, without any dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, kept
from hooked_models.hooked_recurrent import Cell
from hooked_models.recordings import record_recurrences
from hooked_models.recurrence import Recurrence, per_channel
from writesae_lens import statistics
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.later import deletion_divergences
from writesae_lens.experiments.options import Count, Seed
from writesae_lens.experiments.passages import check_horizon, find_passages
from writesae_lens.experiments.passes import check_finite
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import check_model
from writesae_lens.figures import new_figure
from writesae_lens.saes.rank1 import Factors

# Where the mean key or value gives this share of a write, a constant stands in for that side. (one_key and
# what `replacement_test` recovers with the mean key correlate by 0.96 over the cells of the shipped models.)
_CONSTANT = 0.9


@experiment(
    "map",
    question="What does each head's memory do to the text, and which heads are worth a dictionary?",
    row="a cell",
    table=("half_of_effect", "n_noted"),
    max_passages=32,
    of_model=True,
)
def memory_map(
    model: HookedRecurrent,
    tokens: Int[Tensor, "passage pos"] | str,
    max_firings: Count = 128,
    horizon: Count = 32,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Delete single writes in every cell of a model, and measure what the model predicts then.

    At random positions, the same in all cells, the write of one head is replaced by zero; everything else is
    native (the erase, too). What that does to the predicted distributions is measured at the token itself and
    over the ``horizon`` tokens after it; every KL equals that of a full hooked pass. The cells of a layer
    share the passes. Beside it: how long a write lives under the transitions, how far it is read, and how
    nearly a constant key or value stands in for it.

    Args:
        model: the model.
        tokens: passages ``[passage, pos]``, or a text.
        max_firings: writes to delete in each cell, spread evenly over the passages.
        horizon: number of tokens after a write over which its deletion is followed.
        context_size: length of a passage where ``tokens`` is text (None: 256).
        seed: seed of the positions and of the bootstrap.
        progress_folder: folder that keeps finished layers, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per cell, those first that are worth a dictionary first: the cells
        with an empty ``note`` before the others, and among them those whose deleted writes surely change
        most, by kl_both_low (a few writes with a large effect make the mean large and uncertain; kl_both
        itself where there is no interval). Columns with ``_low`` and ``_high`` are the ends of a 95% interval
        (bootstrap over passages; missing for a single passage): layer, head, d_k, d_v; n_writes (deleted);
        kl_own and kl_later (mean KL at the own token, and its mean sum over the horizon, nats), kl_both
        (their sum), own_share (kl_own over kl_both; missing at the floor), each with an interval; share (of
        kl_both, of its sum over all cells); kl_floor (what rounding alone can give of kl_both, on average)
        and n_at_floor (writes whose deletion is not above it); write_norm (mean Frobenius norm of all
        writes), with an interval. Of the deleted writes, medians with intervals: half_life (tokens until
        decay and erases have halved a write's Frobenius norm, by Kaplan and Meier, for passages end before
        some are halved; missing where more than half live longer than that); reach (tokens within which half
        of sum |q^T k| over a write's later reads lies, up to the passage's end; 0: it is not read later);
        one_key (share of what the own token and the horizon read of a write, squared, that is read as well if
        the cell's mean key, at the write's projection onto it, stands in for the write's own) and one_value
        (share of the value, squared, along the cell's mean value). note is what speaks against a dictionary:
        "at the floor", "one key" or "one value" (a share of 0.9 or more: a constant stands in for that side),
        "n-gram table" in layer 0. ``summary`` has n_cells, n_noted (with a note), n_at_floor, worth_first (of
        the cells without a note, the first ones that have half of the effect of these between them, as
        "layer:head"), half_of_effect (how many of all cells have half of all effect), median_own_share,
        median_reach and norm_correlation (Spearman, of write_norm and kl_both over cells: whether the norms
        alone would have told).

    Raises:
        WriteSAEError: passages are not longer than the horizon, or writes or logits are not finite.
    """
    check_model(model)
    passages = find_passages(model, None, tokens, context_size)
    check_horizon(passages, horizon)
    run = Run("map", model, None, passages, locals())
    layers = list(model.mixers)

    def measure(n: int) -> pd.DataFrame:
        return _of_layer(model, layers[n], passages, max_firings, horizon, seed)

    records = run.records(range(len(layers)), measure, "Mapping", "layer")
    records["note"] = records.note.fillna("")
    records["share"] = records.kl_both / max(records.kl_both.sum(), 1e-300)
    surely = records.kl_both_low.fillna(records.kl_both).astype(float)
    order = np.lexsort((-surely, records.note != ""))
    records = records.iloc[order].reset_index(drop=True)
    summary = _summarize(records)
    return run.result(records, summary, _headline(records, summary, horizon))


def _summarize(records: pd.DataFrame) -> dict[str, Any]:
    """The figures of merit."""
    free: Any = records[records.note == ""]
    worth = free.iloc[: _half(free.kl_both)]
    norms = statistics.correlation(records.write_norm, records.kl_both, "spearman")[0]
    return {
        "n_cells": len(records),
        "n_noted": len(records) - len(free),
        "n_at_floor": int(records.note.str.contains("at the floor").sum()),
        "worth_first": [f"{layer}:{head}" for layer, head in zip(worth.layer, worth["head"], strict=True)],
        "half_of_effect": _half(records.kl_both.sort_values(ascending=False)),
        "median_own_share": _median(records.own_share),
        "median_reach": _median(records.reach),
        "norm_correlation": norms,
    }


def _half(effects: pd.Series) -> int:
    """How many of the first cells have half of the effect of all."""
    running = effects.cumsum().to_numpy()
    return int((running < running[-1] / 2).sum()) + 1 if len(running) else 0


def _median(values: pd.Series) -> float | None:
    return None if values.isna().all() else float(values.median())


def _headline(records: pd.DataFrame, summary: dict[str, Any], horizon: int) -> str:
    """The result in a line of text."""
    half = f"{summary['half_of_effect']} of them with half of the effect of deleted writes"
    counts = f"{len(records)} cells, {half}"
    worth, first = summary["worth_first"], records.iloc[0]
    if not worth:
        return f"{counts}; a note speaks against a dictionary in each ({records.note.iloc[0]}, ...)"
    interval = None if pd.isna(first.kl_both_low) else [first.kl_both_low, first.kl_both_high]
    more = f" and {len(worth) - 4} more" if len(worth) > 4 else ""
    return (
        f"{counts}; worth a dictionary first: {', '.join(worth[:4])}{more}; {worth[0]} has "
        f"{first.kl_both:.2g} nats a write{statistics.between(interval, '.2g')} over {horizon + 1} tokens, "
        f"{first.own_share:.0%} of it at the write's own"
    )


@torch.no_grad()
def _of_layer(
    model: HookedRecurrent,
    layer: int,
    passages: Int[Tensor, "passage pos"],
    max_firings: int,
    horizon: int,
    seed: int,
) -> pd.DataFrame:
    """The rows of one layer's cells."""
    cells = [cell for cell in model.cells if cell.layer == layer]
    means, norms = _means(model, layer, passages)
    counts = np.diff(np.linspace(0, max_firings, len(passages) + 1).round().astype(int))
    deleted = []
    for n, (passage, count) in enumerate(zip(passages, counts.tolist(), strict=True)):
        # The same positions in all cells: they are compared on the same tokens, and share more of the passes.
        drawn = torch.randperm(len(passage) - horizon, generator=generator(seed, n))[:count].sort().values
        if not len(drawn):
            continue
        positions = drawn.repeat_interleave(len(cells)).to(passage.device)
        heads = torch.arange(len(cells), device=passage.device).repeat(len(drawn))
        recurrence, lower = _recurrence(model, layer, passage)
        native = Factors(*(x[0, positions, heads][:, None].float() for x in (recurrence.k, recurrence.v)))
        kl, floor = deletion_divergences(model, layer, passage, positions, heads, native, horizon, lower)
        unit = functional.normalize(native.value[:, 0], dim=-1)
        columns = {
            "head": heads,
            "kl_own": kl[:, 0],
            "kl_later": kl[:, 1:].sum(-1),
            "floor": floor.sum(-1),
            "one_value": (unit * means.value[heads]).sum(-1).square(),
            **_lives(recurrence, positions, heads, means.key, horizon),
        }
        deleted.append(pd.DataFrame({name: x.cpu() for name, x in columns.items()}).assign(passage=n))
    of_head: dict[Any, pd.DataFrame] = dict(iter(pd.concat(deleted, ignore_index=True).groupby("head")))
    rows = [_row(cell, of_head[cell.head], norms[:, :, cell.head], seed) for cell in cells]
    return pd.DataFrame(rows)


def _recurrence(
    model: HookedRecurrent, layer: int, passage: Int[Tensor, " pos"]
) -> tuple[Recurrence, LowerLayers | None]:
    """A layer's recurrence in a passage, and what the layers below make of it."""
    mixer = model.mixers[layer]
    with kept(layer) as lower, record_recurrences([mixer]) as recorded:
        model(passage[None], prepend_bos=False, return_type=None, stop_at_layer=layer + 1, use_cache=False)
    recurrence = recorded[mixer]
    check_finite(f"writes of layer {layer}", recurrence.k, recurrence.v, recurrence.q)
    return recurrence, lower.found


def _means(
    model: HookedRecurrent, layer: int, passages: Int[Tensor, "passage pos"]
) -> tuple[Factors, Float[Tensor, "passage pos head"]]:
    """Directions of the mean unit key and value of each head, ``[head, d]``, and the norms of all writes."""
    sums: list[Any] = [0.0, 0.0]
    norms = []
    for passage in passages:
        recurrence, _ = _recurrence(model, layer, passage)
        sides = [x[0].float() for x in (recurrence.k, recurrence.v)]
        sums = [total + functional.normalize(x, dim=-1).sum(0) for total, x in zip(sums, sides, strict=True)]
        norms.append((sides[0].norm(dim=-1) * sides[1].norm(dim=-1)).cpu())
    return Factors(*(functional.normalize(total, dim=-1) for total in sums)), torch.stack(norms)


def _lives(
    recurrence: Recurrence,
    positions: Int[Tensor, " write"],
    heads: Int[Tensor, " write"],
    mean_key: Float[Tensor, "head d_k"],
    horizon: int,
) -> dict[str, Tensor]:
    """How long writes of one passage live, how far they are read, and how well their mean key stands in.

    A write k v^T becomes T_{t+h} ... T_{t+1} k v^T: only its key side changes, so its norm falls as that of
    the key, and the read at t + h gets (q^T k) v of it.

    Returns:
        half_life, tokens until the norm is half of what it was, or until the passage ends; is_halved; reach,
        tokens within which half of the sum of |q^T k| over later reads lies, 0 where that sum is 0; and
        one_key, 1 - sum (q^T k - q^T m)^2 / sum (q^T k)^2 over the own and ``horizon`` later reads, for the
        projection m of k onto the mean key (0 where nothing is read).
    """
    rec = recurrence.with_erase_vector().map(Tensor.float)
    decay, length = per_channel(rec.g)[0].exp(), rec.q.shape[1]  # [pos, head, 1 or d_k]
    key, mean = rec.k[0, positions, heads], mean_key[heads]
    start = key.norm(dim=-1)
    half_life = length - 1 - positions
    is_halved = torch.zeros_like(positions, dtype=torch.bool)
    keys = torch.stack([key, (key * mean).sum(-1, keepdim=True) * mean])  # [native or mean, write, d_k]
    reads = [(rec.q[0, positions, heads] * keys).sum(-1)]
    for h in range(1, length - int(positions.min())):
        at = (positions + h).clamp(max=length - 1)
        inside = positions + h < length
        moved = decay[at, heads] * keys
        if rec.a is not None and rec.b is not None:
            moved = moved + rec.a[0, at, heads] * (rec.b[0, at, heads] * keys).sum(-1, keepdim=True)
        keys = moved * inside[:, None]
        now = inside & ~is_halved & (keys[0].norm(dim=-1) <= start / 2)
        half_life = torch.where(now, h, half_life)
        is_halved = is_halved | now
        reads.append((rec.q[0, at, heads] * keys).sum(-1))
    read, of_mean = torch.stack(reads, dim=1)  # [distance, write]
    later = torch.cat([torch.zeros_like(read[:1]), read[1:].abs()]).cumsum(0)
    near = slice(horizon + 1)
    missed, all_read = (read - of_mean)[near].square().sum(0), read[near].square().sum(0)
    return {
        "half_life": half_life,
        "is_halved": is_halved,
        "reach": (later < later[-1] / 2).sum(0),
        "one_key": torch.where(all_read > 0, 1 - missed / all_read, 0),
    }


def _row(cell: Cell, writes: pd.DataFrame, norms: Float[Tensor, "passage pos"], seed: int) -> dict[str, Any]:
    """The row of one cell, from its deleted writes and the norms of all."""
    at = writes.passage, seed
    row: dict[str, Any] = {"layer": cell.layer, "head": cell.head, "d_k": cell.d_k, "d_v": cell.d_v}
    row["n_writes"] = len(writes)
    both = writes.kl_own + writes.kl_later
    for name, kl in (("kl_own", writes.kl_own), ("kl_later", writes.kl_later), ("kl_both", both)):
        row |= _with_interval(name, float(np.mean(kl)), statistics.cluster_bootstrap(kl, *at))
    at_floor = both <= writes.floor
    notes = ["at the floor"] if at_floor.mean() > 0.5 else []
    share, shares = None, None
    if not notes:
        share = float(writes.kl_own.sum() / both.sum())
        shares = statistics.recovered_interval(writes.kl_later, both, *at)
    row |= _with_interval("own_share", share, shares)
    row |= {"kl_floor": float(writes.floor.mean()), "n_at_floor": int(at_floor.sum())}
    passage = np.arange(len(norms)).repeat(norms.shape[1])
    mean_norm = statistics.cluster_bootstrap(norms.flatten(), passage, seed)
    row |= _with_interval("write_norm", float(norms.mean()), mean_norm)
    life = statistics.median_survival(writes.half_life, writes.is_halved, *at)
    row |= _with_interval("half_life", *life)
    for name in ("reach", "one_key", "one_value"):
        values = writes[name]
        row |= _with_interval(name, float(np.median(values)), statistics.median_interval(values, *at))
    notes += [f"one {side}" for side in ("key", "value") if row[f"one_{side}"] >= _CONSTANT]
    notes += ["n-gram table"] if cell.layer == 0 else []
    return row | {"note": ", ".join(notes)}


def _with_interval(
    name: str, value: float | None, interval: Sequence[float] | None
) -> dict[str, float | None]:
    """The columns of a figure: itself and the ends of its interval; what is infinite is missing."""
    low, high = interval or (None, None)
    columns = {name: value, f"{name}_low": low, f"{name}_high": high}
    return {name: None if x is None or np.isinf(x) else x for name, x in columns.items()}


# Measures with a heat map: the title, whether colours are on a log scale, and how a number is written.
PANELS = {
    "kl_both": ("effect of a deleted write, nats", True, "{:.0e}"),
    "own_share": ("share at the own token", False, "{:.0%}"),
    "reach": ("reach of later reads, tokens", True, "{:.0f}"),
    "half_life": ("half-life of a write, tokens", True, "{:.0f}"),
    "one_key": ("share that one key gives", False, "{:.0%}"),
    "one_value": ("share that one value gives", False, "{:.0%}"),
}
# Cells of a heat map that are still large enough to write a number into.
_MOST_WRITTEN = 200


@figure("map")
def plot_map(result: ExperimentResult) -> Figure:
    """Heat maps of the measures, layer by head; a red frame: worth a dictionary first, grey: no number."""
    records = result.records
    grid = np.full(records[["layer", "head"]].to_numpy().max(axis=0) + 1, np.nan)
    height, width = (min(0.6 + 0.3 * n, 5.0) for n in grid.shape)
    figure, axes = new_figure(3 * max(3.2, width + 0.8), 2 * max(1.6, height), len(PANELS), rows=2)
    for axis, (name, panel) in zip(axes, PANELS.items(), strict=True):
        values = grid.copy()
        values[records.layer, records["head"]] = records[name].astype(float)
        _draw_panel(axis, values, *panel)
    for cell in result.summary["worth_first"]:
        layer, head = map(int, cell.split(":"))
        axes[0].add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="r", linewidth=2))
    return figure


def _draw_panel(
    axis: Axes, values: Float[np.ndarray, "layer head"], title: str, logarithmic: bool, form: str
) -> None:
    """The heat map of one measure."""
    axis.set(xlabel="head", ylabel="layer", facecolor="#d8d8d8")
    axis.set_title(title, fontsize=10, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    is_shown = values > 0 if logarithmic else ~np.isnan(values)
    low, high = (values[is_shown].min(), values[is_shown].max()) if is_shown.any() else (1.0, 1.0)
    norm = LogNorm(low, max(high, low * 1.01)) if logarithmic else Normalize(low, max(high, low + 0.01))
    image = axis.imshow(
        np.where(is_shown, values, np.nan), norm=norm, cmap="viridis", aspect="auto", origin="lower"
    )
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.9)
    ticks = [float(tick) for tick in norm.inverse(np.linspace(0, 1, 4))]
    bar.set_ticks(ticks, labels=[_number(tick, form) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    if values.size > _MOST_WRITTEN:
        return
    for layer, head in zip(*np.nonzero(~np.isnan(values))):
        value = float(values[layer, head])
        colour = "w" if is_shown[layer, head] and norm(value) < 0.6 else "k"
        axis.text(head, layer, _number(value, form), ha="center", va="center", fontsize=7, color=colour)


def _number(value: float, form: str) -> str:
    return form.format(value).replace("e-0", "e-")
