"""Amplification (paper, experiment 9): what a text becomes when an atom is written at every token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.decoding import Prefix, batches
from writesae_lens.experiments.features.sides import features_by_side, side_of
from writesae_lens.experiments.firings import activity, atom_factors, check_atom, choose_atom, contribution
from writesae_lens.experiments.options import Count, NotNegative, Positive, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, seed_of
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, RANDOM, new_figure

STATISTICS = ("newlines_per_400", "distinct_tokens", "repeated_4grams", "characters_per_token")


@experiment(
    "amplify",
    paper=9,
    question="How does a continuation change when a feature is written at every token?",
    row="a continuation",
    table=("by_condition.native.newlines_per_400", "by_condition.10x.newlines_per_400"),
    max_passages=16,
    context_size=64,
    former_names=("amplification",),
)
def amplify(
    model: HookedRecurrent,
    sae: SAE[Any],
    prompts: Int[Tensor, "passage pos"] | str,
    atom: int | None = None,
    factors: tuple[Positive, ...] = (2.0, 5.0, 10.0),
    n_tokens: Count = 200,
    temperature: NotNegative = 1.0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add an atom to a head's write at every decoded token that is read, and compare the texts.

    The added matrix is factor x (the atom's mean coefficient where it is active) x atom. The control writes
    another atom, drawn among the active ones, with the same Frobenius norm as the atom at the largest
    factor. A code is added with the other side at the cell's mean (a content at the mean address, an address
    with the mean content), at the mean norm of what it adds to stand-ins where it is active; its control is
    another code of the same side.

    All texts of a prompt are drawn with the same random numbers, so the native text is theirs but for the
    edit.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        prompts: ``[prompt, pos]``, or a text to cut into prompts; the atoms' coefficients are those here.
        atom: the atom or code (None: the atom, or the value code, that fires most often).
        factors: multiples of the mean coefficient.
        n_tokens: number of tokens to decode.
        temperature: 0 is greedy.
        context_size: length of a prompt where ``prompts`` is text (None: as in the SAE's training, else 256).
        seed: seed of the control atom and the draws.
        progress_folder: folder that keeps finished prompts, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per text: prompt, condition ("native", "2x", ..., "random"),
        newlines_per_400 (tokens), distinct_tokens (share of different ones), repeated_4grams (share of
        4-grams that occurred before), characters_per_token, continuation (token ids, as JSON), text (the
        same as text).
        ``summary`` has atom, control_atom, mean_coefficient, mean_norm (Frobenius, of what the atom or code
        adds to stand-ins where it is active), and by_condition the mean of each
        statistic, with Cohen's d and the two-sided Mann-Whitney p against the native texts.

    Raises:
        WriteSAEError: SAE and cell do not fit, the model has no tokenizer, prompts have fewer than two
            tokens, or the atom does not exist or is active nowhere.
    """
    if len({f"{factor:g}" for factor in factors}) < len(factors):
        raise WriteSAEError(f"factors must differ in six digits, got {factors}")
    site, passages = find_site(model, sae), find_passages(model, sae, prompts, context_size)
    if model.tokenizer is None:
        raise WriteSAEError("the model has no tokenizer, and so no text to count in")
    check_atom(sae, atom)
    if passages.shape[1] < 2:
        raise WriteSAEError("prompts of one token are too short: give 2 tokens or more")
    found = [activity(model, sae, site, p) for p in passages]
    chosen = choose_atom(atom, found, passages)
    where = [x.at((x.of_feature(chosen) > 0).nonzero().squeeze(-1)) for x in found]
    mean = float(torch.cat([x.of_feature(chosen).float() for x in where]).mean())
    mean_norm = float(torch.cat([contribution(sae, x, chosen, site.cell).norm() for x in where]).mean())
    same_side = features_by_side(sae)[side_of(sae, chosen)]
    uses = torch.stack([x.uses() for x in found]).sum(0)
    others = [x for x in uses.nonzero().flatten().tolist() if x in same_side and x != chosen]
    rng = torch.Generator().manual_seed(seed)
    control = others[int(torch.randint(0, len(others), (), generator=rng))] if others else None
    about = {"atom": chosen, "control_atom": control, "mean_coefficient": mean, "mean_norm": mean_norm}
    run = Run("amplify", model, sae, passages, locals(), **about)
    cell, device = site.cell, passages.device

    def matrix(number: int, norm: float) -> Tensor:
        atom = atom_factors(sae, torch.tensor([number], device=device), cell.d_k, cell.d_v)
        return swaps.with_norm(atom, torch.tensor([norm], device=device)).matrix()[0]

    own = matrix(chosen, mean_norm)
    conditions = {"native": own * 0} | {f"{factor:g}x": own * factor for factor in factors}
    if control is not None:
        conditions["random"] = matrix(control, max(factors) * mean_norm)
    writes = torch.stack(list(conditions.values()))

    groups = batches(len(passages), len(writes) * model.cfg.d_vocab)

    def speak(n: int) -> pd.DataFrame:
        said = _decode(model, cell, passages[groups[n]], writes, n_tokens, temperature, seed_of(seed, n))
        frame = pd.DataFrame([_count(model, row) for row in said.tolist()])
        numbers = range(len(passages))[groups[n]]
        frame.insert(0, "condition", list(conditions) * len(numbers))
        frame.insert(0, "prompt", np.repeat(numbers, len(conditions)))
        return frame

    records = run.records(range(len(groups)), speak, "Decoding", unit="batch")
    by = _summarize(records, list(conditions))
    summary = {"by_condition": by, "n_prompts": len(passages)}
    largest = f"{max(factors):g}x"
    headline = f"newlines per 400 tokens: {by['native']['newlines_per_400']:.1f} natively, " + ", ".join(
        f"{by[name]['newlines_per_400']:.1f} at {name}" for name in (largest, "random") if name in by
    )
    return run.result(records, summary, headline)


