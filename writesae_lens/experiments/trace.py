"""Reader trace (paper, experiment 11): which heads read what an atom wrote, and for how long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.sides import randomized
from writesae_lens.experiments.firings import activity, atom_factors, draw_atoms, median_write_norm
from writesae_lens.experiments.options import Count, Natural, Positive, Seed
from writesae_lens.experiments.passages import check_horizon, find_passages
from writesae_lens.experiments.passes import cache_of, check_finite
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, new_figure
from writesae_lens.saes.rank1 import Factors, leading_pairs

# Relative changes of reads up to this one are rounding's, in float32.
_ROUNDING = 16 * float(np.finfo(np.float32).eps)


@experiment(
    "trace",
    paper=11,
    question="Which heads read a feature's write, and for how long?",
    row="a passage, write, head and horizon",
    table=("ratio_to_random",),
    max_passages=16,
    context_size=64,
    former_names=("readers",),
)
def reader_trace(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    n_atoms: Count = 8,
    magnitude: Positive = 1.0,
    max_horizon: Natural = 16,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add atoms at a position t0, and follow the change of what every head of this and later layers reads.

    The change of a head at t is |o_t(added) - o_t(native)| / |o_t(native)|, where o_t = S_t^T q_t is what it
    reads from its state, before norm and gate (a head that natively reads 0 has no change there). The atom's
    own head reads the write itself; other heads of its
    layer cannot; heads of later layers see it through what reached their own inputs. As many Gaussian
    rank-1 writes of the same norm are the control. A code is written with the other side at the cell's mean;
    its control has a Gaussian vector in the code's place and that other side.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states; of atoms of higher rank the leading singular
            pair, of codes each with the other side at the cell's mean.
        tokens: passages ``[passage, pos]``, or a text. In each passage t0 is one random position.
        n_atoms: number of atoms, drawn at random among those that fire in the passages.
        magnitude: Frobenius norm of the added matrix, in units of the cell's median native write norm.
        max_horizon: largest t - t0.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of atoms, positions and controls.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per passage, write, head and horizon: passage, position (t0),
        kind ("atom", "random"), atom (for random writes their number), layer, head, horizon (t - t0), change.
        ``summary`` has top_readers (layer, head, mean change by atoms; the ten heads of other
        layers that change most), change_by_layer, change_by_horizon of later layers, own_change_by_horizon,
        and ratio_to_random, the ratio of atoms to random writes in later layers (None where random writes
        change nothing there that rounding would not; heads that change no more are no readers).

    Raises:
        WriteSAEError: SAE and cell do not fit, the text or a passage is too short, no atom fires, or what is
            read or the logits are not finite.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    cell, length = site.cell, passages.shape[1]
    check_horizon(passages, max_horizon)
    found = [activity(model, sae, site, p) for p in passages]
    chosen = draw_atoms(found, passages, n_atoms, torch.Generator().manual_seed(seed))
    atoms = leading_pairs(atom_factors(sae, chosen.to(passages.device), cell.d_k, cell.d_v))
    size = magnitude * median_write_norm(found)
    run = Run("trace", model, sae, passages, locals(), n_atoms=len(chosen), write_norm=size)

    def trace(n: int) -> pd.DataFrame:
        own = generator(seed, n)
        position = int(torch.randint(0, length - max_horizon, (), generator=own))
        other = randomized(sae, chosen, atoms, own)
        writes = Factors(*(torch.cat(pair)[:, 0] for pair in zip(atoms, other.normalized(), strict=True)))
        tokens = passages[n, : position + max_horizon + 1]
        return _trace(model, cell, tokens, position, writes, size, chosen.numpy()).assign(passage=n)

    records = run.records(range(len(passages)), trace, "Tracing")
    records = records.reindex(
        columns=["passage", "position", "kind", "atom", "layer", "head", "horizon", "change"]
    )
    summary: dict[str, Any] = {**_summarize(records, cell), "n_passages": len(passages)}
    readers = summary["top_readers"]
    if not readers:
        last = cell.layer == max(model.mixers)
        headline = "no layer reads after this one" if last else "no head of a later layer reads a change"
    else:
        most = ", ".join(f"layer {r['layer']} head {r['head']} ({r['change']:.2%})" for r in readers[:3])
        ratio = summary["ratio_to_random"]
        headline = f"read most by {most}" + (
            "" if ratio is None else f"; {ratio:.2f} x as much as random writes"
        )
    return run.result(records, summary, headline)


@torch.no_grad()
def _trace(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    position: int,
    writes: Factors,
    size: float,
    names: Any,
) -> pd.DataFrame:
    count, layers = len(writes.key), [n for n in model.mixers if n >= cell.layer]
    hooks = {n: model.hook_name(n, "recurrence_out") for n in layers}
    past, coming = cache_of(model, tokens[:position]), tokens[position:]
    _, cache = model.run_with_cache(
        coming[None],
        names_filter=list(hooks.values()),
        past_key_values=repeated(past, 1),
        use_cache=past is not None,
    )
    changes: dict[int, Float[Tensor, "write horizon head"]] = {}

    def measure(layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            native = cache[hooks[layer]].float()
            moved = (x.float() - native).norm(dim=-1)
            check_finite(f"reads of layer {layer}", native, x)
            size = native.norm(dim=-1)
            changes[layer] = (moved / size).masked_fill(size == 0, float("nan"))

        return hook

    with model.hooks(fwd_hooks=[(hooks[n], measure(n)) for n in layers]):
        at = torch.zeros(count, dtype=torch.long, device=tokens.device)
        keys = writes.key * size
        logits = model.run_with_added_writes(
            coming, cell.layer, cell.head, at, keys, writes.value, past_key_values=past
        )
    check_finite("logits", logits)
    table = torch.stack([changes[n] for n in layers], dim=1)  # [write, layer, horizon, head]
    grid = np.indices(table.shape).reshape(4, -1)
    half = count // 2
    return pd.DataFrame(
        {
            "position": position,
            "kind": np.where(grid[0] < half, "atom", "random"),
            "atom": np.where(grid[0] < half, names[grid[0] % half], grid[0] - half),
            "layer": np.asarray(layers)[grid[1]],
            "head": grid[3],
            "horizon": grid[2],
            "change": table.cpu().double().numpy().ravel(),
        }
    )


def _summarize(records: pd.DataFrame, cell: Cell) -> dict[str, Any]:
    own = records.loc[(records["layer"] == cell.layer) & (records["head"] == cell.head)]
    later = records.loc[records["layer"] > cell.layer]

    def by(frame: pd.DataFrame, column: str) -> dict[str, float]:
        means = frame.loc[frame["kind"] == "atom"].groupby(column)["change"].mean().dropna()
        return {str(at): float(x) for at, x in means.items()}

    atoms = later.loc[later["kind"] == "atom"]
    means = atoms.groupby(["layer", "head"])["change"].mean().sort_values(ascending=False)
    means = means[means > _ROUNDING]
    summary: dict[str, Any] = {
        "own_change_by_horizon": by(own, "horizon"),
        "change_by_layer": by(later, "layer"),
        "change_by_horizon": by(later, "horizon"),
        "top_readers": [
            {"layer": int(row["layer"]), "head": int(row["head"]), "change": float(row["change"])}
            for row in means.head(10).reset_index().to_dict("records")
        ],
    }
    random = later.loc[later["kind"] == "random", "change"].mean()
    ratio = statistics.ratio(float(atoms["change"].mean()), float(random)) if random > _ROUNDING else None
    return summary | {"ratio_to_random": ratio}


@figure("trace")
def plot_trace(result: ExperimentResult) -> Figure:
    """Change of what each head reads, by layer and head, and by horizon for the own head and later layers."""
    records, summary = result.records, result.summary
    figure, (heads, horizons) = new_figure(10.0, 3.8, 2)
    atoms = records[records.kind == "atom"]
    table = atoms.pivot_table(index="layer", columns="head", values="change", aggfunc="mean")
    image = heads.imshow(table.to_numpy(), cmap="Blues", aspect="auto", vmin=0)
    heads.set_xticks(range(table.shape[1]), list(table.columns))
    heads.set_yticks(range(table.shape[0]), list(table.index))
    heads.set(xlabel="head", ylabel="layer")
    heads.set_title("Change of what a head reads, mean over horizons", fontsize=11, loc="left")
    figure.colorbar(image, ax=heads, shrink=0.8)
    for name, color, label in (
        ("own_change_by_horizon", ATOM, "the atom's own head"),
        ("change_by_horizon", DELETE, "later layers, mean of heads"),
    ):
        found = summary[name]
        horizons.plot([int(h) for h in found], list(found.values()), "o-", ms=3, color=color, label=label)
    horizons.set(xlabel="tokens since the write", ylim=(0, None))
    horizons.set_title("For how long", fontsize=11, loc="left")
    horizons.legend(frameon=False, fontsize=9)
    return figure
