"""Activation patching of writes: which writes of a clean prompt bring its answer back in a corrupted one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.errors import one_line
from hooked_models.hooked_recurrent import Cell
from hooked_models.recordings import record_recurrences
from hooked_models.recurrence import Recurrence
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.passages import Passages, other_token, token_id
from writesae_lens.experiments.passes import check_finite
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import CellOrSAE, check_model, check_unhooked, find_cells
from writesae_lens.figures import new_figure
from writesae_lens.use.prompts import prompt_tokens

Metric = Callable[[Float[Tensor, "1 pos d_vocab"]], Any]
# Tokens, over all rows, that one pass reads.
_TOKENS_PER_PASS = 2048
# A metric that differs by a smaller share between the prompts is the same but for rounding.
_SAME = 1e-5


@experiment(
    "patch",
    of_prompt=True,
    question="Which writes of the clean prompt bring its answer back in the corrupted one?",
    row="a cell and position",
)
def patch_writes(
    model: HookedRecurrent,
    clean: Int[Tensor, "*row pos"] | str,
    corrupted: Int[Tensor, "*row pos"] | str,
    target: int | str | None = None,
    alternative: int | str | None = None,
    metric: Metric | None = None,
    cells: CellOrSAE | str | Sequence[CellOrSAE] | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Read the corrupted prompt with one write of the clean one in its place, for every cell and position.

    The effect is the share of the metric's difference that the write restores: 0 as in the corrupted prompt,
    1 as in the clean one (Heimersheim & Nanda, "How to use and interpret activation patching", 2024). The
    write's own erase and everything else stay those of the corrupted prompt; later tokens read the patched
    memory. To ask which writes break the clean prompt, give the two prompts the other way round.

    Args:
        model: the model.
        clean: a text, or token ids ``[pos]`` or ``[1, pos]``; a text gets a BOS token where the model wants
            one (``model.to_tokens``).
        corrupted: another prompt of as many tokens.
        target, alternative: tokens (ids, or texts of one token). The metric is logit(target) -
            logit(alternative) at the last position.
        metric: in place of the two tokens, a function from the logits ``[1, pos, d_vocab]`` of a run to a
            number, as those of TransformerLens's ``patching``.
        cells: a cell, (layer, head), or an SAE on one; several in a list; or a text that names cells, "1:*"
            or "0:2,3:1" (None: all of the model).
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per cell and position: layer, head, position, token (of the clean
        prompt), corrupted_token, text (of the clean token, or "corrupted → clean" where they differ), metric
        (with the clean write there) and effect. ``summary`` has metric_clean, metric_corrupted, and top, the
        ten largest effects by size (layer, head, position, text, effect). The figure is a heat map.

    Raises:
        WriteSAEError: the prompts are equal or differ in length, tokens and metric are both given or neither,
            the two tokens are the same, the metric is the same on both prompts (but for rounding) or no
            finite number, a cell is given twice, or logits are not finite.
        HookedModelError: the model has no such cell, or anything is hooked in it.
    """
    check_model(model)
    check_unhooked(model)
    tokens = [tokens_of(model, prompt) for prompt in (clean, corrupted)]
    _check_pair(*tokens)
    measure, name = _metric(model, target, alternative, metric)
    chosen = model.cells if cells is None else find_cells(model, cells)
    run = Run(
        "patch",
        model,
        None,
        tokens[0],
        {
            "clean": clean if isinstance(clean, str) else tokens[0][0].tolist(),
            "corrupted": corrupted if isinstance(corrupted, str) else tokens[1][0].tolist(),
            "target": target,
            "alternative": alternative,
            "metric": name,
            "cells": None if cells is None else [(cell.layer, cell.head) for cell in chosen],
        },
    )
    metrics, recurrences = zip(*(_native(model, row, measure, chosen) for row in tokens), strict=True)
    # A difference of two logits is rounded as they are, which are of the order of 1 at least.
    smallest = 1.0 if metric is None else 0.0
    if abs(metrics[0] - metrics[1]) <= _SAME * max(smallest, *map(abs, metrics)):
        raise WriteSAEError(
            f"the metric is {metrics[0]:.4g} on both prompts, so there is nothing to restore: give "
            "prompts, or tokens, between which it differs"
        )
    first = int((tokens[0] != tokens[1])[0].nonzero()[0])  # writes before it are the same
    parts = []
    for layer in tqdm(sorted({c.layer for c in chosen}), "Patching", unit="layer", disable=not verbose):
        heads = [cell.head for cell in chosen if cell.layer == layer]
        natives = recurrences[0][layer], recurrences[1][layer]
        patched = _patched(model, tokens[1][0], model.cell(layer, heads[0]), heads, first, *natives, measure)
        full = np.concatenate([np.full((first, len(heads)), metrics[1]), patched])
        parts.append(_frame(model, tokens, layer, heads, full))
    records = pd.concat(parts, ignore_index=True)
    records["effect"] = (records.metric - metrics[1]) / (metrics[0] - metrics[1])
    order = records.effect.abs().sort_values(ascending=False, kind="stable").index[:10]
    top = records.loc[order, ["layer", "head", "position", "text", "effect"]].to_dict("records")
    summary = {"metric_clean": metrics[0], "metric_corrupted": metrics[1], "top": top}
    return run.result(records, summary, _headline(summary))


