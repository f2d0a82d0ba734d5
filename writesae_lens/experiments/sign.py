"""Sign test (paper, experiment 6): does a token's logit move the way that its direction says?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor, nn

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, kept
from hooked_models.edited_runs import residual_with_swapped_writes
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, token_logits
from writesae_lens import statistics
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.options import Count, Positive, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import check_finite, native_factors, unembedding_directions
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_cell
from writesae_lens.figures import ATOM, DELETE, INK, RANDOM, new_figure
from writesae_lens.saes.rank1 import Factors

# Trials whose logits are ranked at once, and whose derivatives are taken from one graph.
_RANKED_AT_ONCE, _TRIALS_AT_ONCE = 64, 256


@experiment(
    "sign",
    paper=6,
    question="Does a token's logit move as predicted when a direction for it is written?",
    row="a trial: one position and token",
    table=("agreement", "agreement_linear", "majority_sign", "pearson"),
)
def sign_test(
    model: HookedRecurrent,
    sae_or_cell: SAE[Any] | Cell | tuple[int, int],
    tokens: Int[Tensor, "passage pos"] | str,
    direction: Literal["unembedding", "jacobian"] = "unembedding",
    magnitude: Positive = 1.0,
    n_trials: Count = 2000,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Write a token's direction at one position, and compare the shift of its logit there with a prediction.

    A trial is a random position and a random token T. A matrix of ``magnitude`` times the native write's norm
    is written beside it:

    - ``unembedding`` (the paper's): key side that of the native write, value side W_O[head] W_U[T]; the
      prediction is <unit key, q_t> |W_O[head] W_U[T]| times the norm: its sign is that of <key, q_t>. This
      is the test to compare with the paper. ``linear`` is the true derivative along the same writes, the
      most that any prediction to first order can do.
    - ``jacobian``: key side the read q_t, value side the derivative of T's logit by the head's output at the
      native passage; the prediction is the derivative along it, which is never negative. It asks whether a
      step of this size up the gradient leads up, and is a check of the derivative, not of the paper's claim.

    A trial in which the logit does not move at all, or for which no movement is predicted (0), has no sign:
    it is counted as still, and left out of the rate. Beside the rate stands what a guess reaches that looks
    at nothing: always the commoner sign of the measured shifts.

    Args:
        model: the model.
        sae_or_cell: a cell, (layer, head), or an SAE on one; only the cell counts (and, for text, the size of
            its passages).
        tokens: passages ``[passage, pos]``, or a text.
        direction: which matrix is written.
        magnitude: norm of that matrix, in units of the native write there.
        n_trials: number of trials, spread evenly over the passages; a position is used again only after all
            others of its passage.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of positions and tokens.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per trial: passage, position, token (T), rank (of T natively,
        from 1), predicted, linear (the true derivative along what is written), measured (logits).
        ``summary`` has agreement (share of trials in which measured and predicted have one sign, of those
        where neither is 0) with a 95% interval (bootstrap over passages), n_still (the trials that are left
        out of it), agreement_linear and n_still_linear likewise, majority_sign (the share of the commoner
        sign among the shifts that are not 0), and Pearson's correlation of both with the measured shift.
        Where every trial is still there is no rate: None.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or logits or their derivatives are not
            finite.
        HookedModelError: there is no such cell.
    """
    cell = find_cell(model, sae_or_cell)
    passages = find_passages(model, sae_or_cell, tokens, context_size)
    counts = np.diff(np.linspace(0, n_trials, len(passages) + 1).round().astype(int))
    run = Run("sign", model, cell, passages, locals())

    def trials(n: int) -> pd.DataFrame:
        rng = generator(seed, n)
        frame = _trials(model, cell, passages[n], int(counts[n]), direction, magnitude, rng)
        frame.insert(0, "passage", n)
        return frame

    records = run.records(np.flatnonzero(counts).tolist(), trials, "Writing")
    summary = _summarize(records, seed)
    return run.result(records, summary, _headline(summary, direction))


