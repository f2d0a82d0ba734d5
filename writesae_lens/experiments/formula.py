"""The logit formula (paper, experiment 4): what an added write will do to later logits, before it is done."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import run_lower_layers
from hooked_models.caches import numbers_in, repeated
from hooked_models.edited_runs import token_logits_with_added_writes
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, run_to_residual, token_logits
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.firings import (
    activity,
    atom_factors,
    draw_atoms,
    is_codes,
    median_write_norm,
)
from writesae_lens.experiments.options import Count, Natural, Positive, Seed
from writesae_lens.experiments.passages import check_horizon, find_passages
from writesae_lens.experiments.passes import (
    cache_of,
    check_finite,
    unembedding_directions,
)
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, new_figure
from writesae_lens.saes.rank1 import Factors, leading_pairs

EPSILONS = (0.1, 0.3, 1.0, 3.0)
# Numbers in memory, over all rows that run at once; and how many a token takes, times d_model.
_NUMBERS_AT_ONCE, _OF_TOKEN = 2**26, 90


@experiment(
    "formula",
    paper=4,
    question="Does the logit formula predict how an added feature shifts later logits?",
    row="a prediction: one passage, atom, size, token and horizon",
    table=("median_r2", "median_r2_by_eps.0.1", "median_r2_by_eps.1"),
    max_passages=16,
    context_size=64,
)
def logit_formula_test(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    form: Literal["exact", "gate_product"] = "exact",
    epsilons: tuple[Positive, ...] = EPSILONS,
    eps_unit: Literal["write_norm", "absolute"] = "write_norm",
    n_atoms: Count = 50,
    n_tokens: Count = 5,
    max_horizon: Natural = 16,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add eps k v^T to a cell's state at t0, and compare the shift of later logits with its prediction.

    ``exact`` has no fitted number, but uses the network's own derivative: the key side is carried through
    every later decay and erase to each read, the value side through the head's own norm and gate as they
    are, and what comes after the layer through its derivative at the native passage
    (`HookedRecurrent.run_with_added_writes`). An R2 near 1 at small steps says that the derivative is right
    and the steps are small; how far it holds as they grow is the finding. ``gate_product`` is the paper's:
    eps G(t0->t) <k, q_t> <v W_O, W_U[T]>, G the product of the gates, times one number fitted for each
    passage, atom and token (over horizons and eps) in the place of the derivative, which it does without.
    The paper's 0.98 is of that form: compare like with like.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell's writes or states; of atoms of higher rank the leading singular pair, of
            codes each with the other side at the cell's mean.
        tokens: passages ``[passage, pos]``, or a text. In each passage t0 is one random position.
        form: which prediction.
        epsilons: Frobenius norms of the added matrix.
        eps_unit: unit of the norms: the cell's median native write norm on these passages, or 1.
        n_atoms: number of atoms, drawn at random among those that fire in the passages.
        n_tokens: number of tokens whose logits are followed: the most likely ones after t0, natively.
        max_horizon: largest t - t0.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of atoms and positions.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per prediction: passage, position (t0), horizon (t - t0), token,
        rank (of the token, from 1), atom, epsilon (as given), eps (the norm added), predicted, measured
        (logits), rounding (one unit in the last place of the native logit); for gate_product also unfitted.
        ``summary`` has the median over atoms and epsilons of R2 (each over passages, horizons and tokens),
        by epsilon, by horizon, by rank and by atom.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text or a passage is too short, or no atom fires.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    check_horizon(passages, max_horizon)
    n_tokens = min(n_tokens, model.cfg.d_vocab)
    found = [activity(model, sae, site, passage) for passage in passages]
    rng = torch.Generator().manual_seed(seed)
    chosen = draw_atoms(found, passages, n_atoms, rng)
    positions = torch.randint(0, passages.shape[1] - max_horizon, (len(passages),), generator=rng).tolist()
    atoms = leading_pairs(atom_factors(sae, chosen.to(passages.device), site.cell.d_k, site.cell.d_v))
    unit = median_write_norm(found) if eps_unit == "write_norm" else 1.0
    run = Run("formula", model, sae, passages, locals(), n_atoms=len(chosen), unit=unit)
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
    how = (
        "by the network's own derivative, nothing fitted"
        if form == "exact"
        else "one number fitted for each passage, atom and token, as in the paper"
    )
    median = f"median R2 {', '.join(by_eps) or 'none, for nothing moves,'} {eps_unit}"
    what = "codes" if is_codes(sae) else "atoms"
    headline = f"{median} ({how}), {len(chosen)} {what}"
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
    past, coming = cache_of(model, tokens[:position]), tokens[position:]

    def into() -> dict[str, Any]:
        return {"past_key_values": repeated(past, 1), "use_cache": past is not None}

    lower = run_lower_layers(model, coming[None], cell.layer, **into())
    residual = run_to_residual(model, coming[None], lower=lower, **into())[0]
    followed = logits_of(model, residual[0]).topk(n_tokens).indices
    places = len(coming), n_tokens
    native = token_logits(model, residual[:, None].expand(*places, -1), followed.expand(places))
    check_finite("logits", native)
    atom = torch.arange(len(atoms.key)).repeat_interleave(len(sizes))
    size = sizes.repeat(len(atoms.key)).to(atoms.key)
    keys, values = atoms.key[atom, 0] * size[:, None], atoms.value[atom, 0]
    # A row has a copy of the cache, and the residual stream of each layer with what goes into it.
    of_row = numbers_in(past) + len(coming) * _OF_TOKEN * model.cfg.d_model
    step = max(1, _NUMBERS_AT_ONCE // of_row)
    predicted, measured = [], []
    for start in range(0, len(atom), step):
        rows = slice(start, start + step)
        args = model, coming, cell, torch.zeros_like(atom[rows]), keys[rows], values[rows], followed
        from_prefix: dict[str, Any] = {"past_key_values": past, "lower": lower}
        changed = token_logits_with_added_writes(*args, **from_prefix)
        check_finite("logits", changed)
        measured.append(changed - native)
        if form == "exact":
            linear = token_logits_with_added_writes(*args, linear=True, **from_prefix)
            check_finite("derivatives of the logits", linear)
            predicted.append(linear)
    if form == "gate_product":
        predicted.append(_gate_product(model, cell, tokens, position, keys, values, followed))
    shifts = {name: torch.cat(x).cpu().double() for name, x in (("p", predicted), ("m", measured))}
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
            "rounding": (torch.finfo(native.dtype).eps * native.abs().cpu().double())
            .expand_as(shifts["m"])
            .flatten()
            .numpy(),
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
    read, decay = (model.hook_name(cell.layer, hook) for hook in ("read", "decay"))
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
    """1 - (squared errors) / (squared distances from the mean), in each group.

    None where nothing moves: where the distances are within four units in the last place of the logits.
    """
    frame = records.assign(error=(records.measured - records[column]) ** 2)
    groups = frame.groupby(by)
    spread = groups.measured.var(ddof=0) * groups.measured.count()
    rounding = frame.assign(square=(4 * frame["rounding"]) ** 2).groupby(by)["square"].sum()
    return (1 - groups.error.sum() / spread.where(spread > rounding)).dropna()


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


@figure("formula")
def plot_formula(result: ExperimentResult) -> Figure:
    """The paper's figure of the audit: predicted against measured shifts, and R2 by size and by horizon."""
    records, summary = result.records, result.summary
    figure, (scatter, sizes, horizons) = new_figure(13.0, 4.2, 3)
    epsilons = sorted(records.epsilon.unique())
    shades = [ATOM, "#67a9cf", "#ef8a62", DELETE]
    for number, epsilon in reversed(list(enumerate(epsilons))):
        part = records[records.epsilon == epsilon]
        part = part.sample(min(len(part), 2000), random_state=0)
        label, color = f"{epsilon:g}", shades[number % len(shades)]
        scatter.scatter(part.predicted, part.measured, s=5, alpha=0.4, lw=0, color=color, label=label,
                        rasterized=True)  # fmt: skip
    ends = np.quantile(records.measured, [0.0, 1.0])
    scatter.plot(ends, ends, color=INK, lw=1, ls="--")
    linear = max(float(records.measured.abs().quantile(0.5)), 1e-12)
    scatter.set_xscale("symlog", linthresh=linear)
    scatter.set_yscale("symlog", linthresh=linear)
    scatter.tick_params(axis="x", labelrotation=45)
    scatter.set_xlabel("predicted shift of the logit")
    scatter.set_ylabel("measured shift of the logit")
    r2 = summary["median_r2"]
    title = "nothing moves" if r2 is None else f"median R² {r2:.4f}"
    form = {"exact": "by the derivative", "gate_product": "gate product, fitted"}[summary["form"]]
    scatter.set_title(f"{form}: {title}", fontsize=11, loc="left")
    scatter.legend(
        frameon=False,
        fontsize=9,
        markerscale=3,
        title="size added" + (" (write norms)" if summary["eps_unit"] == "write_norm" else ""),
    )
    for axis, level, title in (
        (sizes, "eps", "by size of what is added"),
        (horizons, "horizon", "by horizon t − t0"),
    ):
        medians = {float(at): x for at, x in summary[f"median_r2_by_{level}"].items() if x is not None}
        axis.plot(list(medians), [max(x, -1) for x in medians.values()], "o-", color=ATOM, lw=1.5)
        axis.set(ylim=(min([0.0, *(max(x, -1) for x in medians.values())]) - 0.02, 1.02))
        axis.axhline(1, color=INK, lw=0.8, ls="--")
        axis.set_title(f"Median R² {title}", fontsize=11, loc="left")
    if summary["median_r2"] is not None:
        sizes.set_xscale("log")
    return figure