def tokens_of(model: HookedRecurrent, prompt: Any) -> Passages:
    """A prompt as one row; a text with the BOS token that the model puts before it."""
    tokens = prompt_tokens(model, [], model.to_tokens(prompt) if isinstance(prompt, str) else prompt)
    return Passages.of(tokens.as_subclass(Tensor), "prompt") if isinstance(prompt, str) else tokens


def _check_pair(clean: Passages, corrupted: Passages) -> None:
    """Refuse prompts whose positions cannot be compared.

    Raises:
        WriteSAEError: they differ in length, or not at all.
    """
    if clean.shape != corrupted.shape:
        raise WriteSAEError(
            f"the clean prompt has {clean.shape[1]} tokens and the corrupted one {corrupted.shape[1]}: "
            "patching goes position by position, so give prompts of as many tokens (see model.to_str_tokens)"
        )
    if bool((clean == corrupted).all()):
        raise WriteSAEError("the clean and the corrupted prompt are the same: there is nothing to restore")


def _metric(
    model: HookedRecurrent, target: Any, alternative: Any, metric: Metric | None
) -> tuple[Callable[[Float[Tensor, "row pos d_model"]], list[float]], str]:
    """The metric of last residual streams, a number a row, and its name in the result.

    Raises:
        WriteSAEError: tokens and a metric are both given, or neither.
    """
    given = [x for x in (target, alternative) if x is not None]
    if metric is not None and not callable(metric):
        raise WriteSAEError(f"metric must be a function of logits, got a {type(metric).__name__}")
    if (metric is None) != (len(given) == 2) or (metric is not None and given):
        raise WriteSAEError(
            "what is measured? Give target and alternative, two tokens, or a metric, a function of logits"
        )
    if metric is None:
        first = token_id(model, given[0])
        pair = [first, other_token(model, given[1], first)]

        def difference(residual: Float[Tensor, "row pos d_model"]) -> list[float]:
            logits = logits_of(model, residual[:, -1])[:, pair]
            check_finite("logits", logits)
            return (logits[:, 0] - logits[:, 1]).tolist()

        return difference, "logit difference"

    def of_each(residual: Float[Tensor, "row pos d_model"]) -> list[float]:
        found = []
        for row in residual:
            logits = logits_of(model, row[None])
            check_finite("logits", logits)
            try:
                value = float(metric(logits))
            except (TypeError, ValueError, RuntimeError) as error:
                raise WriteSAEError(
                    f"metric must give a number of logits [1, pos, d_vocab]: {one_line(error)[:160]}"
                ) from error
            if not math.isfinite(value):
                raise WriteSAEError(f"metric gave {value} of finite logits: it must give a finite number")
            found.append(value)
        return found

    return of_each, getattr(metric, "__name__", type(metric).__name__)


@torch.no_grad()
def _native(
    model: HookedRecurrent, tokens: Passages, measure: Callable[..., list[float]], cells: Sequence[Cell]
) -> tuple[float, dict[int, Recurrence]]:
    """The metric of a prompt, and the recurrences of the cells' layers."""
    layers = sorted({cell.layer for cell in cells})
    with record_recurrences([model.mixers[layer] for layer in layers]) as recorded:
        residual = run_to_residual(model, tokens, use_cache=False)
    (value,) = measure(residual)
    return value, {layer: recorded[model.mixers[layer]] for layer in layers}


