"""Erasure (paper, experiment 5): what a token that an atom promotes loses when its writes are taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.divergences import log_probability_change
from writesae_lens.experiments import swaps
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.sides import NAMES, randomized, side_of
from writesae_lens.experiments.firings import (
    Activity,
    activity,
    check_atom,
    choose_atom,
    contribution,
    native_of,
)
from writesae_lens.experiments.options import Count, Positive, Seed
from writesae_lens.experiments.passages import find_passages, token_id
from writesae_lens.experiments.passes import LowerOfPassages, check_finite
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import find_site
from writesae_lens.figures import ATOM, DELETE, INK, RANDOM, new_figure
from writesae_lens.saes.rank1 import Factors

DOSES = (0.25, 0.5, 1.0, 2.0)
CONDITIONS = ("firing", "elsewhere", "random")


@experiment(
    "erase",
    paper=5,
    question="What does the token that a feature promotes lose when it is taken out of the writes?",
    row="a position, condition and dose",
    table=("median_delta_logp_firing", "median_delta_logp_elsewhere", "median_delta_logp_random"),
    max_passages=64,
    former_names=("erasure",),
)
def erase_atom(
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    atom: int | None = None,
    token: int | str | None = None,
    doses: tuple[Positive, ...] = DOSES,
    max_firings: Count | None = 500,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Subtract an atom from the native writes, and measure how the token that it promotes changes.

    At a position where the atom is active, dose x coefficient x atom is subtracted from the native write; the
    effect is the change of the token's log-probability at that position, log p(erased) - log p(native).
    Controls: the same at as many positions as it has firings, where it is not active, with its mean
    coefficient ("elsewhere"), and a Gaussian rank-1 matrix of the erased one's norm at the firing positions
    ("random").

    Of a code, what it adds to the stand-in is subtracted (`firings.contribution`): a value code at the
    address that the active key codes give there, a key code with the content that the active value codes
    give. Its random control has a Gaussian vector in the code's place, and the other side as it is.

    The atom's *preferred token* has the largest sum of log p(native) - log p(erased) over firings, at dose
    1. That sum runs over every other firing, and the rest are tested: on the firings that choose the token,
    it would lose even if the atom meant nothing (a single firing both chooses and is tested).

    Where the KL of an erasure is not above what rounding alone gives (`swaps.divergences`), nothing moved:
    such positions are counted, and left out where only the sign matters, the share of falls and p.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        atom: the atom or code (None: the atom, or the value code, that fires most often).
        token: the token to watch, an id or the text of one token (None: the preferred one).
        doses: multiples of what the atom writes.
        max_firings: take a random choice of this many of the positions where the atom is active (None: all);
            without ``token``, every other one of them chooses the token and the rest are tested.
        context_size: length of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: seed of the choice, control positions, random matrices and the bootstrap.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per position and dose: passage, position, token (there),
        condition ("firing", "elsewhere", "random"), dose, coefficient, delta_logp (of the watched token,
        nats), kl (patched || native), kl_floor. ``summary`` has atom, side ("atom", "key" or "value"),
        preferred_token (id) and its text; for each condition its positions (n), those where nothing moved
        (n_at_floor), the median change at dose 1 (or the nearest dose), its 95% interval (bootstrap over
        passages), the share of falls, and the medians by dose; and the one-sided Wilcoxon p of a fall (None
        where a condition has nothing that moves).

    Raises:
        WriteSAEError: SAE and cell do not fit, the atom does not exist or is active nowhere, or ``token`` is
            not a single token.
    """
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    check_atom(sae, atom)
    watched = None if token is None else token_id(model, token)
    lower, found = LowerOfPassages(model, site.cell), []
    for n, passage in enumerate(tqdm(passages, desc="Firings", unit="passage", disable=not verbose)):
        with lower.kept(n):
            found.append(activity(model, sae, site, passage))
    chosen = choose_atom(atom, found, passages)
    firings, elsewhere = _places(sae, site.cell, found, chosen, max_firings, seed)
    every = torch.cat([torch.full_like(f.position, n) for n, f in enumerate(firings)])
    # Every other firing chooses the token, the rest are tested; the lone firing does both.
    tests = (
        torch.arange(len(every), device=every.device) % 2 == 1
        if watched is None and len(every) > 1
        else every >= 0
    )
    tested = [f.subset(tests[every == n]) for n, f in enumerate(firings)]
    chooses = tests if watched is None and len(every) == 1 else ~tests
    choosing = [f.subset(chooses[every == n]) for n, f in enumerate(firings)]

    def taken(n: int) -> tuple[_Places, ...]:
        features = torch.full_like(tested[n].position, chosen)
        random = randomized(sae, features, tested[n].taken, generator(seed, n))
        return tested[n], elsewhere[n], tested[n]._replace(taken=random)

    def run_passage(n: int) -> _Erased:
        erased = [(choosing[n], (1.0,)), *((places, doses) for places in taken(n))]
        return _run(model, site.cell, passages[n], lower.of(n, passages[n]), erased)

    ran: dict[int, _Erased] = {}
    if watched is None:
        falls = torch.zeros(model.cfg.d_vocab, dtype=torch.float64)
        for n, part in enumerate(choosing):
            if count := len(part.position):
                ran[n] = run_passage(n)
                falls += _fall(model, site.cell, ran[n].rows(slice(count))).to(falls)
        watched = int(falls.argmax())
    about = {"atom": chosen, "preferred_token": watched, "token_given": token is not None}
    run = Run("erase", model, sae, passages, locals(), **about)

    def erase(n: int) -> pd.DataFrame:
        rows = (ran.pop(n) if n in ran else run_passage(n)).rows(slice(len(choosing[n].position), None))
        frame = _erase(model, site.cell, passages[n], rows, taken(n), watched, doses)
        frame.insert(0, "passage", n)
        return frame

    numbers = [n for n in range(len(passages)) if len(tested[n].position) + len(elsewhere[n].position)]
    records = run.records(numbers, erase, "Erasing")
    summary = _summarize(records, seed)
    summary |= {
        "side": side_of(sae, chosen),
        "preferred_token_text": model.tokenizer.decode([watched]) if model.tokenizer else None,
        "n_positions_that_chose_it": 0 if token is not None else len(every) - int(tests.sum()) or 1,
        "n_passages": len(passages),
    }
    return run.result(records, summary, _headline(summary, chosen, watched))


