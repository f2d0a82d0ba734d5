"""Splice (paper, experiment 8): what a text loses when a head remembers reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Site
from hooked_models.unembedding import logits_of
from writesae_lens import statistics
from writesae_lens.divergences import wide
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.options import Count, Seed, as_list
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import cache_of, check_finite, read
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, new_figure

CONDITIONS = ("native", "spliced", "deleted")
# Logits that are in memory at once.
_LOGITS_AT_ONCE = 2**25


@experiment(
    "splice",
    paper=8,
    question="How much worse does the model predict when heads remember reconstructions?",
    row="a passage",
    table=("increase_percent", "increase_percent_deleted"),
)
def splice_test(
    model: HookedRecurrent,
    saes: SAE[Any] | Sequence[SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Replace what heads remember of a passage's first half, and measure the perplexity of the second.

    An SAE on states replaces its head's state once, after the first half, by the reconstruction of it; one
    on writes replaces every write of the first half. ``deleted`` puts zeros there instead, which measures
    what the head's memory of the first half is worth. A state is replaced between two tokens, so all outputs
    of the first half stay native; writes are replaced as they are made, which changes the head's outputs in
    the first half too, and so what later layers remember of it. An odd token belongs to the second half,
    whose first token is not predicted.

    Args:
        model: the model that the SAEs were trained on.
        saes: one, or one for each of several heads (all heads of a layer, say), which are replaced together.
        tokens: passages ``[passage, pos]``, or a text.
        context_size: length of a passage where ``tokens`` is text (None: that of the first SAE's training,
            else 256).
        seed: seed of the bootstrap.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per passage: passage, n_tokens (predicted ones), nll_native,
        nll_spliced, nll_deleted (mean nats a token), error (squared error of the reconstruction as a share of
        the squared norm, over all that was replaced; of writes above another spliced layer, as they are
        there). ``summary`` has perplexity_native, perplexity_spliced, perplexity_deleted, error (mean),
        increase_percent with a 95% interval (bootstrap over passages), increase_percent_deleted, and
        recovered: the share of the deletion's rise in nats that the reconstruction avoids (None where
        deletion costs no more than rounding might: four units in the last place of the native loss, in the
        model's dtype, over the root of the number of tokens).

    Raises:
        WriteSAEError: SAEs and cells do not fit, two SAEs are on one cell, passages have fewer than four
            tokens, or logits are not finite.
    """
    several = [saes] if isinstance(saes, SAE) else as_list("saes", saes)
    if not several:
        raise WriteSAEError("there are no SAEs to splice in: give one at least")
    sites = [find_site(model, sae) for sae in several]
    if len({site.cell for site in sites}) < len(sites):
        raise WriteSAEError("two SAEs are on one cell: each head can be given one reconstruction")
    passages = find_passages(model, several[0], tokens, context_size)
    if passages.shape[1] < 4:
        raise WriteSAEError(f"passages of {passages.shape[1]} tokens have no halves: give 4 tokens or more")
    run = Run("splice", model, several, passages, locals())

    def splice(n: int) -> pd.DataFrame:
        frame = _splice(model, several, sites, passages[n])
        frame.insert(0, "passage", n)
        return frame

    records = run.records(range(len(passages)), splice, "Splicing")
    summary: dict[str, Any] = {**_summarize(records, _eps(model), seed), "n_heads": len(sites)}
    interval = statistics.between(summary["increase_percent_ci"], "+.2f")
    headline = (
        f"perplexity {summary['perplexity_native']:.3f} natively, {summary['increase_percent']:+.2f}%"
        f"{interval} spliced, {summary['increase_percent_deleted']:+.2f}% deleted, recovered "
        f"{statistics.share(summary['recovered'])}"
    )
    return run.result(records, summary, headline)


