"""Attribution: which written features, at which tokens and heads, made the model prefer one token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import in_half_precision
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment
from writesae_lens.experiments.features.sides import NAMES
from writesae_lens.experiments.options import Natural, is_whole, shown
from writesae_lens.experiments.passages import Passages, other_token, token_id
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.saes.rank1 import Factors
from writesae_lens.use.attribution.ablations import rounding, stacked, without_parts
from writesae_lens.use.attribution.memory import (
    LayerMemory,
    Question,
    along_path,
    deleted_difference,
    last_logits,
    native,
    write_gradients,
)
from writesae_lens.use.attribution.parts import CellParts
from writesae_lens.use.labels import labels_of
from writesae_lens.use.prompts import SAEs, prompt_tokens, saes_by_site

ERROR = -1
"""The feature of a record that is about what an SAE leaves of a write."""


@experiment(
    "attribute",
    question="Which written features made the model prefer a token?",
    row="a feature that is active in a write, or what the SAE leaves of a write",
    of_prompt=True,
)
def attribute(
    model: HookedRecurrent,
    saes: SAEs,
    prompt: Int[Tensor, "*row pos"] | str,
    target: int | str,
    alternative: int | str | None = None,
    position: int = -1,
    steps: Natural = 12,
    n_check: Natural = 20,
) -> ExperimentResult:
    """Divide L = logit(target) - logit(alternative) at a position among the features of the writes before it.

    ``attribution`` is the derivative: what L loses to first order if this part alone is taken out of its
    write, through all that follows. In the memory it is exact: the part is carried through every later decay
    and erase to every later read; only what the layers make of the changed reads is linearised, by one
    backward pass. ``ablated`` says what L loses indeed, by full passes with the part taken out.

    Derivatives do not add up to L. A head's norm ignores how large all of its memory is, so that together
    they are near 0 on Gated DeltaNet and RWKV-7. ``integrated`` does add up: its sum is L(native) - L(every
    write of these cells deleted). It is the mean gradient along a path between these two, on which the
    contributions of all these memories to their heads' outputs are scaled together, times the part's
    share of the contribution (in a head whose output is normed: at the norm's native scale). What a
    write changes in a later write of these cells is the later one's.

    Args:
        model: the model that the SAEs were trained on.
        saes: one SAE on a cell's writes, or several, each of a cell of its own.
        prompt: a text, or token ids ``[pos]``, which are read as they are.
        target: the token, by id or text.
        alternative: the token that it is compared with (None: the most likely other one. The mean logit would
            compare with 'any token' and count what makes all likely tokens likelier than the others).
        position: the token of the prompt after which the two are compared; -1 is the last one. A BOS token
            that was set before a text counts.
        steps: points on the path of ``integrated`` (0: it is left out).
        n_check: features with the largest attributions that are taken out of their writes, each by itself.

    Returns:
        a result. ``records`` has one row per cell, position and active feature, and one per cell and position
        for the SAE's error, the largest attributions first: layer, head, position, token (id), text (of
        the token), feature (-1: the error), side ("atom", "key", "value" or "error"), coefficient (missing
        for errors), attribution, integrated and ablated (missing where they were not
        computed), label. The part of an atom is its coefficient times itself. The part of a code is what
        taking it out takes away, so key codes times the whole value side, value codes times the whole key
        side: those of either side sum to the whole stand-in, and sums over records must leave
        out one side (``records[records.side != "key"]``). The error is the write minus the parts of
        one side; a decoder's bias is in it. ``summary`` has logit_difference (L), deleted_difference (L with
        every write of these cells deleted), completeness: the sum of ``integrated`` over features of one side
        and errors, divided by L - deleted_difference (with steps=0 that of ``attribution``; in any case also
        completeness_of_derivatives); of_features and of_errors (its two terms); ablation_correlation
        (Pearson) and ablation_rank_correlation (Spearman) of attribution and ablated over n_checked features;
        target, alternative, position and tokens as ids and numbers, target_text, alternative_text.

    Raises:
        WriteSAEError: an SAE is on states; the target, the alternative or the position does not exist; the
            two tokens are the same; logits or gradients are not finite.
        HookedModelError: anything is hooked in the model.

    Warns:
        ResultWarning: of a model in half precision: ablated effects are no larger than what rounding gives.
    """
    of_cell = cells_of(model, saes)
    tokens = prompt_tokens(model, of_cell.values(), prompt)
    at = _place(position, tokens)
    question = _question(model, tokens[0, : at + 1], token_id(model, target), alternative)
    run = Run(
        "attribute",
        model,
        list(of_cell.values()),
        tokens,
        locals(),
        prompt=decoded(model, tokens[0]),
        target=question.target,
        alternative=question.alternative,
        position=at,
    )
    difference, memories = native(model, question, list(heads_of(of_cell)))
    path = along_path(model, question, heads_of(of_cell), steps) if steps else None
    frames, parts = [], {}
    for cell, sae in of_cell.items():
        memory = memories[cell.layer]
        parts[cell] = parts_in(memory, sae, cell)
        frames.append(_of_cell(parts[cell], memory, None if path is None else path[cell.layer]))
    records = largest_first(pd.concat(frames, ignore_index=True))
    _ablate(model, question, records, parts, difference, n_check)
    if near := _near_rounding(model, question, records):
        run.warn(near)
    texts = token_texts(model, tokens[0])
    records.insert(3, "token", tokens[0].cpu().numpy()[records.position])
    records.insert(4, "text", [texts[p] for p in records.position])
    deleted = deleted_difference(model, question, heads_of(of_cell))
    summary = _summary(records, parts, difference, deleted) | {
        "target_text": decoded(model, tokens.new_tensor([question.target])),
        "alternative_text": decoded(model, tokens.new_tensor([question.alternative])),
        "tokens": tokens[0].tolist(),
    }
    return run.result(records, summary, _headline(records, summary))


def cells_of(model: HookedRecurrent, saes: SAEs) -> dict[Cell, SAE[Any]]:
    """The SAEs by cell.

    Raises:
        WriteSAEError: one is on states.
    """
    by_site = saes_by_site(model, saes)
    for site in by_site:
        if site.kind != "write":
            raise WriteSAEError(
                f"attribution divides what is written, but the SAE of layer {site.cell.layer} head "
                f"{site.cell.head} is on states: give SAEs on writes"
            )
    return {site.cell: sae for site, sae in by_site.items()}


def heads_of(cells: Iterable[Cell]) -> dict[int, list[int]]:
    """The heads of each layer, in order."""
    heads: dict[int, list[int]] = {}
    for cell in cells:
        heads.setdefault(cell.layer, []).append(cell.head)
    return heads


def parts_in(memory: LayerMemory, sae: SAE[Any], cell: Cell) -> CellParts:
    """What the features of a cell's SAE have in the writes of a layer's native pass."""
    key, value = (x[0, :, cell.head].float() for x in (memory.recurrence.k, memory.recurrence.v))
    return CellParts.of(sae, cell, key, value)


def _place(position: Any, tokens: Passages) -> int:
    """The position counted from the first token.

    Raises:
        WriteSAEError: the prompt has no such token.
    """
    length = tokens.shape[1]
    if not is_whole(position) or not -length <= position < length:
        raise WriteSAEError(
            f"position {shown(position)} does not exist: the prompt has tokens 0 to {length - 1}, or -1 to "
            f"{-length} from its end"
        )
    return int(position) % length


def _question(
    model: HookedRecurrent, tokens: Int[Tensor, " pos"], target: int, alternative: int | str | None
) -> Question:
    """The question, with the most likely token but the target where no alternative is given.

    Raises:
        WriteSAEError: target and alternative are the same token.
    """
    if alternative is None:
        with torch.no_grad():
            logits = last_logits(model, tokens[None])[0]
        logits[target] = -torch.inf
        return Question(tokens, target, int(logits.argmax()))
    return Question(tokens, target, other_token(model, alternative, target))


def _of_cell(
    parts: CellParts, memory: LayerMemory, path: Float[Tensor, "pos head d_v"] | None
) -> pd.DataFrame:
    """The records of one cell, without tokens: first those of its features, then the errors."""
    active, head = parts.active, parts.cell.head
    recurrence = memory.recurrence.heads(head)
    by_outputs = [x[:, head] for x in (memory.by_outputs, path) if x is not None]
    gradients = write_gradients(recurrence, torch.stack(by_outputs).to(recurrence.q))  # [row, pos, d_k, d_v]
    products = parts.products(gradients).double()
    # The error: what the write's own product has beside those of one side's features.
    key, value = (x[0, :, 0].to(gradients) for x in (recurrence.k, recurrence.v))
    whole = torch.einsum("sk,rskv,sv->rs", key, gradients, value).double()
    feature, position = active.feature.long(), active.position.long()
    summed = (feature >= parts.summed_side.start) & (feature < parts.summed_side.stop)
    errors = whole - torch.zeros_like(whole).index_add(1, position[summed], products[:, summed])
    rows = torch.cat([products, errors], dim=1).cpu().numpy()
    labels = labels_of(parts.sae)
    features = feature.tolist()
    return pd.DataFrame(
        {
            "layer": parts.cell.layer,
            "head": head,
            "position": torch.cat([position, torch.arange(len(active), device=position.device)]).cpu(),
            "feature": [*features, *[ERROR] * len(active)],
            "side": [*_sides(parts, features), *["error"] * len(active)],
            "coefficient": [*active.coefficient.tolist(), *[np.nan] * len(active)],
            "attribution": rows[0],
            "integrated": rows[1] if path is not None else np.nan,
            "label": [*(labels.get(n, "") for n in features), *[""] * len(active)],
        }
    )


def _sides(parts: CellParts, features: list[int]) -> list[str]:
    """The side that each feature belongs to: "atom", "key" or "value"."""
    first, *others = parts.active.sides.items()
    return [first[0] if n in first[1] else others[0][0] for n in features]


def _ablate(
    model: HookedRecurrent,
    question: Question,
    records: pd.DataFrame,
    parts: dict[Cell, CellParts],
    difference: float,
    n_check: int,
) -> None:
    """Fill the column ``ablated`` of the features with the largest attributions; a layer's share passes."""
    records.insert(len(records.columns) - 1, "ablated", np.nan)
    checked = records[records.feature != ERROR].head(n_check)
    of_layer: dict[Any, Any] = dict(iter(checked.groupby("layer")))
    for layer, rows in of_layer.items():
        heads, positions = (question.tokens.new_tensor(rows[n].tolist()) for n in ("head", "position"))
        taken_out = stacked([part_of(parts, row) for row in each_row(rows)])
        left = without_parts(model, question, int(layer), heads, positions, taken_out)
        records.loc[rows.index, "ablated"] = difference - left.double().cpu().numpy()


