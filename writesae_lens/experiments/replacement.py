"""Replacement test (paper, experiment 1): can an atom take a native write's place?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.inputs import (
    Firings,
    atom_factors,
    check_any_fires,
    check_at_least,
    find_firings,
    find_passages,
    fingerprint_run,
    native_cosines,
)
from writesae_lens.experiments.result import ExperimentResult, Progress
from writesae_lens.figures import plot_replacement, plot_win_rate_by_effect
from writesae_lens.rank1 import Factors

CONDITIONS = ("atom", "delete", "random")
# Logits that one pass may hold: bounds memory on models with large vocabularies.
_LOGITS_PER_PASS = 2**28


def replacement_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    scale: Literal["coefficient", "matched_norm"] = "coefficient",
    random: Literal["gaussian", "atom"] = "gaussian",
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
        random: a Gaussian rank-1 matrix, or another atom of the dictionary.
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
    for name, given, allowed in (
        ("scale", scale, ("coefficient", "matched_norm")),
        ("random", random, ("gaussian", "atom")),
        ("kl", kl, ("patched_base", "base_patched")),
        ("replaces", replaces, ("write", "update")),
    ):
        if given not in allowed:
            raise WriteSAEError(f"{name}={given!r} is unknown: choose {' or '.join(allowed)}")
    check_at_least(1, max_firings=max_firings, max_firings_per_atom=max_firings_per_atom)
    check_at_least(0, skip_positions=skip_positions, seed=seed)
    site, passages = find_passages(model, sae, tokens, context_size)
    firings = [
        find_firings(model, sae, site, passage)
        for passage in tqdm(passages, desc="Firings", unit="passage", disable=not verbose)
    ]
    kept = _thin(firings, skip_positions, max_firings, max_firings_per_atom, seed)
    check_any_fires(sum(len(f.position) for f in firings), sum(map(len, kept)), passages)
    settings = {
        "experiment": "replacement",
        "model": model.cfg.model_name,
        "architecture": site.cell.architecture,
        "hook_name": sae.cfg.metadata.hook_name,
        "scale": scale,
        "random": random,
        "kl": kl,
        "replaces": replaces,
        "max_firings": max_firings,
        "max_firings_per_atom": max_firings_per_atom,
        "skip_positions": skip_positions,
        "seed": seed,
    }
    inputs = None if progress_folder is None else fingerprint_run(model, sae, passages)
    progress = Progress(progress_folder, settings | {"inputs": inputs})
    parts = []
    for number in tqdm(range(len(passages)), desc="Replacing", unit="passage", disable=not verbose):
        chosen = Firings(*(x[kept[number]] for x in firings[number]))
        if len(chosen.position):

            def compute(n: int = number, f: Firings = chosen) -> pd.DataFrame:
                rng = torch.Generator().manual_seed(_mix(seed, n))
                how = (scale, random, kl, replaces)
                return _test_passage(model, sae, site.cell, passages[n], f, n, *how, rng)

            parts.append(progress.part(number, compute))
    records = pd.concat(parts, ignore_index=True)
    summary = {**_summarize(records, sae.cfg.d_sae, seed), **settings}
    figures = {"replacement": plot_replacement, "replacement_by_effect": plot_win_rate_by_effect}
    return ExperimentResult("replacement", records, summary, figures)


def _mix(seed: int, number: int) -> int:
    """An independent seed for each passage, whatever order or run they are tested in."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def _thin(
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
    cell: Any,
    tokens: Int[Tensor, " pos"],
    firings: Firings,
    number: int,
    scale: str,
    random: str,
    kl: str,
    replaces: str,
    rng: torch.Generator,
) -> pd.DataFrame:
    atoms = atom_factors(sae, firings.atom, cell.d_k, cell.d_v)
    native = Factors(firings.write_key[:, None].float(), firings.write_value[:, None].float())
    norm = atoms.norm().clamp(min=1e-30)
    size = firings.coefficient if scale == "coefficient" else native.norm() / norm
    replacement = Factors(atoms.key * size[:, None, None], atoms.value)
    other = _random_factors(sae, firings, cell, random, rng)
    other = Factors(other.key * (size * norm / other.norm().clamp(min=1e-30))[:, None, None], other.value)
    swaps = _pad_rank(replacement, Factors(atoms.key[:, :1] * 0, atoms.value[:, :1] * 0), other)

    vocabulary = model.cfg.d_vocab
    step = max(1, _LOGITS_PER_PASS // vocabulary // len(CONDITIONS))
    kls = []
    for start in range(0, len(firings.position), step):
        here = slice(start, start + step)
        positions = firings.position[here]
        base, patched = model.run_with_swapped_writes(
            tokens,
            cell.layer,
            cell.head,
            positions.repeat(len(CONDITIONS)),
            torch.cat([s.key[here] for s in swaps]),
            torch.cat([s.value[here] for s in swaps]),
            erase=replaces == "write",
        )
        at = base[positions]
        kls.append(torch.stack([_divergence(p, at, kl) for p in patched.split(len(positions))], dim=-1))
    table = torch.cat(kls).cpu().numpy()
    if not np.isfinite(table).all():
        raise WriteSAEError(
            f"passage {number} gave KLs that are not finite: the model's logits overflow; try another dtype"
        )
    columns: dict[str, Any] = {
        "passage": number,
        "position": firings.position.cpu().numpy(),
        "token": tokens[firings.position].cpu().numpy(),
        "atom": firings.atom.cpu().numpy(),
        "coefficient": firings.coefficient.cpu().numpy().astype(float),
        "write_norm": native.norm().cpu().numpy().astype(float),
        "cosine": native_cosines(firings, atoms).cpu().numpy().astype(float),
    }
    columns |= {f"kl_{name}": table[:, i] for i, name in enumerate(CONDITIONS)}
    return pd.DataFrame(columns)


def _random_factors(sae: SAE[Any], firings: Firings, cell: Any, random: str, rng: torch.Generator) -> Factors:
    """One random matrix a firing, of any norm."""
    count, device = len(firings.atom), firings.atom.device
    if random == "gaussian":
        return Factors(
            torch.randn(count, 1, cell.d_k, generator=rng).to(device),
            torch.randn(count, 1, cell.d_v, generator=rng).to(device),
        )
    shift = torch.randint(1, max(2, sae.cfg.d_sae), (count,), generator=rng).to(device)
    return atom_factors(sae, (firings.atom + shift) % sae.cfg.d_sae, cell.d_k, cell.d_v)


def _pad_rank(*swaps: Factors) -> list[Factors]:
    """The same matrices at the largest rank among them."""
    rank = max(s.key.shape[1] for s in swaps)
    return [Factors(*(torch.nn.functional.pad(f, (0, 0, 0, rank - f.shape[1])) for f in s)) for s in swaps]


def _divergence(
    patched: Float[Tensor, "firing d_vocab"], base: Float[Tensor, "firing d_vocab"], kl: str
) -> Float[Tensor, " firing"]:
    """KL in nats, in float64: it is second order in the logits, so float32 sums would drown small ones."""
    wide = torch.float32 if patched.device.type == "mps" else torch.float64
    values = []
    for p, b in zip(patched.split(64), base.split(64), strict=True):
        log_p, log_b = (x.to(wide).log_softmax(-1) for x in (p, b))
        if kl == "base_patched":
            log_p, log_b = log_b, log_p
        values.append((log_p.exp() * (log_p - log_b)).sum(-1).clamp(min=0))
    return torch.cat(values)


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
        "win_rate_ci_by_atom": list(statistics.cluster_bootstrap(wins, records.atom, seed)),
        "win_rate_ci_by_passage": list(statistics.cluster_bootstrap(wins, records.passage, seed)),
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
