"""Replacement test (paper, experiment 1): can an atom take a native write's place?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.experiments import swaps
from writesae_lens.experiments.inputs import (
    Firings,
    atom_factors,
    check_any_fires,
    check_at_least,
    check_choice,
    find_firings,
    find_passages,
    find_site,
    native_cosines,
)
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator

CONDITIONS = ("atom", "delete", "random")


def replacement_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    scale: Literal["coefficient", "matched_norm"] = "coefficient",
    random: Literal["gaussian", "atom", "orthogonal", "native_marginals"] = "gaussian",
    kl: Literal["patched_base", "base_patched"] = "patched_base",
    replaces: Literal["write", "update"] = "write",
    max_firings: int | None = None,
    max_firings_per_atom: int | None = None,
    skip_positions: int = 0,
    context_size: int | None = None,
    seed: int = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """At each firing, put the dominant atom, nothing, or something random in the native write's place.

    Each condition changes one write (or update, see ``replaces``) of one cell at one position; its score
    is the KL divergence between the next-token distributions at that position with and without the
    change. The atom *wins* when its KL is below the deletion's; the *strict chain* is atom < delete <
    random. Every condition equals a full forward pass with hooks on ``hook_write`` and ``hook_erase``
    (`HookedRecurrent.run_with_swapped_writes`). In float32, that is: in bfloat16 the logits' rounding
    alone makes KLs of up to some 1e-4.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states (it then encodes the state, and still the
            write is replaced). Its cell is read from ``sae.cfg.metadata.hook_name``.
        tokens: passages ``[passage, pos]``, or a text.
        scale: the atom at its coefficient, or at the native write's Frobenius norm; the random matrix has
            the atom's norm.
        random: a Gaussian rank-1 matrix, another atom of the dictionary, a rank-1 matrix orthogonal to the
            native write on both sides, or one whose coordinates are drawn from the passage's other writes.
        kl: KL(patched || base), as in the paper, or the other way round.
        replaces: what each condition takes the place of: the native write k v^T, while the token's erase
            still happens, or the whole update, erase and write together (the two differ where an
            architecture erases; an atom made for writes has nothing to stand in for the erase with).
        max_firings, max_firings_per_atom: keep a random choice of so many (None: all).
        skip_positions: leave out the first positions of every passage.
        context_size: tokens of a passage, for text (None: the SAE's own, else 256).
        seed: of the random matrices, the thinning and the bootstrap.
        progress_folder: keeps finished passages, and resumes from them.
        verbose: show a progress bar.

    Returns:
        a result whose ``records`` have a row a firing: passage, position, token, atom, coefficient,
        write_norm, cosine, kl_atom, kl_delete, kl_random (KLs in nats).

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or no atom fires.
    """
    check_choice("scale", scale, "coefficient", "matched_norm")
    check_choice("random", random, *swaps.RANDOM)
    check_choice("kl", kl, "patched_base", "base_patched")
    check_choice("replaces", replaces, "write", "update")
    check_at_least(1, optional=True, max_firings=max_firings, max_firings_per_atom=max_firings_per_atom)
    check_at_least(0, skip_positions=skip_positions, seed=seed)
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    firings = [
        find_firings(model, sae, site, passage)
        for passage in tqdm(passages, desc="Firings", unit="passage", disable=not verbose)
    ]
    kept = thin(firings, skip_positions, max_firings, max_firings_per_atom, seed)
    check_any_fires(sum(len(f.position) for f in firings), sum(map(len, kept)), passages)
    run = Run(
        "replacement", model, sae, passages, progress_folder, verbose, scale=scale, random=random, kl=kl,
        replaces=replaces, max_firings=max_firings, max_firings_per_atom=max_firings_per_atom,
        skip_positions=skip_positions, seed=seed,
    )  # fmt: skip

    def test(n: int) -> pd.DataFrame:
        how = (scale, random, kl, replaces)
        found = firings[n], kept[n]
        return _test_passage(model, sae, site.cell, passages[n], *found, n, *how, generator(seed, n))

    records = run.records([n for n, index in enumerate(kept) if len(index)], test, "Replacing")
    summary = _summarize(records, sae.cfg.d_sae, seed)
    low, high = summary["win_rate_ci"]
    headline = f"win rate {summary['win_rate']:.1%} ({low:.1%} to {high:.1%}), {len(records)} firings"
    return run.result(records, summary, headline)


def thin(
    firings: list[Firings], skip: int, total: int | None, per_atom: int | None, seed: int
) -> list[Tensor]:
    """Indices of the firings to keep, per passage."""
    frame = pd.DataFrame(
        {
            "passage": np.repeat(range(len(firings)), [len(f.position) for f in firings]),
            "index": np.concatenate([np.arange(len(f.position)) for f in firings]),
            "position": torch.cat([f.position for f in firings]).cpu().numpy(),
            "atom": torch.cat([f.atom for f in firings]).cpu().numpy(),
        }
    )
    frame = frame.loc[frame.position >= skip].sample(frac=1, random_state=seed)
    if per_atom is not None:
        frame = frame.groupby("atom").head(per_atom)
    if total is not None:
        frame = frame.head(total)
    frame = pd.DataFrame(frame).sort_values(by=["passage", "index"])
    return [
        torch.as_tensor(frame.loc[frame.passage == n, "index"].to_numpy(copy=True))
        for n in range(len(firings))
    ]


@torch.no_grad()
def _test_passage(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    every: Firings,
    kept: Int[Tensor, " firing"],
    number: int,
    scale: str,
    random: str,
    kl: str,
    replaces: str,
    rng: torch.Generator,
) -> pd.DataFrame:
    firings = Firings(*(x[kept] for x in every))
    atoms, native = atom_factors(sae, firings.atom, cell.d_k, cell.d_v), swaps.native(firings)
    norm = atoms.norm().clamp(min=1e-30)
    size = firings.coefficient if scale == "coefficient" else native.norm() / norm
    other = swaps.with_norm(swaps.random_like(random, sae, every, kept, cell, rng), size * norm)
    conditions = [swaps.scaled(atoms, size), swaps.zeros_like(atoms), other]
    found = swaps.swapped_logits(model, cell, tokens, firings.position, conditions, erase=replaces == "write")
    kls = [torch.stack([swaps.divergence(p, base, kl) for p in patched]) for base, patched in found]
    columns: dict[str, Any] = {
        "passage": number,
        "position": firings.position.cpu().numpy(),
        "token": tokens[firings.position].cpu().numpy(),
        "atom": firings.atom.cpu().numpy(),
        "coefficient": firings.coefficient.cpu().numpy().astype(float),
        "write_norm": native.norm().cpu().numpy().astype(float),
        "cosine": native_cosines(firings, atoms).cpu().numpy().astype(float),
    }
    table = torch.cat(kls, dim=1).cpu().numpy()
    columns |= {f"kl_{name}": table[i] for i, name in enumerate(CONDITIONS)}
    return pd.DataFrame(columns)


def _summarize(records: pd.DataFrame, d_sae: int, seed: int) -> dict[str, Any]:
    atom, delete, other = (records[f"kl_{name}"].to_numpy() for name in CONDITIONS)
    wins, chain = atom < delete, (atom < delete) & (delete < other)
    summary: dict[str, Any] = {
        "n_firings": len(records),
        "n_atoms": int(records.atom.nunique()),
        "n_atoms_never_dominant": d_sae - int(records.atom.nunique()),
        "n_passages": int(records.passage.nunique()),
        "win_rate": float(wins.mean()),
        "win_rate_ci": list(statistics.wilson_interval(wins)),
        "win_rate_ci_by_atom": statistics.cluster_bootstrap(wins, records.atom, seed),
        "win_rate_ci_by_passage": statistics.cluster_bootstrap(wins, records.passage, seed),
        "win_rate_by_effect_quartile": statistics.mean_by_part(wins, delete, 4),
        "strict_chain_rate": float(chain.mean()),
        "strict_chain_rate_ci": list(statistics.wilson_interval(chain)),
    }
    for name, values in zip(CONDITIONS, (atom, delete, other), strict=True):
        median, error = statistics.median_and_error(values)
        summary[f"median_kl_{name}"] = median
        summary[f"median_kl_{name}_error"] = error
    unit = max(summary["median_kl_atom"], 1e-30)
    summary["kl_ratio_atom_delete_random"] = [summary[f"median_kl_{n}"] / unit for n in CONDITIONS]
    summary["cliffs_delta"] = statistics.cliffs_delta(delete, atom)
    summary["wilcoxon_p"] = statistics.paired_wilcoxon(delete, atom)
    summary["median_cosine"] = float(records.cosine.median())
    summary["median_write_norm"] = float(records.write_norm.median())
    return summary
