"""The logit formula (paper, experiment 4): what an added write will do to later logits, before it is done."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.inputs import (
    LOGITS_PER_PASS,
    activity,
    alive_atoms,
    atom_factors,
    cache_of,
    check_all_positive,
    check_at_least,
    check_choice,
    find_passages,
    find_site,
    median_write_norm,
    unembedding_directions,
)
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.saes.rank1 import Factors, leading_pairs

EPSILONS = (0.1, 0.3, 1.0, 3.0)


def logit_formula_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    form: Literal["exact", "gate_product"] = "exact",
    epsilons: tuple[float, ...] = EPSILONS,
    eps_unit: Literal["write_norm", "absolute"] = "write_norm",
    n_atoms: int = 50,
    n_tokens: int = 5,
    max_horizon: int = 16,
    context_size: int | None = None,
    seed: int = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add eps v w^T to a cell's state at t0, and compare the shift of later logits with its prediction.

    ``exact`` has no fitted number: the key side is carried through every later decay and erase to each read,
    the value side through the head's own norm and gate as they are, and what comes after the layer through
    its derivative at the native passage (`HookedRecurrent.run_with_added_writes`). ``gate_product`` is the
    paper's: eps G(t0->t) <v, q_t> <w W_O, W_U[T]>, G the product of the gates, times one number fitted for
    each passage, atom and token (over horizons and eps), which takes the place of the derivative.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell's writes or states; of atoms of higher rank the leading singular pair.
        tokens: passages ``[passage, pos]``, or a text. In each passage t0 is one random position.
        form: the prediction.
        epsilons: Frobenius norms of what is added.
        eps_unit: the norms are multiples of the cell's median native write norm on these passages, or as
            they are.
        n_atoms: a random choice of the atoms that are dominant somewhere in the passages.
        n_tokens: the tokens that are most likely after t0 natively; their logits are followed.
        max_horizon: last t - t0.
        context_size: tokens of a passage, for text (None: the SAE's own, else 256).
        seed: of atoms and positions.
        progress_folder: keeps finished passages, and resumes from them.
        verbose: show a progress bar.

    Returns:
        a result whose ``records`` have a row a prediction: passage, position (t0), horizon (t - t0), token,
        rank (of the token, from 1), atom, epsilon (as given), eps (the norm added), predicted, measured
        (logits); for gate_product also unfitted. ``summary`` has the median over atoms and epsilons of R2
        (each over passages, horizons and tokens), by epsilon, by horizon, by rank and by atom.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text or a passage is too short, or no atom fires.
    """
    check_choice("form", form, "exact", "gate_product")
    check_choice("eps_unit", eps_unit, "write_norm", "absolute")
    check_all_positive(epsilons=epsilons)
    check_at_least(1, n_atoms=n_atoms, n_tokens=n_tokens)
    check_at_least(0, max_horizon=max_horizon, seed=seed)
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    if passages.shape[1] <= max_horizon:
        raise WriteSAEError(
            f"passages of {passages.shape[1]} tokens have no room for a horizon of {max_horizon}: give "
            "longer ones, or a smaller max_horizon"
        )
    n_tokens = min(n_tokens, model.cfg.d_vocab)
    found = [activity(model, sae, site, passage) for passage in passages]
    alive = alive_atoms(found, passages)
    rng = torch.Generator().manual_seed(seed)
    chosen = alive[torch.randperm(len(alive), generator=rng)[:n_atoms]].sort().values
    positions = torch.randint(0, passages.shape[1] - max_horizon, (len(passages),), generator=rng).tolist()
    atoms = leading_pairs(atom_factors(sae, chosen.to(passages.device), site.cell.d_k, site.cell.d_v))
    unit = median_write_norm(found) if eps_unit == "write_norm" else 1.0
    run = Run(
        "formula", model, sae, passages, progress_folder, verbose, form=form, epsilons=list(epsilons),
        eps_unit=eps_unit, n_tokens=n_tokens, max_horizon=max_horizon, seed=seed, n_atoms=len(chosen),
        unit=unit,
    )  # fmt: skip
    sizes = torch.tensor(epsilons, dtype=torch.float64) * unit

    def predict(n: int) -> pd.DataFrame:
        passage = passages[n, : positions[n] + max_horizon + 1]
        frame = _passage(model, site.cell, passage, positions[n], atoms, sizes, form, n_tokens)
        frame.insert(0, "passage", n)
        return frame.assign(
            atom=chosen.numpy()[frame.atom], epsilon=np.asarray(epsilons)[frame.epsilon.to_numpy()]
        )

    records = run.records(range(len(passages)), predict, "Predicting")
    if form == "gate_product":
        records = _fitted(records)
    summary = {**_summarize(records), "n_passages": len(passages)}
    by_eps = [f"{x:.4f} at {eps}" for eps, x in summary["median_r2_by_eps"].items() if x is not None]
    headline = f"median R2 {', '.join(by_eps) or 'none, for nothing moves,'} {eps_unit}, {len(chosen)} atoms"
    return run.result(records, summary, headline)