def _headline(summary: dict[str, Any], direction: str) -> str:
    """The rate like for like with the paper and the derivative's, or what the steps up the gradient are."""
    n_still = summary["n_still"]
    if summary["agreement"] is None:
        return f"no rate: in none of {n_still} trials does a logit move as a sign is predicted for"
    own, linear = (
        f"{summary[name]:.1%}{statistics.between(summary[f'{name}_ci'], '.1%')}"
        if summary[name] is not None
        else "none"
        for name in ("agreement", "agreement_linear")
    )
    count = f"{summary['n_trials_done'] - n_still} trials" + (
        f", {n_still} more without a sign" if n_still else ""
    )
    if direction == "jacobian":
        return (
            f"steps up the derivative raise the logit in {own} of {count} (a check of the derivative: the "
            "paper's test is direction='unembedding')"
        )
    return (
        f"signs agree in {own} as the paper predicts, in {linear} by the derivative along the same writes; "
        f"always the commoner sign {summary['majority_sign']:.1%}; {count}"
    )


def _trials(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    count: int,
    direction: str,
    magnitude: float,
    rng: torch.Generator,
) -> pd.DataFrame:
    rounds = [torch.randperm(len(tokens), generator=rng) for _ in range(-(-count // len(tokens)))]
    at = torch.cat(rounds)[:count].to(tokens.device)
    target = torch.randint(0, model.cfg.d_vocab, (count,), generator=rng).to(tokens.device)
    with kept(cell.layer) as below:
        key, value, read = (x[at].float() for x in native_factors(model, cell, tokens)[:3])
    native = Factors(key[:, None], value[:, None])
    slope = output_gradient(model, cell, tokens, at, target, native, read, below.found)
    size = magnitude * native.norm()
    if direction == "jacobian":
        keys, values = read, slope
        predicted = size * read.norm(dim=-1) * slope.norm(dim=-1)
    else:
        keys, values = key, unembedding_directions(model, cell, target)
        unit = nn.functional.normalize(key, dim=-1)
        predicted = size * (unit * read).sum(-1) * values.norm(dim=-1)
    added = swaps.with_norm(Factors(keys[:, None], values[:, None]), size)
    linear = (added.key[:, 0] * read).sum(-1) * (added.value[:, 0] * slope).sum(-1)
    measured, rank = [], []
    changed = [swaps.summed(native, added)]
    runs = swaps.swapped_residuals(model, cell, tokens, at, changed, lower=below.found)
    for some, residual, (patched,) in runs:
        followed, residual = target[some], residual[at[some]]
        with torch.no_grad():
            before, after = (token_logits(model, x, followed) for x in (residual, patched))
        check_finite("logits", before, after)
        measured.append(after - before)
        rank.append(_ranks(model, residual, followed))
    return pd.DataFrame(
        {
            "position": at.cpu().numpy(),
            "token": target.cpu().numpy(),
            "rank": torch.cat(rank).cpu().numpy(),
            "predicted": predicted.detach().cpu().double().numpy(),
            "linear": linear.detach().cpu().double().numpy(),
            "measured": torch.cat(measured).cpu().double().numpy(),
        }
    )


@torch.no_grad()
def _ranks(
    model: HookedRecurrent, residual: Float[Tensor, "trial d_model"], targets: Int[Tensor, " trial"]
) -> Int[Tensor, " trial"]:
    """The rank of each target among the logits of its place, 1 for the largest."""
    ranks = []
    for some in torch.arange(len(targets), device=targets.device).split(_RANKED_AT_ONCE):
        logits = logits_of(model, residual[some])
        ranks.append((logits > logits.gather(1, targets[some, None])).sum(-1) + 1)
    return torch.cat(ranks)


def output_gradient(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " trial"],
    targets: Int[Tensor, " trial"],
    native: Factors,
    read: Float[Tensor, "trial d_k"],
    lower: LowerLayers | None = None,
) -> Float[Tensor, "trial d_v"]:
    """Derivative of each target's logit, at its position, by the head's read S_t^T q_t there.

    Raises:
        WriteSAEError: logits or derivatives are not finite.
    """
    # A matrix with key q / |q|^2 adds exactly its value side to the read S_t^T q_t.
    inverse = read / read.square().sum(-1, keepdim=True).clamp(min=1e-30)
    slopes = []
    for here in torch.arange(len(positions), device=positions.device).split(_TRIALS_AT_ONCE):
        added = torch.zeros_like(native.value[here, 0]).requires_grad_()
        with torch.enable_grad():
            written = swaps.summed(
                Factors(native.key[here], native.value[here]),
                Factors(inverse[here, None].detach(), added[:, None]),
            )
            _, residual = residual_with_swapped_writes(
                model, tokens, cell, positions[here], *written, lower=lower
            )
            total = token_logits(model, residual, targets[here]).sum()
            check_finite("logits", total)
            slopes.append(torch.autograd.grad(total, added)[0])
    check_finite("derivatives of the logits", *slopes)
    return torch.cat(slopes)


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"n_trials_done": len(records)}
    for name, column in (("agreement", "predicted"), ("agreement_linear", "linear")):
        signs = _signs(records, column)
        counted, suffix = signs != 0, name.removeprefix("agreement")
        agrees = signs[counted] > 0
        summary[name] = statistics.rate(agrees)
        summary[f"{name}_ci"] = statistics.cluster_bootstrap(agrees, records.passage[counted], seed)
        summary[f"n_still{suffix}"] = int((signs == 0).sum())
        summary[f"pearson{suffix}"] = statistics.correlation(records[column], records.measured, "pearson")[0]
    rises = statistics.rate(records.measured[records.measured != 0] > 0)
    summary["majority_sign"] = None if rises is None else max(rises, 1 - rises)
    summary["median_abs_shift"] = float(records.measured.abs().median())
    summary["mean_shift"] = float(records.measured.mean())
    return summary


def _signs(records: pd.DataFrame, column: str) -> pd.Series:
    """1 where a predicted and the measured shift have one sign, -1 where they differ, 0 where one is 0."""
    return np.sign(records[column]) * np.sign(records.measured)


@figure("sign")
def plot_sign(result: ExperimentResult) -> Figure:
    """Measured against predicted shifts, for the prediction of the direction and for the true derivative."""
    records, summary = result.records, result.summary
    panels = [("linear", "agreement_linear", "the derivative")]
    if summary["direction"] != "jacobian":  # whose predictions are the derivative's
        panels.insert(0, ("predicted", "agreement", "the paper's prediction"))
    figure, axes = new_figure(4.5 * len(panels), 4.2, len(panels))
    limit = max(float(records.measured.abs().quantile(0.5)), 1e-12)
    for axis, (column, rate, title) in zip(axes, panels, strict=True):
        signs = _signs(records, column)
        groups = [(signs > 0, ATOM, "signs agree"), (signs < 0, DELETE, "signs differ")]
        groups += [(signs == 0, RANDOM, "no sign")] if (signs == 0).any() else []
        for mask, color, label in groups:
            part = records[mask]
            axis.scatter(part[column], part.measured, s=6, alpha=0.4, lw=0, color=color, label=label,
                         rasterized=True)  # fmt: skip
        axis.axhline(0, color=INK, lw=0.8)
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_xscale("symlog", linthresh=max(float(np.median(records[column].abs())), 1e-12))
        axis.set_yscale("symlog", linthresh=limit)
        axis.set_xlabel("predicted shift of the logit")
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_title(f"{title}: signs agree in {statistics.share(summary[rate])}", fontsize=11, loc="left")
    axes[0].set_ylabel("measured shift of the logit")
    axes[0].legend(frameon=False, fontsize=9, markerscale=3)
    return figure