class _Places(NamedTuple):
    """Positions of one passage, the native writes there, and what is subtracted from them at dose 1."""

    position: Int[Tensor, " place"]
    coefficient: Float[Tensor, " place"]
    native: Factors
    taken: Factors

    def subset(self, index: Tensor) -> _Places:
        """The places of some indices, or of a mask."""
        return _Places(self.position[index], self.coefficient[index], self.native[index], self.taken[index])


def _headline(summary: dict[str, Any], atom: int, watched: int) -> str:
    """The change beside its control: a random matrix of the same norm taken out at the same firings."""
    token, own, random = (
        summary[name]
        for name in ("preferred_token_text", "median_delta_logp_firing", "median_delta_logp_random")
    )
    at_floor = summary["n_at_floor_firing"]
    note = f"{summary['n_firing']} firings" + (f", {at_floor} at the floor of rounding" if at_floor else "")
    what = NAMES[summary["side"]]
    if own is None:
        return f"{what} {atom} erased: nothing moves, {note}"
    interval = statistics.between(summary["delta_logp_ci_firing"], "+.4f")
    control = "nothing" if random is None else f"{random:+.4f}"
    return (
        f"{what} {atom} erased: log p of {token or watched!r} moves by {own:+.4f}{interval}, with a random "
        f"matrix erased by {control}, {note}"
    )