@torch.no_grad()
def _passage(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    position: int,
    atoms: Factors,
    sizes: Float[Tensor, " eps"],
    form: str,
    n_tokens: int,
) -> pd.DataFrame:
    """Predicted and measured shifts of one passage; atoms and epsilons by number."""
    past = cache_of(model, tokens[:position])
    coming, n_atoms = tokens[position:], len(atoms.key)
    native = model(coming[None], past_key_values=repeated(past, 1), use_cache=past is not None)[0]
    followed = native[0].topk(n_tokens).indices
    atom = torch.arange(n_atoms).repeat_interleave(len(sizes))
    size = sizes.repeat(n_atoms).to(atoms.key)
    keys, values = atoms.key[atom, 0] * size[:, None], atoms.value[atom, 0]
    step = max(1, LOGITS_PER_PASS // native.numel())
    predicted, measured = [], []
    for start in range(0, len(atom), step):
        rows = slice(start, start + step)
        args = coming, cell.layer, cell.head, torch.zeros_like(atom[rows]), keys[rows], values[rows]
        changed = model.run_with_added_writes(*args, past_key_values=past)
        measured.append((changed - native)[:, :, followed])
        if form == "exact":
            linear = model.run_with_added_writes(*args, linear=True, past_key_values=past)
            predicted.append(linear[:, :, followed])
    if form == "gate_product":
        predicted.append(_gate_product(model, cell, tokens, position, keys, values, followed))
    shifts = {name: torch.cat(x).double().cpu() for name, x in (("p", predicted), ("m", measured))}
    grid = torch.meshgrid(
        torch.arange(len(atom)), torch.arange(shifts["m"].shape[1]), torch.arange(n_tokens), indexing="ij"
    )
    row, horizon, rank = (x.flatten() for x in grid)
    return pd.DataFrame(
        {
            "position": position,
            "horizon": horizon.numpy(),
            "token": followed.cpu()[rank].numpy(),
            "rank": rank.numpy() + 1,
            "atom": atom[row].numpy(),
            "epsilon": (row % len(sizes)).numpy(),
            "eps": sizes[row % len(sizes)].numpy(),
            "predicted": shifts["p"].flatten().numpy(),
            "measured": shifts["m"].flatten().numpy(),
        }
    )


def _gate_product(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    position: int,
    keys: Float[Tensor, "row d_k"],
    values: Float[Tensor, "row d_v"],
    followed: Int[Tensor, " token"],
) -> Float[Tensor, "row horizon token"]:
    read = model.write_factor_hook_names(cell.layer)[2]
    decay = read.replace("hook_read", "hook_decay")
    _, cache = model.run_with_cache(
        tokens[None], names_filter=[read, decay], stop_at_layer=cell.layer + 1, use_cache=False
    )
    reads = cache[read][0, position:, cell.head].to(keys)
    gates = cache[decay][0, position:, cell.head].to(keys).clone()
    gates = gates if gates.ndim == 2 else gates[:, None]
    gates[0] = 1  # what is added at t0 is not decayed there
    by_key = keys @ (gates.cumprod(0) * reads).T
    by_value = values @ unembedding_directions(model, cell, followed).to(values).T
    return by_key[:, :, None] * by_value[:, None]


def _fitted(records: pd.DataFrame) -> pd.DataFrame:
    """One number for each passage, atom and token, by least squares over horizons and eps."""
    products = records.assign(pm=records.predicted * records.measured, pp=records.predicted**2)
    sums = products.groupby(["passage", "atom", "token"])[["pm", "pp"]].transform("sum")
    factor = np.where(sums.pp > 0, sums.pm / sums.pp.clip(lower=np.finfo(float).tiny), 0.0)
    return records.assign(unfitted=records.predicted, predicted=records.predicted * factor)


def _r2(records: pd.DataFrame, by: list[str], column: str = "predicted") -> pd.Series:
    """1 - (squared errors) / (squared distances from the mean), in each group; where nothing moves, none."""
    frame = records.assign(error=(records.measured - records[column]) ** 2)
    groups = frame.groupby(by)
    spread = groups.measured.var(ddof=0) * groups.measured.count()
    return (1 - groups.error.sum() / spread.where(spread > 0)).dropna()


def _summarize(records: pd.DataFrame) -> dict[str, Any]:
    cells = _r2(records, ["atom", "epsilon"])

    def median(x: pd.Series) -> float | None:
        return float(x.median()) if len(x) else None

    def medians(level: str) -> dict[str, float | None]:
        found = _r2(records, ["atom", "epsilon", level]) if level != "epsilon" else cells
        return {f"{at:g}": median(x) for at, x in found.groupby(level=level)}

    quartiles = np.quantile(cells, [0.25, 0.75]).tolist() if len(cells) else None
    summary = {
        "median_r2": median(cells),
        "r2_quartiles": quartiles,
        "median_r2_by_eps": medians("epsilon"),
        "median_r2_by_horizon": medians("horizon"),
        "median_r2_by_rank": medians("rank"),
        "median_r2_by_atom": {str(at): median(x) for at, x in cells.groupby(level="atom")},
        "n_cells": len(cells),
    }
    if "unfitted" in records:
        unfitted = _r2(records, ["atom", "epsilon"], "unfitted")
        summary["median_r2_unfitted"] = median(unfitted)
        summary["median_r2_unfitted_by_eps"] = {
            f"{at:g}": median(x) for at, x in unfitted.groupby(level="epsilon")
        }
    return summary