def _near_rounding(model: HookedRecurrent, question: Question, records: pd.DataFrame) -> str:
    """A warning where ablated effects are no larger than what rounding gives (two standard deviations)."""
    checked = records[records.ablated.notna()]
    if not len(checked) or not in_half_precision(model):
        return ""
    largest = {layer: 2 * rounding(model, question, int(layer)) for layer in checked.layer.unique()}
    n_near = int((checked.ablated.abs() <= checked.layer.map(largest)).sum())
    if not n_near:
        return ""
    return (
        f"{n_near} of {len(checked)} ablated effects are no larger than what rounding alone gives (up to "
        f"{max(largest.values()):.2g})"
    )


def part_of(parts: dict[Cell, CellParts], row: Any) -> Factors:
    """The part of a record's feature in its write, as one matrix."""
    of = next(x for cell, x in parts.items() if (cell.layer, cell.head) == (row.layer, row.head))
    device = of.active.position.device
    position, feature = (torch.tensor([x], device=device) for x in (row.position, row.feature))
    return of.parts(position, feature, torch.tensor([row.coefficient], device=device))


def _summary(
    records: pd.DataFrame, parts: dict[Cell, CellParts], difference: float, deleted: float
) -> dict[str, Any]:
    """The figures of merit."""
    one_side: Any = records[records.side != "key"]
    memories = difference - deleted

    def share(rows: Any, column: str) -> float | None:
        return float(rows[column].sum()) / memories if memories else None

    column = "attribution" if records.integrated.isna().all() else "integrated"
    checked = records[records.ablated.notna()]
    figures = {
        name: statistics.correlation(checked.attribution, checked.ablated, method)[0]
        for name, method in (
            ("ablation_correlation", "pearson"),
            ("ablation_rank_correlation", "spearman"),
        )
    }
    return {
        "logit_difference": difference,
        "deleted_difference": deleted,
        "completeness": share(one_side, column),
        "of_features": share(one_side[one_side.feature != ERROR], column),
        "of_errors": share(one_side[one_side.feature == ERROR], column),
        "completeness_of_derivatives": share(one_side, "attribution"),
        **figures,
        "n_checked": len(checked),
        "n_cells": len(parts),
        "n_features": int((records.feature != ERROR).sum()),
    }