def _places(
    sae: SAE[Any], cell: Cell, found: list[Activity], atom: int, max_firings: int | None, seed: int
) -> tuple[list[_Places], list[_Places]]:
    """Positions where the atom is active, and in each passage as many (if there are) where it is not."""
    sizes = [x.of_feature(atom) for x in found]
    active = torch.cat(sizes) > 0
    mean = torch.cat(sizes)[active].float().mean()
    order = torch.randperm(int(active.sum()), generator=generator(seed, 0, 2))[:max_firings]
    kept_rows = active.nonzero().squeeze(-1)[order.to(active.device)]
    tested = torch.zeros_like(active)
    tested[kept_rows] = True
    chosen = tested.split([len(x) for x in found])
    firing, elsewhere = [], []
    for n, (activities, sizes_here) in enumerate(zip(found, sizes, strict=True)):
        at, silent = chosen[n].nonzero().squeeze(-1), (sizes_here <= 0).nonzero().squeeze(-1)
        order = torch.randperm(len(silent), generator=generator(seed, n, 1))
        other = silent[order[: len(at)].to(silent.device)].sort().values
        for where, kept, size in ((at, firing, sizes_here[at]), (other, elsewhere, mean.expand(len(other)))):
            there = activities.at(where).with_coefficients(atom, size)
            taken = contribution(sae, there, atom, cell)
            kept.append(_Places(where, there.of_feature(atom).float(), native_of(there), taken))
    return firing, elsewhere


class _Erased(NamedTuple):
    """Last residual streams of a passage, natively and, a row each, with something taken out of a write."""

    at: Int[Tensor, " row"]
    """Of each row, its position's number in ``native``."""
    native: Float[Tensor, "position d_model"]
    changed: Float[Tensor, "row d_model"]

    def rows(self, some: slice) -> _Erased:
        """Some of the rows."""
        return _Erased(self.at[some], self.native, self.changed[some])


def _run(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    lower: LowerLayers | None,
    erased: Sequence[tuple[_Places, tuple[float, ...]]],
) -> _Erased:
    """Run a passage once with all that is taken out at its places: rows by group, then dose, then place."""
    groups = [
        (places.position, swaps.summed(places.native, Factors(places.taken.key * -dose, places.taken.value)))
        for places, doses in erased
        for dose in doses
    ]
    position, written = torch.cat([p for p, _ in groups]), swaps.joined(*(w for _, w in groups))
    used, at = position.unique(return_inverse=True)
    native, changed = torch.empty(0), []
    for _, residual, (branches,) in swaps.swapped_residuals(
        model, cell, tokens, position, [written], lower=lower
    ):
        native = residual[used]
        changed.append(branches)
    return _Erased(at, native, torch.cat(changed))


@torch.no_grad()
def _fall(model: HookedRecurrent, cell: Cell, rows: _Erased) -> Float[Tensor, " d_vocab"]:
    """How much each logit falls by the erasing, summed over the rows; so does log p, but for a constant."""
    falls = torch.zeros(model.cfg.d_vocab, dtype=torch.float64)
    for swapped in swaps.unembedded(model, cell, rows.at, rows.native, rows.changed[None]):
        fall = (swapped.base - swapped.patched[0]).sum(0)
        check_finite("logits", fall)
        falls += fall.to(falls)
    return falls