@torch.no_grad()
def _splice(
    model: HookedRecurrent, saes: Sequence[SAE[Any]], sites: list[Site], tokens: Int[Tensor, " pos"]
) -> pd.DataFrame:
    half = len(tokens) // 2
    native, losses, errors, powers = cache_of(model, tokens[:half]), {}, [], []

    def replaced(sae: SAE[Any], x: Float[Tensor, "row d_in"], condition: str) -> Float[Tensor, "row d_in"]:
        if condition == "deleted":
            return torch.zeros_like(x)
        rebuilt = sae.decode(sae.encode(x)).to(x.dtype)  # without SAELens's error term
        errors.append(float((rebuilt - x).float().square().sum()))
        powers.append(float(x.float().square().sum()))
        return rebuilt

    def edit(sae: SAE[Any], condition: str) -> Any:
        return lambda write, hook: replaced(sae, write[0], condition)[None]

    for condition in CONDITIONS:
        cache, edited = repeated(native, 1), () if condition == "native" else list(zip(saes, sites))
        hooks = [
            (model.write_hook_name(cell.layer, cell.head), edit(sae, condition))
            for sae, (cell, kind) in edited
            if kind == "write"
        ]
        if hooks:
            with model.hooks(fwd_hooks=hooks):
                cache = cache_of(model, tokens[:half])
        for sae, (cell, kind) in edited:
            if kind == "state":
                state = model.mixers[cell.layer].cached_state(cache)[:, cell.head]
                state[0] = replaced(sae, state[0].flatten()[None], condition).view_as(state[0])
        losses[f"nll_{condition}"] = [_loss(model, tokens[half:], cache)]
    error = sum(errors) / max(sum(powers), 1e-30)
    return pd.DataFrame({"n_tokens": [len(tokens) - half - 1], **losses, "error": error})


def _loss(model: HookedRecurrent, tokens: Int[Tensor, " pos"], cache: Any) -> float:
    """Mean nats a token of all tokens but the first, after those that a cache holds (it is changed).

    Raises:
        WriteSAEError: logits are not finite.
    """
    step, nats, told = max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab), [], tokens[1:]
    for residual in read(model, tokens[None, :-1], cache):
        for rows in residual[0].split(step):
            nats.append(_nats(logits_of(model, rows), told[: len(rows)]))
            told = told[len(rows) :]
    check_finite("logits", *nats)
    return float(torch.cat(nats).mean())


def _nats(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """-log p of a token in each row of logits, which are overwritten.

    The sum of exponentials is taken in the logits' dtype, everything that would be rounded more in float64.
    """
    largest = logits.amax(-1, keepdim=True)
    own = logits.gather(1, tokens[:, None])
    total = logits.sub_(largest).exp_().sum(-1)
    return wide(total).log() + (wide(largest) - wide(own))[:, 0]


def _eps(model: HookedRecurrent) -> float:
    """One unit in the last place of 1 in the model's dtype."""
    return torch.finfo(next(model.original_model.parameters()).dtype).eps


def _summarize(records: pd.DataFrame, eps: float, seed: int) -> dict[str, Any]:
    nll = records[[f"nll_{name}" for name in CONDITIONS]].to_numpy()
    native, spliced, deleted = nll.mean(0)
    draws = np.random.default_rng(seed).integers(0, len(nll), (statistics.N_RESAMPLES, len(nll)))
    rises = 100 * np.expm1((nll[:, 1] - nll[:, 0])[draws].mean(1))
    interval = np.quantile(rises, [0.025, 0.975]).tolist() if len(nll) > 1 else None
    rounding = 4 * eps * native / np.sqrt(records.n_tokens.sum())
    is_above = deleted - native > rounding
    return {
        "n_passages": len(records),
        "n_tokens": int(records.n_tokens.sum()),
        **{f"perplexity_{name}": float(np.exp(x)) for name, x in zip(CONDITIONS, nll.mean(0), strict=True)},
        "increase_percent": float(100 * np.expm1(spliced - native)),
        "increase_percent_ci": interval,
        "increase_percent_deleted": float(100 * np.expm1(deleted - native)),
        "recovered": float(1 - (spliced - native) / (deleted - native)) if is_above else None,
        "error": float(records.error.mean()),
    }


@figure("splice")
def plot_splice(result: ExperimentResult) -> Figure:
    """Each passage's loss after the splice and after the deletion, against its native loss."""
    records, summary = result.records, result.summary
    figure, (axis,) = new_figure(5.4, 4.6, 1)
    for name, color in (("deleted", DELETE), ("spliced", ATOM)):
        rise = summary["increase_percent" + ("_deleted" if name == "deleted" else "")]
        axis.scatter(records.nll_native, records[f"nll_{name}"] - records.nll_native, s=14, alpha=0.7, lw=0,
                     color=color, label=f"{name}: perplexity {rise:+.2f}%")  # fmt: skip
    axis.axhline(0, color=INK, lw=0.8, ls="--")
    axis.set_xlabel("native loss of the second half (nats a token)")
    axis.set_ylabel("rise of the loss (nats a token)")
    heads = f"{summary['n_heads']} head{'s' * (summary['n_heads'] > 1)}"
    axis.set_title(f"The first half's memory replaced in {heads}", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9)
    return figure
