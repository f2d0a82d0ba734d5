"""Top contexts (paper, experiment 11): where in a text each atom is most active."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.firings import Firings, activity, atom_factors, check_any_fires, native_cosines
from writesae_lens.experiments.options import Count, Natural, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, new_figure


@experiment(
    "contexts",
    paper=11,
    question="In which contexts is each atom most active?",
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
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """The positions where each atom's coefficient is largest, with the text around them.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        n_contexts: positions to give for each atom.
        before, after: tokens of text to show on either side.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: accepted as in every experiment; nothing here is random.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per atom and position, the atom's strongest first: atom, rank
        (from 1), passage, position, coefficient, dominant (whether it is the most active atom there), cosine
        (to the native write), token (id), text_before, text, text_after (None without a tokenizer).
        ``summary`` has n_atoms_active, n_atoms_never_active, positions_per_atom (median), and token_purity:
        the mean over atoms with at least two contexts of the share of their most common token.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, no atom is active, or the model gives
            logits that are not finite.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    run = Run("contexts", model, sae, passages, locals())

    def read(n: int) -> pd.DataFrame:
        return _strongest(model, sae, site, passages[n], n_contexts).assign(passage=n)

    strongest = run.records(range(len(passages)), read, "Reading")
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
    columns = ["atom", "rank", "passage", "position", "coefficient", "dominant", "cosine", "token", *names]
    summary = _summarize(records, sae.cfg.d_sae) | {
        "positions_per_atom": float(positions.median()),
        "n_passages": len(passages),
    }
    purity = summary["token_purity"]
    headline = f"{summary['n_atoms_active']} atoms active, {summary['n_atoms_never_active']} never" + (
        "" if purity is None else f"; {purity:.0%} of an atom's top contexts have its most common token"
    )
    return run.result(records.reindex(columns=columns), summary, headline)


@torch.no_grad()
def _strongest(
    model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"], n_contexts: int
) -> pd.DataFrame:
    """The ``n_contexts`` strongest positions in a passage of each atom that is active in it."""
    acts, key, value = activity(model, sae, site, tokens)
    active = acts.amax(0) > 0
    atoms = active.nonzero().squeeze(-1)
    # topk over positions; the padding of atoms that are active less often is cut off below.
    values, at = acts[:, atoms].topk(min(n_contexts, len(acts)), dim=0)
    kept = values > 0
    at, atom = at[kept], atoms.expand(len(values), -1)[kept]
    firings = Firings(at, atom, values[kept].float(), key[at], value[at])
    factors = atom_factors(sae, atom, site.cell.d_k, site.cell.d_v)
    return pd.DataFrame(
        {
            "atom": atom.cpu().numpy(),
            "position": at.cpu().numpy(),
            "coefficient": firings.coefficient.cpu().numpy().astype(float),
            "dominant": (acts.argmax(-1)[at] == atom).cpu().numpy(),
            "cosine": native_cosines(firings, factors).cpu().numpy().astype(float),
            "token": tokens[at].cpu().numpy(),
            "n_positions": (acts > 0).sum(0)[atom].cpu().numpy(),
        }
    )


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
    shares = records.groupby("atom").token.agg(lambda t: t.value_counts().iloc[0] / len(t))
    purity.hist(shares[records.groupby("atom").size() > 1], bins=list(np.linspace(0, 1, 21)), color=ATOM)
    purity.set(xlabel="share of the most common token", ylabel="atoms", xlim=(0, 1))
    purity.set_title("Top contexts of an atom on one token", fontsize=11, loc="left")
    first = records[records["rank"] == 1]
    strength.scatter(first.cosine, first.coefficient, s=6, alpha=0.4, lw=0, color=ATOM, rasterized=True)
    strength.set(xlabel="cosine to the native write there", ylabel="largest coefficient", yscale="log")
    strength.set_title("Each atom's strongest position", fontsize=11, loc="left")
    return figure