@torch.no_grad()
def _patched(
    model: HookedRecurrent,
    tokens: Int[Tensor, " pos"],
    cell: Cell,
    heads: list[int],
    first: int,
    clean: Recurrence,
    corrupted: Recurrence,
    measure: Callable[..., list[float]],
) -> Float[np.ndarray, "later_pos head"]:
    """The metric with each head's clean write at each position from ``first`` on, for one layer."""
    # The memory is linear in its writes: to put one in another's place is to add their difference, of rank 2.
    count = (len(tokens) - first) * len(heads)
    positions = torch.arange(first, len(tokens), device=tokens.device).repeat_interleave(len(heads))
    at = torch.tensor(heads, device=tokens.device).repeat(len(tokens) - first)
    keys = torch.stack([x.k[0, positions, at] for x in (clean, corrupted)], dim=1)
    values = torch.stack([clean.v[0, positions, at], -corrupted.v[0, positions, at]], dim=1)
    found: list[float] = []
    for some in torch.arange(count).split(max(1, _TOKENS_PER_PASS // len(tokens))):
        residual = residual_with_added_writes(
            model, tokens, cell, positions[some], keys[some], values[some], heads=at[some]
        )
        found += measure(residual)
    return np.array(found).reshape(-1, len(heads))


def _frame(
    model: HookedRecurrent,
    tokens: list[Passages],
    layer: int,
    heads: list[int],
    metric: Float[np.ndarray, "pos head"],
) -> pd.DataFrame:
    """The rows of one layer, without the effect."""
    length = tokens[0].shape[1]
    clean, corrupted = (row[0].tolist() for row in tokens)
    texts = [_both(*(_text(model, token) for token in pair)) for pair in zip(corrupted, clean, strict=True)]
    return pd.DataFrame(
        {
            "layer": layer,
            "head": np.tile(heads, length),
            "position": np.repeat(range(length), len(heads)),
            "token": np.repeat(clean, len(heads)),
            "corrupted_token": np.repeat(corrupted, len(heads)),
            "text": np.repeat(texts, len(heads)),
            "metric": metric.ravel(),
        }
    )


def _text(model: HookedRecurrent, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def _both(corrupted: str, clean: str) -> str:
    return clean if clean == corrupted else f"{corrupted.strip()} → {clean.strip()}"


def _headline(summary: dict[str, Any]) -> str:
    parts = [
        f"L{x['layer']}H{x['head']} at {x['position']} ({x['text']!r}) {x['effect']:.0%}"
        for x in summary["top"][:3]
    ]
    corrupted, clean = summary["metric_corrupted"], summary["metric_clean"]
    return (
        f"of a difference of {clean - corrupted:.3g} (metric {corrupted:.3g} corrupted, {clean:.3g} clean) "
        f"one clean write restores {', '.join(parts)}"
    )


@figure("patch")
def plot_patch(result: ExperimentResult) -> Figure:
    """Heat map of the effects, cell by position; a line parts the layers."""
    records = result.records
    table = records.pivot_table(index=["layer", "head"], columns="position", values="effect", sort=True)
    texts = records.drop_duplicates("position").set_index("position").text
    height, width = (
        max(2.4, 0.9 + size * step) for size, step in zip(table.shape, (0.17, 0.28), strict=True)
    )
    drawn, (axis,) = new_figure(min(width, 16) + 1.6, min(height, 12) + 0.8, 1)
    draw_effects(axis, table.to_numpy(dtype=float), "share of the difference that a clean write restores")
    axis.set_yticks(range(len(table)), [f"L{layer}H{head}" for layer, head in table.index], fontsize=7)
    labels = [f"{text.strip() or '␣'} {at}" for at, text in texts.items()]
    axis.set_xticks(range(table.shape[1]), labels, rotation=90, fontsize=8)
    layers = table.index.get_level_values("layer")
    for row in np.flatnonzero(np.diff(layers)):
        axis.axhline(row + 0.5, color="#222222", lw=0.6)
    return drawn


def draw_effects(axis: Axes, values: Float[np.ndarray, "row column"], title: str) -> None:
    """A heat map of effects of either sign: red raises, blue lowers, white is none."""
    most = float(np.nanmax(np.abs(values), initial=1e-12))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axis.spines[["top", "right"]].set_visible(True)
    axis.set_title(title, fontsize=10, loc="left")
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.9)
    bar.ax.tick_params(labelsize=8)
