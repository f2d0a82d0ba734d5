"""Top contexts (paper, experiment 11): where in a text each atom is most active."""

from __future__ import annotations

import json
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
from hooked_models.hooked_recurrent import Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.meets import promoted_tokens, reads_met
from writesae_lens.experiments.features.sides import PLURALS, features_by_side, side_cosines, side_of
from writesae_lens.experiments.firings import (
    Firings,
    activity,
    atom_cosines,
    check_any_fires,
    check_atom,
    is_codes,
    native_of,
)
from writesae_lens.experiments.options import Count, Natural, Seed, as_list, is_whole, shown
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, new_figure

_N_PROMOTED = 5


@experiment(
    "contexts",
    paper=11,
    question="In which contexts is each feature most active?",
    row="an atom and position",
    table=("n_atoms_active", "token_purity"),
    max_passages=64,
)
def top_contexts(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    n_contexts: Count = 8,
    before: Natural = 16,
    after: Natural = 4,
    atom: int | Sequence[int] | None = None,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """The positions where each atom's coefficient is largest, with the text around them.

    Of codes there are contexts of both sides: a key code is an address, a value code a content. With them
    stand, for key codes, the distance to the read that meets the address most there (`meets.reads_met`), and,
    for value codes, the tokens that the content points along (`meets.promoted_tokens`).

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        n_contexts: positions to give for each atom.
        before, after: tokens of text to show on either side.
        atom: the atom or code to give contexts of, or several (None: all).
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: accepted as in every experiment; nothing here is random.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per atom and position, the atom's strongest first: atom, rank
        (from 1), passage, position, coefficient, dominant (whether it is the most active atom there, or the
        most active code of its side), cosine (to the native write, or of a code to its side of it), token
        (id), text_before, text, text_after (None without a tokenizer), side ("atom", "key" or "value"); of
        codes also read_at (of `meets.DISTANCES` the one whose read meets the key code most; empty for value
        codes) and promoted (ids of the five tokens that the value code points along most, as a JSON list).
        ``summary`` has n_atoms_active, n_atoms_never_active (of those asked for), positions_per_atom
        (median), and token_purity: the mean over atoms with at least two contexts of the share of their most
        common token; of codes also these by_side.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, an atom that is asked for does not
            exist, none of them is active, or the model gives logits that are not finite.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    chosen = _chosen(sae, atom)
    run = Run("contexts", model, sae, passages, locals())

    def read(n: int) -> pd.DataFrame:
        return _strongest(model, sae, site, passages[n], n_contexts, chosen).assign(passage=n)

    strongest = run.records(range(len(passages)), read, "Reading")
    if atom is not None and not len(strongest):
        what = "code" if is_codes(sae) else "atom"
        raise WriteSAEError(
            f"{what} {shown(atom)} is active at no position of these {len(passages)} passages"
        )
    check_any_fires(len(strongest), len(strongest), passages)
    strongest = strongest.sort_values(["coefficient", "passage", "position"], ascending=[False, True, True])
    records = strongest.groupby("atom").head(n_contexts).sort_values("atom", kind="stable")
    records = records.assign(rank=records.groupby("atom").cumcount() + 1).reset_index(drop=True)
    texts = [
        _text(model, passages[p], at, before, after)
        for p, at in zip(records.passage, records.position, strict=True)
    ]
    names = ["text_before", "text", "text_after"]
    records = pd.concat([records, pd.DataFrame(texts, columns=names, index=records.index)], axis=1)
    per_passage = strongest.drop_duplicates(["atom", "passage"])
    positions = per_passage.groupby("atom").n_positions.sum()
    records["side"] = [side_of(sae, int(atom)) for atom in records.atom]
    columns = ["atom", "rank", "passage", "position", "coefficient", "dominant", "cosine", "token", *names]
    columns.append("side")
    summary: dict[str, Any] = _summarize(records, len(chosen))
    if is_codes(sae):
        records["promoted"] = _promoted(model, sae, site, records)
        columns += ["read_at", "promoted"]
        summary["by_side"] = {
            side: _summarize(records.loc[records["side"] == side], len(set(features) & set(chosen)))
            for side, features in features_by_side(sae).items()
        }
    summary |= {"positions_per_atom": float(positions.median()), "n_passages": len(passages)}
    headline = "; ".join(
        _headline(PLURALS[side], found) for side, found in summary.get("by_side", {"atom": summary}).items()
    )
    return run.result(records.reindex(columns=columns), summary, headline)


def _headline(what: str, summary: dict[str, Any]) -> str:
    """How many features of a side are active, and how pure their contexts are."""
    purity = summary["token_purity"]
    return f"{summary['n_atoms_active']} {what} active, {summary['n_atoms_never_active']} never" + (
        "" if purity is None else f"; {purity:.0%} of their top contexts have the feature's most common token"
    )


def _chosen(sae: SAE[Any], atom: int | Sequence[int] | None) -> list[int]:
    """The features to give contexts of, in rising order.

    Raises:
        WriteSAEError: one of them does not exist, or none is given.
    """
    if atom is None:
        return list(range(sae.cfg.d_sae))
    several: list[Any] = [atom] if is_whole(atom) else as_list("atom", atom)
    for each in several:
        check_atom(sae, each)
    if not several:
        raise WriteSAEError("atom=[] gives contexts of nothing: give one number at least, or None for all")
    return sorted({int(each) for each in several})


@torch.no_grad()
def _strongest(
    model: HookedRecurrent,
    sae: SAE[Any],
    site: Site,
    tokens: Int[Tensor, " pos"],
    n_contexts: int,
    chosen: Sequence[int],
) -> pd.DataFrame:
    """The ``n_contexts`` strongest positions in a passage of each chosen atom that is active in it."""
    active = activity(model, sae, site, tokens)
    atom, at, size = active.strongest(n_contexts)
    wanted = torch.isin(atom, torch.tensor(chosen, device=atom.device))
    atom, at, size = atom[wanted], at[wanted], size[wanted]
    firings = Firings(at, atom, size.float(), active.write_key[at], active.write_value[at])
    frame = pd.DataFrame(
        {
            "atom": atom.cpu().numpy(),
            "position": at.cpu().numpy(),
            "coefficient": firings.coefficient.cpu().numpy().astype(float),
            "dominant": (active.largest[:, at] == atom).any(0).cpu().numpy(),
            "cosine": _cosines(sae, site, firings).cpu().numpy().astype(float),
            "token": tokens[at].cpu().numpy(),
            "n_positions": active.uses()[atom].cpu().numpy(),
        }
    )
    if not is_codes(sae):
        return frame
    met = reads_met(model, sae, site.cell, tokens, active).rename(columns={"code": "atom"})
    nearest = met.loc[met.assign(size=met.met.abs()).groupby(["atom", "position"])["size"].idxmax()]
    nearest = nearest[["atom", "position", "distance"]].rename(columns={"distance": "read_at"})
    return frame.merge(nearest, on=["atom", "position"], how="left")


def _cosines(sae: SAE[Any], site: Site, firings: Firings) -> Float[Tensor, " context"]:
    """Of atoms with the native writes, of codes with their side of them."""
    if not is_codes(sae):
        return atom_cosines(sae, firings, site.cell)
    cosines, native = torch.zeros_like(firings.coefficient), native_of(firings)
    for side, features in features_by_side(sae).items():
        own = (firings.atom >= features.start) & (firings.atom < features.stop)
        cosines[own] = side_cosines(sae, side, firings.atom[own], native[own])
    return cosines


def _promoted(model: HookedRecurrent, sae: SAE[Any], site: Site, records: pd.DataFrame) -> list[str | None]:
    """The tokens that each row's value code points along most, as JSON; None for key codes."""
    first = features_by_side(sae)["value"].start
    codes = sorted(set(records.atom[records.side == "value"]))
    values: Any = sae
    vectors = values.dec_value[torch.tensor(codes, dtype=torch.long, device=values.device) - first]
    tokens, _ = promoted_tokens(model, site.cell, vectors, _N_PROMOTED)
    of = {code: json.dumps(row) for code, row in zip(codes, tokens.tolist(), strict=True)}
    return [of.get(atom) for atom in records.atom]


def _text(
    model: HookedRecurrent, tokens: Int[Tensor, " pos"], position: int, before: int, after: int
) -> tuple[str | None, str | None, str | None]:
    if model.tokenizer is None:
        return None, None, None
    parts = (
        tokens[max(0, position - before) : position],
        tokens[position : position + 1],
        tokens[position + 1 : position + 1 + after],
    )
    first, own, last = (model.tokenizer.decode(part.tolist()) for part in parts)
    return first, own, last


def _summarize(records: pd.DataFrame, d_sae: int) -> dict[str, Any]:
    sizes = records.groupby("atom").token.agg(lambda t: t.value_counts().iloc[0] / len(t))
    several = records.groupby("atom").size() > 1
    purity = sizes[several]
    alive = int(records.atom.nunique())
    return {
        "n_atoms_active": alive,
        "n_atoms_never_active": d_sae - alive,
        "token_purity": float(purity.mean()) if len(purity) else None,
    }


@figure("contexts")
def plot_contexts(result: ExperimentResult) -> Figure:
    """How pure in tokens the atoms' strongest contexts are, and how strong they are."""
    records = result.records
    figure, (purity, strength) = new_figure(9.0, 3.8, 2)
    sides = records.side if "side" in records else pd.Series("atom", records.index)  # of earlier versions
    colors = {"atom": ATOM, "key": DELETE, "value": ATOM}
    for side, part in records.groupby(sides):
        what, style = PLURALS[str(side)], {"color": colors[str(side)], "alpha": 0.5}
        by_atom = part.groupby("atom").token
        shares = by_atom.agg(lambda t: t.value_counts().iloc[0] / len(t))[by_atom.size() > 1]
        purity.hist(shares, bins=list(np.linspace(0, 1, 21)), label=what, **style)
        first = part[part["rank"] == 1]
        # Coefficients of key codes have no unit: only those of one kind share an axis of size.
        size = first.coefficient / first.coefficient.median()
        strength.scatter(first.cosine, size, s=6, lw=0, rasterized=True, label=what, **style)
    purity.set(xlabel="share of the most common token", ylabel="features", xlim=(0, 1))
    purity.set_title("Top contexts of a feature on one token", fontsize=11, loc="left")
    strength.set(xlabel="cosine to the native write (codes: to their side of it)", yscale="log")
    strength.set_ylabel("largest coefficient over its median")
    strength.set_title("Each feature's strongest position", fontsize=11, loc="left")
    if sides.nunique() > 1:
        purity.legend(frameon=False, fontsize=9)
    return figure