@torch.no_grad()
def _decode(
    model: HookedRecurrent,
    cell: Cell,
    prompts: Int[Tensor, "prompt pos"],
    writes: Float[Tensor, "condition d_k d_v"],
    n_tokens: int,
    temperature: float,
    seed: int,
) -> Int[Tensor, "row token"]:
    prefix = Prefix(model, cell.layer, prompts[:, :-1])
    logits, cache = prefix.run(prompts[:, -1:].repeat_interleave(len(writes), dim=0))
    added = {cell: writes.repeat(len(prompts), 1, 1)}
    return prefix.decode(logits, cache, n_tokens, temperature, seed, added)


def _count(model: HookedRecurrent, ids: list[int]) -> dict[str, Any]:
    text = model.tokenizer.decode(ids)
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    values = (
        400 * text.count("\n") / len(ids),
        len(set(ids)) / len(ids),
        1 - len(set(grams)) / len(grams) if grams else 0.0,
        len(text) / len(ids),
    )
    return dict(zip(STATISTICS, values, strict=True)) | {"continuation": json.dumps(ids), "text": text}


def _summarize(records: pd.DataFrame, conditions: list[str]) -> dict[str, dict[str, float | None]]:
    native = records.loc[records.condition == "native"]
    found: dict[str, dict[str, float | None]] = {}
    for name in conditions:
        part = records.loc[records.condition == name]
        found[name] = {}
        for statistic in STATISTICS:
            found[name][statistic] = float(part[statistic].mean())
            if name != "native":
                pair = np.asarray(part[statistic]), np.asarray(native[statistic])
                found[name][f"{statistic}_cohens_d"] = statistics.cohens_d(*pair)
                found[name][f"{statistic}_p"] = statistics.mann_whitney(*pair)
    return found


@figure("amplify")
def plot_amplify(result: ExperimentResult) -> Figure:
    """Each text statistic by condition, a point a text."""
    records, summary = result.records, result.summary
    by = summary["by_condition"]
    names = {
        "newlines_per_400": "newlines in 400 tokens",
        "distinct_tokens": "share of different tokens",
        "repeated_4grams": "share of repeated 4-grams",
        "characters_per_token": "characters a token",
    }
    figure, axes = new_figure(13.0, 3.6, len(names))
    jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(records))
    place = records.condition.map({name: i for i, name in enumerate(by)}).to_numpy() + jitter
    for axis, (column, title) in zip(axes, names.items(), strict=True):
        axis.scatter(place, records[column], s=10, alpha=0.5, lw=0, color=RANDOM)
        axis.plot(range(len(by)), [group[column] for group in by.values()], "o-", color=ATOM)
        axis.set_xticks(range(len(by)), list(by), fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
    return figure
