"""Generation install (paper, experiment 7): write a token into the memory, and see whether it is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.decoding import batches
from writesae_lens.experiments.installs.prompts import Method, Prompts
from writesae_lens.experiments.installs.targets import PAPER, Stratum, draw_targets
from writesae_lens.experiments.options import Count, Natural, NotNegative, Positive, Seed, as_list, is_whole
from writesae_lens.experiments.passages import find_passages, token_id
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator, seed_of
from writesae_lens.experiments.subjects import CellOrSAE, find_cells
from writesae_lens.figures import ATOM, DELETE, RANDOM, new_figure

# Numbers of the added matrices, at all tokens of all rows, that are differentiated at once.
_NUMBERS_AT_ONCE = 2**25


@experiment(
    "install",
    paper=7,
    question="Can a token be installed by writing it into the memory?",
    row="an edit: one prompt, target, magnitude and number of cells",
    table=("target_in_continuation", "native_target_in_continuation", "mean_lift", "mean_control_lift"),
    max_passages=16,
    context_size=64,
)
def install_tokens(
    model: HookedRecurrent,
    sae_or_cell: SAE[Any] | Cell | tuple[int, int] | str | Sequence[CellOrSAE],
    prompts: Int[Tensor, "passage pos"] | str,
    targets: Sequence[int | str] | int | str | None = None,
    magnitude: Positive | Sequence[Positive] = 3.0,
    positions: Count = 3,
    direction: Literal["jacobian", "unembedding", "greedy"] = "jacobian",
    n_refinements: Natural = 20,
    n_tokens: Count = 20,
    temperature: NotNegative = 0.0,
    n_cells: tuple[Count, ...] = (),
    strata: tuple[Stratum, ...] = PAPER,
    n_ahead: Count = 4,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add a token's direction to a head's writes at a prompt's last positions, and decode: is the token said?

    At each of the last ``positions`` of the prompt, and in each of the cells, a rank-1 matrix is added to the
    native write; everything else is native. Its Frobenius norm is ``magnitude`` times that of the native
    write of the same cell at the same position, as in the paper, which writes in one cell. Directions:

    - ``unembedding`` (the paper's): key side that of the native write, value side W_O[head] W_U[target].
    - ``jacobian``: the rank-1 matrix of that norm that raises the target's logit most above the others: by
      the gradient of its margin over the likeliest other token (the log of the sum of its exponentials over
      the coming ``n_tokens`` steps, along the native continuation), through the true model: decay, erase,
      every coming read, norm, gate and all later layers. It starts as the gradient's leading singular pair at
      the native writes; as the head's norm bends the response long before three write norms,
      ``n_refinements`` steps of Adam on both factors follow, and the best step is kept.
    - ``greedy``: the same for what greedy decoding needs to say the target: at a step of the coming
      ``n_ahead`` the target's margin must be positive, and before it the margins of the tokens that are said
      natively, so that the continuation comes to that step. The smallest of these counts. Several cells need
      this direction: their writes change what is said from the first token on, where ``jacobian`` still
      follows the native continuation.

    In several cells the matrices of all cells and positions are found together: one gradient through all of
    them, and Adam's steps on all factors at once. Each edit has a control, Gaussian rank-1 writes of the same
    norms in the same cells.

    Args:
        model: the model.
        sae_or_cell: a cell, (layer, head), or an SAE on one; several in a list; or a text that names cells:
            "1:*" is all heads of layer 1, "0:2,3:1" two cells. Of SAEs only their cells count.
        prompts: ``[prompt, pos]``, or a text to cut into prompts.
        targets: ids, or texts of one token each; each is tried with every prompt (None: one drawn at random
            in each of the ``strata``).
        magnitude: norm of the added matrix in each cell, in units of the native write there; several are
            tried one by one.
        positions: number of the prompt's last positions that are written to.
        direction: which matrix is added.
        n_refinements: Adam steps of ``jacobian`` and ``greedy``; 0 takes the gradient at the native writes as
            it is.
        n_tokens: number of tokens to decode.
        temperature: 0 is greedy, else tokens are drawn, with the same random numbers for every edit.
        n_cells: in how many of the cells each edit writes: those whose writes move its target most, to first
            order; several numbers are tried one by one (none given: all cells).
        strata: where targets are drawn, by their native rank at the first step: frequent (2 to 99),
            rank_100_1000 (100 to 999), rare (from 1,000), out_of_context (the less likely half, but not in
            the prompt), third_native (100 to 999, of which one in three is said natively, and the others are
            not); those that the vocabulary has not are left out.
        n_ahead: steps of the native continuation at which ``greedy`` may say the target.
        context_size: length of a prompt where ``prompts`` is text (None: as in the SAE's training, else 256).
        seed: seed of targets, controls and draws.
        progress_folder: folder that keeps finished prompts, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per edit: prompt, target, stratum, magnitude, n_cells, native_rank,
        rank (at the first step, from 1), rank_shift (how many ranks it rose), lift (of the first step's
        log-probability, nats), in_continuation, native_in_continuation, control_in_continuation,
        control_lift, perplexity (of the continuation under the unedited model), repetition (the share of its
        runs of three tokens that have stood in it before), both also as native_ and control_, continuation
        and native_continuation (token ids, as JSON). ``summary`` has
        target_in_continuation with a 95% interval (bootstrap over prompts), native_target_in_continuation,
        control_target_in_continuation, median_rank_shift, mean_lift, mean_control_lift, n_already_first (the
        edits whose target comes first natively, and so has nothing to gain there), first_token (how often the
        target comes first, of the other edits; None where there are none), perplexity and repetition of each
        kind (geometric and plain means), all of these by_stratum, by_magnitude and by_n_cells; and curve, a
        row for each magnitude and number of cells.

    Raises:
        WriteSAEError: a target is not one token, prompts are not longer than ``positions``, there are fewer
            cells than ``n_cells``, a target, magnitude, number of cells or stratum is given twice, or logits
            are not finite.
        HookedModelError: there is no such cell.
    """
    magnitudes = tuple(np.ravel(magnitude).tolist())
    if targets is not None:
        is_one = isinstance(targets, str) or is_whole(targets)
        several: list[Any] = [targets] if is_one else as_list("targets", targets)
        targets = [t if isinstance(t, str) else token_id(model, t) for t in several]
    cells = find_cells(model, sae_or_cell)
    counts = _counts(n_cells, cells)
    given = sae_or_cell if isinstance(sae_or_cell, (list, tuple)) else [sae_or_cell]
    sae = next((x for x in given if isinstance(x, SAE)), None)
    passages = find_passages(model, sae, prompts, context_size)
    if passages.shape[1] <= positions:
        raise WriteSAEError(
            f"prompts of {passages.shape[1]} tokens are too short to write at their last {positions}: give "
            "longer ones, or fewer positions"
        )
    wanted = None if targets is None else [token_id(model, t) for t in targets]
    if wanted == [] or not strata:
        raise WriteSAEError("there are no targets: give some, or None to draw them in one stratum at least")
    _check_once(targets=wanted or (), magnitude=magnitudes, n_cells=counts, strata=strata)
    settings = {"targets": wanted, "magnitude": list(magnitudes), "n_cells": list(counts)}
    run = Run("install", model, cells, passages, locals(), **settings)

    n_rows = (len(strata) if wanted is None else len(wanted)) * len(magnitudes) * len(counts)
    n_numbers = n_rows * (positions + n_tokens) * sum(cell.d_k * cell.d_v for cell in cells)
    largest = max(1, _NUMBERS_AT_ONCE // n_numbers)
    groups = [
        slice(start, min(start + largest, group.stop))
        for group in batches(len(passages), n_rows * (positions + n_tokens) * model.cfg.d_vocab)
        for start in range(group.start, min(group.stop, len(passages)), largest)
    ]
    method = Method(direction, n_refinements, n_ahead, magnitudes, counts)

    def install(n: int) -> pd.DataFrame:
        tokens = passages[groups[n]]
        group = Prompts(model, cells, tokens, positions, n_tokens, temperature, seed_of(seed, n))
        if wanted is None:
            native = group.native
            names, chosen = draw_targets(
                strata, tokens, native.first, native.tokens, groups[n].start, generator(seed, n, 1)
            )
        else:
            names, chosen = ["given"] * len(wanted), torch.tensor([wanted] * len(tokens))
        frame = group.install(chosen, names, method, generator(seed, n))
        return frame.assign(prompt=np.arange(len(passages))[groups[n]][frame.prompt])

    records = run.records(range(len(groups)), install, "Installing", unit="batch")
    summary: dict[str, Any] = {**_summarize(records, seed), "n_prompts": len(passages)}
    return run.result(records, summary, _headline(summary, len(cells)))


def _counts(n_cells: Sequence[int], cells: list[Cell]) -> tuple[int, ...]:
    counts = tuple(map(int, n_cells)) or (len(cells),)
    if max(counts) > len(cells):
        raise WriteSAEError(
            f"n_cells={n_cells} makes no sense: {len(cells)} cells are given to write in, so give 1 to "
            f"{len(cells)}"
        )
    return counts


def _check_once(**several: Sequence[Any]) -> None:
    """Refuse what is given twice: its edits would be counted twice."""
    for name, values in several.items():
        if twice := [value for n, value in enumerate(values) if value in values[:n]]:
            raise WriteSAEError(f"{name} has {twice[0]} twice: give each once")


def _headline(summary: dict[str, Any], n_cells: int) -> str:
    interval = statistics.between(summary["target_in_continuation_ci"], ".1%")
    where = "" if n_cells == 1 else f" in {n_cells} cells"
    return (
        f"target in continuation {summary['target_in_continuation']:.1%}{interval}, natively "
        f"{summary['native_target_in_continuation']:.1%}, with random writes "
        f"{summary['control_target_in_continuation']:.1%}, {summary['n_installs']} installs{where}; "
        f"perplexity of the continuation {summary['perplexity']:.3g}, natively "
        f"{summary['native_perplexity']:.3g}"
    )


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    summary = _rates(records)
    said = statistics.cluster_bootstrap(records.in_continuation, records.prompt, seed)
    summary["target_in_continuation_ci"] = said
    summary["n_installs"] = len(records)
    for column in ("stratum", "magnitude", "n_cells"):
        found = records.groupby(column, sort=False)
        summary[f"by_{column}"] = {str(name): {"n": len(part), **_rates(part)} for name, part in found}
    pairs: Any = records.groupby(["magnitude", "n_cells"], sort=False)
    summary["curve"] = [
        {"magnitude": float(m), "n_cells": int(n), "n": len(part), **_rates(part)} for (m, n), part in pairs
    ]
    return summary


def _rates(records: pd.DataFrame) -> dict[str, Any]:
    not_first = records.loc[records.native_rank > 1]
    rates = {
        "target_in_continuation": float(records.in_continuation.mean()),
        "native_target_in_continuation": float(records.native_in_continuation.mean()),
        "control_target_in_continuation": float(records.control_in_continuation.mean()),
        "n_already_first": len(records) - len(not_first),
        "first_token": statistics.rate(not_first["rank"] == 1),
        "median_rank_shift": float(records.rank_shift.median()),
        "mean_lift": float(records.lift.mean()),
        "mean_control_lift": float(records.control_lift.mean()),
    }
    for name in ("", "native_", "control_"):
        rates[f"{name}perplexity"] = float(np.exp(np.log(records[f"{name}perplexity"].to_numpy()).mean()))
        rates[f"{name}repetition"] = float(records[f"{name}repetition"].to_numpy().mean())
    return rates


# Prefix in the summary, colour and label of what is installed, of the control, and of the native text.
_KINDS = (("", ATOM, "installed"), ("control_", RANDOM, "random writes"), ("native_", DELETE, "native"))


_NAMES = {
    "rank_100_1000": "rank\n100 to 999",
    "out_of_context": "out of\ncontext",
    "third_native": "a third\nnative",
}


@figure("install")
def plot_install(result: ExperimentResult) -> Figure:
    """Target in the continuation by norm and number of cells, and by stratum; the cost in fluency."""
    summary = result.summary
    strata, curve = summary["by_stratum"], summary.get("curve", ())  # earlier versions had no curve
    has_cost = "perplexity" in summary
    figure, axes = new_figure(13.0, 4.0, 1 + has_cost + (len(curve) > 1))
    if len(curve) > 1:
        _draw_curve(axes[0], summary)
    bars = axes[-2 if has_cost else -1]
    _draw_bars(bars, strata, "target_in_continuation")
    bars.set_ylim(0, 1.05)
    bars.set_title("Target said, by its native rank", fontsize=11, loc="left")
    axes[0].set_ylabel(f"target in the next {summary['n_tokens']} tokens")
    if has_cost:
        _draw_bars(axes[-1], strata, "perplexity")
        axes[-1].set_title("Perplexity of the text under the unedited model", fontsize=11, loc="left")
    axes[-1].legend(frameon=False, fontsize=9)
    interval = statistics.between(summary["target_in_continuation_ci"], ".1%")
    said = f"Target said in {summary['target_in_continuation']:.1%} of {summary['n_installs']:,} installs"
    figure.suptitle(said + interval + f", direction: {summary['direction']}", fontsize=11, x=0.02, ha="left")
    return figure


def _draw_bars(axis: Axes, groups: dict[str, dict[str, Any]], figure_of_merit: str) -> None:
    for shift, (kind, color, label) in zip((-0.27, 0, 0.27), _KINDS, strict=True):
        heights = [group[f"{kind}{figure_of_merit}"] for group in groups.values()]
        axis.bar(np.arange(len(groups)) + shift, heights, width=0.25, color=color, label=label)
    axis.set_xticks(range(len(groups)), [_NAMES.get(name, name) for name in groups])
    axis.set_xlim(-0.6, max(len(groups), 3) - 0.4)  # one group is no wall of color


def _draw_curve(axis: Axes, summary: dict[str, Any]) -> None:
    """Success against the norm, a line for each number of cells; against the number where the norm is one."""
    rows, color = summary["curve"], {kind: color for kind, color, _ in _KINDS}
    x, line = ("magnitude", "n_cells") if len(summary["magnitude"]) > 1 else ("n_cells", "magnitude")
    lines = list(dict.fromkeys(row[line] for row in rows))
    for number, value in enumerate(lines):
        part = sorted((row for row in rows if row[line] == value), key=lambda row: row[x])
        for kind, style in (("", "o-"), ("control_", "s--"), ("native_", ":")):
            heights = [row[f"{kind}target_in_continuation"] for row in part]
            strength = (number + 1) / len(lines)
            places, look = [row[x] for row in part], {"color": color[kind], "alpha": strength}
            axis.plot(places, heights, style, lw=1.4, ms=4, **look)
        label = f"{value} cell{'s' * (value > 1)}" if line == "n_cells" else f"{value:g} x"
        axis.annotate(f" {label}", (part[-1][x], part[-1]["target_in_continuation"]), fontsize=8, color=ATOM)
    ticks = sorted({row[x] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("norm, in native writes" if x == "magnitude" else "cells written in")
    axis.set_title("Target said, by norm and number of cells", fontsize=11, loc="left")