def each_row(frame: Any) -> Iterator[Any]:
    """The rows of a table, with its columns as attributes."""
    return iter(frame.itertuples())


def named(row: Any) -> str:
    """A record in words: cell, feature, label and token."""
    name = "error" if row.feature == ERROR else f"{NAMES[row.side]} {row.feature}"
    label = f" '{row.label}'" if row.label else ""
    token = "" if row.text is None else f" at {row.text!r}"
    return f"L{row.layer}H{row.head} {name}{label}{token} ({row.position})"


def _headline(records: pd.DataFrame, summary: dict[str, Any]) -> str:
    """The result in a line of text."""
    target, alternative = (summary[f"{name}_text"] for name in ("target", "alternative"))
    parts = [
        f"{target!r} over {alternative!r} by {summary['logit_difference']:.2f} "
        f"({summary['deleted_difference']:.2f} without these memories)"
    ]
    first = records[records.feature != ERROR].head(3)
    if len(first):
        parts.append("most by " + ", ".join(f"{named(x)} {x.attribution:+.2f}" for x in each_row(first)))
    if (r := summary["ablation_correlation"]) is not None:
        parts.append(f"attributed against ablated r = {r:.3f} ({summary['n_checked']} features)")
    if (completeness := summary["completeness"]) is not None:
        divided = f"features {summary['of_features']:.0%}, errors {summary['of_errors']:.0%}"
        parts.append(f"completeness {completeness:.1%}: {divided}")
    return "; ".join(parts)


def token_texts(model: HookedRecurrent, tokens: Int[Tensor, " pos"]) -> list[str | None]:
    """The text of each token; None without a tokenizer."""
    if model.tokenizer is None:
        return [None] * len(tokens)
    return [model.tokenizer.decode([token]) for token in tokens.tolist()]


def decoded(model: HookedRecurrent, tokens: Int[Tensor, " pos"]) -> str:
    """The text of some tokens together; their ids without a tokenizer."""
    return str(tokens.tolist()) if model.tokenizer is None else model.tokenizer.decode(tokens.tolist())


def largest_first(records: pd.DataFrame) -> pd.DataFrame:
    """The records with the largest attributions first."""
    order = np.argsort(-records.attribution.abs().to_numpy(), kind="stable")
    return records.iloc[order].reset_index(drop=True)
