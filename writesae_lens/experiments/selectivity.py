"""Selectivity (paper, experiment 11): which tokens an atom's write moves, and whether they are its own."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any

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
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.sides import NAMES, randomized
from writesae_lens.experiments.firings import activity, atom_factors, draw_atoms, is_codes
from writesae_lens.experiments.options import Bound, Count, Positive, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import native_writes
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, INK, RANDOM, new_figure
from writesae_lens.saes.rank1 import Factors


@experiment(
    "selectivity",
    paper=11,
    question="Does a feature move the same tokens everywhere, and other tokens than other features do?",
    row="a write: one position and matrix",
    table=("own_overlap_atom", "other_overlap_atom"),
)
def selectivity(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    n_atoms: Annotated[int, Bound(2)] = 32,
    n_positions: Count = 4,
    top_k: Count = 20,
    magnitude: Positive = 1.0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add atoms at random positions, and compare the sets of tokens whose logits they move most.

    An atom is selective when it moves the same tokens wherever it is written, and other tokens than other
    atoms do. Each atom (and as many Gaussian rank-1 matrices, drawn once) is added to the native write with
    ``magnitude`` times its norm; its set is the ``top_k`` tokens whose logits at that position move most
    beyond the mean of all tokens, up or down. The overlap of two sets is the share of tokens in both. Writes
    whose KL is not above what rounding alone gives (`swaps.divergences`) move no tokens of their own: they
    are counted and left out.

    Of codes, value codes are tested: tokens are moved by contents. Each is written at the cell's mean key,
    and the random matrices have Gaussian values at that key.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        n_atoms: number of atoms (or value codes), 2 or more, drawn at random among those that fire in the
            passages (where a single atom fires, overlaps of different atoms are None).
        n_positions: number of random positions in each passage.
        top_k: tokens in a set.
        magnitude: norm of the added matrix, in units of the native write there.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of atoms, positions and random matrices.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per write: passage, position, kind ("atom", "random"), atom (for
        random matrices their number), kl (patched || native, nats), kl_floor, max_shift (logits), top (the
        set, as a JSON list of token ids, largest first). ``summary`` has n_at_floor, for each kind the mean
        overlap of the same matrix at different positions of any passages (own_overlap), of different ones at
        the same position (other_overlap), their difference (selectivity) with a 95% interval (own_overlap
        resampled by matrices), and chance_overlap.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or no atom fires.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    top_k = min(top_k, model.cfg.d_vocab)
    rng = torch.Generator().manual_seed(seed)
    active = [activity(model, sae, site, p) for p in passages]
    chosen = draw_atoms(active, passages, n_atoms, rng, with_key_codes=False)
    device = passages.device
    atoms = atom_factors(sae, chosen.to(device), site.cell.d_k, site.cell.d_v)
    others = randomized(sae, chosen, atoms, rng)
    run = Run("selectivity", model, sae, passages, locals(), n_atoms=len(chosen))

    def push(n: int) -> pd.DataFrame:
        at = torch.randperm(passages.shape[1], generator=generator(seed, n))[:n_positions].sort().values
        frame = _push(model, site.cell, passages[n], at.to(device), atoms, others, magnitude, top_k)
        names = np.where(frame.kind == "atom", chosen.numpy()[frame.atom], frame.atom)
        return frame.assign(passage=n, atom=names)

    records = run.records(range(len(passages)), push, "Writing")
    columns = ["passage", "position", "kind", "atom", "kl", "kl_floor", "max_shift", "top"]
    records = records.reindex(columns=columns)
    summary = _summarize(records, top_k, seed) | {"chance_overlap": top_k / model.cfg.d_vocab}
    own, other = summary["own_overlap_atom"], summary["other_overlap_atom"]
    random = statistics.share(summary["own_overlap_random"])
    what = NAMES["value" if is_codes(sae) else "atom"]
    headline = (
        f"no {what} at two positions"
        if own is None
        else f"{'a' if is_codes(sae) else 'an'} {what} moves {own:.1%} of the same {top_k} tokens elsewhere, "
        f"a random matrix {random}"
    )
    headline += "" if other is None else f"; other {what}s move {other:.1%} of them"
    headline += swaps.floor_note(int(summary["n_at_floor"]))
    return run.result(records, summary, headline)


@torch.no_grad()
def _push(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    positions: Int[Tensor, " position"],
    atoms: Factors,
    others: Factors,
    magnitude: float,
    top_k: int,
) -> pd.DataFrame:
    key, value = native_writes(model, cell, tokens)
    count, n = len(positions), len(atoms.key)
    at = positions.repeat_interleave(2 * n)
    native = Factors(key[at, None].float(), value[at, None].float())
    both = swaps.joined(atoms, others)
    both = Factors(both.key.repeat(count, 1, 1), both.value.repeat(count, 1, 1))
    added = swaps.with_norm(both, magnitude * native.norm())
    kl, floor, top, most = [], [], [], []
    for swapped in swaps.swapped_logits(model, cell, tokens, at, [swaps.summed(native, added)]):
        shift = swapped.patched[0] - swapped.base
        shift = shift - shift.mean(-1, keepdim=True)
        found = shift.abs().topk(top_k, dim=-1)
        kl.append(swapped.divergences()[0])
        floor.append(swapped.floor)
        most.append(shift.gather(-1, found.indices[:, :1]).squeeze(-1))
        top += found.indices.tolist()
    return pd.DataFrame(
        {
            "position": at.cpu().numpy(),
            "kind": (["atom"] * n + ["random"] * n) * count,
            "atom": np.tile(np.tile(np.arange(n), 2), count),
            "kl": torch.cat(kl).cpu().numpy(),
            "kl_floor": torch.cat(floor).cpu().double().numpy(),
            "max_shift": torch.cat(most).cpu().double().numpy(),
            "top": [str(ids) for ids in top],
        }
    )


def _summarize(records: pd.DataFrame, top_k: int, seed: int) -> dict[str, Any]:
    sets = records.assign(top=[frozenset(int(x) for x in row[1:-1].split(",")) for row in records.top])
    moves = swaps.above_floor(records, "kl")
    summary: dict[str, Any] = {"n_writes": len(records), "n_at_floor": int((~moves).sum())}
    for kind in ("atom", "random"):
        part = sets.loc[moves & (sets["kind"] == kind).to_numpy()]
        own = _overlaps(part, ["atom"], top_k)
        other = _overlaps(part, ["passage", "position"], top_k)
        summary[f"own_overlap_{kind}"] = float(own.overlap.mean()) if len(own) else None
        summary[f"other_overlap_{kind}"] = float(other.overlap.mean()) if len(other) else None
        interval = None
        if len(own) and len(other):
            ends = statistics.cluster_bootstrap(own.overlap, own.group, seed)
            level = float(other.overlap.mean())
            summary[f"selectivity_{kind}"] = float(own.overlap.mean()) - level
            interval = ends and [end - level for end in ends]
        summary[f"selectivity_ci_{kind}"] = interval
        summary[f"median_kl_{kind}"] = statistics.median_and_error(part.kl)[0]
    return summary


def _overlaps(part: pd.DataFrame, by: list[str], top_k: int) -> pd.DataFrame:
    """The overlaps of all pairs of sets in each group."""
    rows = [
        (number, len(a & b) / top_k)
        for number, (_, group) in enumerate(part.groupby(by))
        for a, b in combinations(group.top, 2)
    ]
    return pd.DataFrame(rows, columns=["group", "overlap"])


@figure("selectivity")
def plot_selectivity(result: ExperimentResult) -> Figure:
    """Overlap of the moved tokens: the same matrix elsewhere, others at the same place, chance."""
    summary = result.summary
    figure, (axis,) = new_figure(5.6, 4.0, 1)
    for shift, kind, color in ((-0.18, "atom", ATOM), (0.18, "random", RANDOM)):
        heights = [summary[f"{name}_overlap_{kind}"] or 0 for name in ("own", "other")]
        label = "atoms" if kind == "atom" else "random rank-1"
        axis.bar(np.arange(2) + shift, heights, width=0.34, color=color, label=label)
        for i, height in enumerate(heights):
            axis.text(i + shift, height + 0.01, f"{height:.2f}", ha="center", fontsize=9)
    axis.axhline(summary["chance_overlap"], color=INK, lw=0.8, ls="--", label="chance")
    axis.set_xticks([0, 1], ["same matrix,\nother position", "other matrix,\nsame position"])
    axis.set_ylabel(f"shared part of the {summary['top_k']} tokens moved most")
    axis.margins(y=0.3)
    axis.set_title("Does a feature move tokens of its own?", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9)
    return figure