@torch.no_grad()
def _erase(
    model: HookedRecurrent,
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    rows: _Erased,
    taken: Sequence[_Places],
    watched: int,
    doses: tuple[float, ...],
) -> pd.DataFrame:
    """The table of one passage, of the rows that `_run` makes of the conditions' places."""
    changes, kls, floors = [], [], []
    for swapped in swaps.unembedded(model, cell, rows.at, rows.native, rows.changed[None]):
        change, kl = log_probability_change(swapped.patched[0], swapped.base, watched)
        check_finite("logits", kl)
        changes.append(change)
        kls.append(kl)
        floors.append(swapped.floor)
    columns: dict[str, Any] = {name: [] for name in ("position", "token", "condition", "dose", "coefficient")}
    for condition, places in zip(CONDITIONS, taken, strict=True):
        count, times = len(places.position), len(doses)
        columns["position"].append(places.position.repeat(times).cpu().numpy())
        columns["token"].append(tokens[places.position].repeat(times).cpu().numpy())
        columns["condition"].append(np.full(count * times, condition, dtype=object))
        columns["dose"].append(np.repeat(doses, count))
        columns["coefficient"].append(places.coefficient.repeat(times).cpu().numpy().astype(float))
    measured = {"delta_logp": changes, "kl": kls, "kl_floor": floors}
    return pd.DataFrame(
        {name: np.concatenate(parts) for name, parts in columns.items()}
        | {name: torch.cat(parts).cpu().double().numpy() for name, parts in measured.items()}
    )


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    dose = min(records.dose.unique(), key=lambda d: abs(d - 1))
    summary: dict[str, Any] = {"dose": float(dose)}
    for condition in CONDITIONS:
        part = records.loc[records["condition"] == condition]
        at = part.loc[part["dose"] == dose]
        moved = at.loc[swaps.above_floor(at, "kl")]
        summary |= {f"n_{condition}": len(at), f"n_at_floor_{condition}": len(at) - len(moved)}
        by_dose = part.groupby("dose")["delta_logp"].median() if len(moved) else pd.Series(dtype=float)
        found: dict[str, Any] = dict.fromkeys(
            ("median_delta_logp", "delta_logp_ci", "share_of_falls", "median_kl", "fall_p")
        )
        # Medians are of all positions: to leave out those that did not move would choose by the outcome. Of
        # these only the sign is rounding's.
        if len(moved):
            found = {
                "median_delta_logp": float(at["delta_logp"].median()),
                "delta_logp_ci": statistics.median_interval(at["delta_logp"], at["passage"], seed),
                "share_of_falls": float((moved["delta_logp"] < 0).mean()),
                "median_kl": float(at["kl"].median()),
                "fall_p": statistics.paired_wilcoxon(-moved["delta_logp"], np.zeros(len(moved))),
            }
        found["median_delta_logp_by_dose"] = {f"{d:g}": float(x) for d, x in by_dose.items()}
        summary |= {f"{name}_{condition}": value for name, value in found.items()}
    return summary


@figure("erase")
def plot_erase(result: ExperimentResult) -> Figure:
    """Change of the watched token's log-probability by condition, and its median by dose."""
    records, summary = result.records, result.summary
    figure, (spread, doses) = new_figure(10.0, 4.0, 2)
    colors = {"firing": ATOM, "elsewhere": DELETE, "random": RANDOM}
    at = records[records.dose == summary["dose"]]
    names = [name for name in colors if (at.condition == name).any()]
    groups = [at.loc[at.condition == name, "delta_logp"] for name in names]
    if names:
        boxes = spread.boxplot(groups, tick_labels=names, showfliers=False, patch_artist=True, widths=0.5)
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set(facecolor=colors[name], alpha=0.4)
        for line in boxes["medians"]:
            line.set(color=INK)
    spread.axhline(0, color=INK, lw=0.8, ls="--")
    token = summary["preferred_token_text"] or summary["preferred_token"]
    spread.set_ylabel(f"change of log p of {token!r} (nats)")
    interval = statistics.between(summary["delta_logp_ci_firing"], "+.3f")
    median = summary["median_delta_logp_firing"]
    what = NAMES[summary["side"]]
    moved = "nothing moves" if median is None else f"{median:+.3f}"
    title = f"{what.capitalize()} {summary['atom']} erased: {moved}"
    spread.set_title(f"{title}{interval}", fontsize=11, loc="left")
    for name in names:
        medians = summary[f"median_delta_logp_by_dose_{name}"]
        doses.plot([float(d) for d in medians], list(medians.values()), "o-", color=colors[name], label=name)
    doses.axhline(0, color=INK, lw=0.8, ls="--")
    doses.set_xlabel(f"dose (multiples of what the {what} writes)")
    doses.set_title("Median change by dose", fontsize=11, loc="left")
    if names:
        doses.legend(frameon=False, fontsize=9)
    return figure
