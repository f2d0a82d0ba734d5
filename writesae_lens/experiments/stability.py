"""Stability: do dictionaries that were trained apart have the same features?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.features.sides import PLURALS, features_by_side
from writesae_lens.experiments.firings import activity, check_any_fires
from writesae_lens.experiments.options import Count, Seed
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import native_writes
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import common_cell, find_site
from writesae_lens.figures import ATOM, INK, RANDOM, new_figure
from writesae_lens.saes.codes import split
from writesae_lens.saes.rank1 import Factors, Matrices, normalized, overlaps
from writesae_lens.saes.sae import MatrixSAE

LOOKUP, NOISE = "lookup", "random"
THRESHOLDS = {"share_above_07": 0.7, "share_above_09": 0.9}


class Directions(NamedTuple):
    """Features of one side of a dictionary, as unit matrices (a key or value code: of one row)."""

    name: str
    features: Int[Tensor, " feature"]
    uses: Int[Tensor, " feature"]
    units: Matrices
    signs: tuple[Float[Tensor, " d_k"], Float[Tensor, " d_v"]] | None
    """Of codes: `sign_key` and `sign_value`, which decide the signs with which they see a write."""


@experiment(
    "stability",
    question="Do dictionaries of one cell that were trained apart have the same features?",
    row="a pair of matched features",
    table=("share_above_07", "share_above_09"),
)
def stability(
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]] | Sequence[SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Match the features of two or more SAEs of one cell, two SAEs at a time, and count those that agree.

    Features that are active in the text are matched one to one so that the sum of cosines is largest; atoms
    by the cosine of their matrices, key codes with key codes and value codes with value codes. A feature is
    found again where its partner's cosine is above 0.7, or above 0.9 (the paper finds fewer than 1% there).
    Two controls of as many directions as the first SAE has active features say what that is worth: writes
    of the text, drawn twice without overlap (an untrained lookup), and random directions. Each SAE is matched
    with such a lookup too: features near to single writes are found again because the writes are.

    Args:
        model: the model that the SAEs were trained on.
        saes: by name or in a list; of one cell, and all of atoms or all of codes. A single SAE is matched
            with the lookup alone.
        tokens: passages ``[passage, pos]``, or a text.
        context_size: length of a passage where ``tokens`` is text (None: that of the first SAE's training,
            else 256).
        seed: seed of the controls.
        progress_folder: folder that keeps finished passages, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per matched pair: first, second (names; "lookup", "random" for
        controls), side ("atom", "key", "value"), feature, match (indices in the dictionaries; controls are
        numbered), cosine, uses, match_uses (positions of the text at which each is active; 1 for controls).
        ``summary`` has ``table``, one row per pair of dictionaries and side: first, second, side, n_first,
        n_second (active features), share_above_07, share_above_09 (of the active features of both; one
        without a partner is not above), share_of_uses_above_07, share_of_uses_above_09, median_cosine (of
        pairs); and the means of share_above_07, share_above_09 and median_cosine over pairs of SAEs and
        sides (None for a single SAE), over lookups (lookup_share_above_07, ...) and random directions
        (random_share_above_07, ...).

    Raises:
        WriteSAEError: no SAEs, SAEs on different cells or that do not fit, atoms beside codes, an SAE
            named like a control, or one of which no feature is active.
    """
    if not isinstance(saes, Mapping):
        if not isinstance(saes, (list, tuple)):
            raise WriteSAEError(
                f"saes must be a list of SAEs or a dict of names and SAEs, got a {type(saes).__name__}"
            )
        saes = {f"SAE {n}": sae for n, sae in enumerate(saes, 1)}
    cell = common_cell(model, saes, (LOOKUP, NOISE), "match")
    _check_kinds(saes)
    first = next(iter(saes.values()))
    passages = find_passages(model, first, tokens, context_size)
    run = Run(
        "stability",
        model,
        list(saes.values()),
        passages,
        locals(),
        parts_depend_on_options=False,
        names=list(saes),
    )
    counts = run.records(range(len(passages)), lambda n: _count(model, saes, passages[n]), "Reading")
    uses = {
        name: torch.as_tensor(
            counts.loc[counts.name == name].groupby("feature").uses.sum().to_numpy(copy=True)
        )
        for name in saes
    }
    for of in uses.values():
        check_any_fires(int(of.sum()), int(of.sum()), passages)
    writes = [native_writes(model, cell, passage) for passage in passages]
    native = Factors(*(torch.cat(side).cpu().float()[:, None] for side in zip(*writes, strict=True)))
    frames = []
    for side in features_by_side(first):
        own = [_directions(name, sae, side, uses[name], cell) for name, sae in saes.items()]
        for one, other in _pairs(own, native, side, generator(seed)):
            frames.append(_match(one, other, side))
    records = pd.concat([frame for frame, _ in frames], ignore_index=True)
    table = [row for _, row in frames]
    summary = {"table": table, "n_saes": len(saes), **_means(table)}
    return run.result(records, summary, _headline(table, list(saes)))


def _check_kinds(saes: Mapping[str, SAE[Any]]) -> None:
    """Refuse SAEs of different kinds.

    Raises:
        WriteSAEError: some have codes, others atoms.
    """
    first, *others = saes
    kinds = {name: list(features_by_side(sae)) for name, sae in saes.items()}
    if other := [name for name in others if kinds[name] != kinds[first]]:
        raise WriteSAEError(
            f"{', '.join(other)} and {first} have features of different kinds, codes and atoms: match SAEs "
            "of one kind"
        )


def _count(model: HookedRecurrent, saes: Mapping[str, SAE[Any]], tokens: Int[Tensor, " pos"]) -> pd.DataFrame:
    """At how many positions of a passage each feature of each SAE is active; zeros too."""
    frames = []
    for name, sae in saes.items():
        uses = activity(model, sae, find_site(model, sae), tokens).uses().cpu().numpy()
        frames.append(pd.DataFrame({"name": name, "feature": range(len(uses)), "uses": uses}))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def _directions(name: str, sae: SAE[Any], side: str, uses: Int[Tensor, " d_sae"], cell: Cell) -> Directions:
    """The active features of a side."""
    features = features_by_side(sae)[side]
    active = uses[features.start : features.stop].nonzero().squeeze(-1)
    signs = None
    if side != "atom":
        codes: Any = sae
        units: Matrices = normalized(getattr(codes, f"dec_{side}").cpu().float()[active, None])
        signs = codes.sign_key.cpu().float(), codes.sign_value.cpu().float()
    elif isinstance(sae, MatrixSAE):
        atoms = sae.atoms()
        units = Factors(*(x.cpu().float() for x in atoms)) if isinstance(atoms, Factors) else atoms.cpu()
        units = normalized(units[active])
    else:
        units = normalized(sae.W_dec.cpu().float()[active].view(-1, cell.d_k, cell.d_v))
    return Directions(name, active + features.start, uses[active + features.start], units, signs)


def _pairs(
    own: Sequence[Directions], native: Factors, side: str, rng: torch.Generator
) -> list[tuple[Directions, Directions]]:
    """The pairs to match: of SAEs, of each SAE with a lookup, of two lookups, of two sets of random ones."""
    n, width = len(own[0].features), (native.key.shape[-1], native.value.shape[-1])
    count = min(n, len(native.key) // 2)
    drawn = torch.randperm(len(native.key), generator=rng)[: 2 * count]
    lookups = [_controls(LOOKUP, native[part], side, own[0].signs) for part in drawn.view(2, -1)]
    noise = [
        _controls(NOISE, Factors(*(torch.randn(n, 1, d, generator=rng) for d in width)), side, None)
        for _ in range(2)
    ]
    beside = [(directions, lookups[0]) for directions in own] if count else []
    return [
        *combinations(own, 2),
        *beside,
        *([(lookups[0], lookups[1])] if count else []),
        (noise[0], noise[1]),
    ]


def _controls(name: str, matrices: Factors, side: str, signs: tuple[Tensor, Tensor] | None) -> Directions:
    """Rank-1 matrices as directions of a side, signed as the codes of an SAE see them if it has codes."""
    if signs is not None:
        seen = split(matrices, *signs)
        matrices = Factors(seen.key[:, None], seen.value[:, None])
    units: Matrices = matrices if side == "atom" else getattr(matrices, side)
    number = torch.arange(len(matrices.key))
    return Directions(name, number, torch.ones_like(number), normalized(units), signs)


def _opposite(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two SAEs of codes see most writes with opposite signs."""
    return sum(float(mine @ theirs) for mine, theirs in zip(one, other)) < 0


def _match(one: Directions, other: Directions, side: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The one-to-one matching of two dictionaries' features, and its row of the table."""
    cosines = overlaps(one.units, other.units).double().numpy()
    if one.signs is not None and other.signs is not None and _opposite(one.signs, other.signs):
        cosines = -cosines  # k v^T is (-k)(-v)^T, and the two chose opposite signs
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    frame = pd.DataFrame(
        {
            "first": one.name,
            "second": other.name,
            "side": side,
            "feature": one.features.numpy()[rows],
            "match": other.features.numpy()[columns],
            "cosine": cosines[rows, columns],
            "uses": one.uses.numpy()[rows],
            "match_uses": other.uses.numpy()[columns],
        }
    )
    n, n_uses = len(one.features) + len(other.features), int(one.uses.sum() + other.uses.sum())
    row: dict[str, Any] = {"first": one.name, "second": other.name, "side": side}
    row |= {"n_first": len(one.features), "n_second": len(other.features)}
    for name, threshold in THRESHOLDS.items():
        above = frame.loc[frame.cosine > threshold]
        uses = int(above.uses.sum() + above.match_uses.sum())
        row[name] = 2 * len(above) / n if n else None
        row[name.replace("share", "share_of_uses")] = uses / n_uses if n else None
    return frame, row | {"median_cosine": float(np.median(frame.cosine)) if len(frame) else None}


def _means(table: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over pairs and sides, of the SAEs and of each control."""
    means = {}
    for prefix, of in (("", None), (f"{LOOKUP}_", LOOKUP), (f"{NOISE}_", NOISE)):
        rows = [row for row in table if _kind(row) == of]
        for name in (*THRESHOLDS, "median_cosine"):
            means[prefix + name] = statistics.rate([row[name] for row in rows if row[name] is not None])
    return means


def _kind(row: Mapping[str, Any]) -> str | None:
    """Of a row of the table: None for a pair of SAEs, the control's name for two of a control."""
    if row["second"] not in (LOOKUP, NOISE):
        return None
    return row["second"] if row["first"] == row["second"] else "beside"


def _headline(table: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """For each side what is found again, and what of the controls is."""
    parts = []
    for side in dict.fromkeys(row["side"] for row in table):
        rows = [row for row in table if row["side"] == side]
        kind = None if len(names) > 1 else "beside"
        found = {of: [row for row in rows if _kind(row) == of] for of in (kind, LOOKUP, NOISE)}
        shares = {
            of: [
                statistics.share(statistics.rate([row[name] for row in some if row[name] is not None]))
                for name in THRESHOLDS
            ]
            for of, some in found.items()
        }
        what = PLURALS[side]
        parts.append(
            f"{what} with a partner above 0.7: {shares[kind][0]}, above 0.9: {shares[kind][1]} "
            f"(two lookups {shares[LOOKUP][0]} and {shares[LOOKUP][1]}, random {shares[NOISE][0]})"
        )
    of = f"{len(names)} SAEs" if len(names) > 1 else "one SAE and a lookup of the text's writes"
    return f"{of}: {'; '.join(parts)}"


@figure("stability")
def plot_stability(result: ExperimentResult) -> Figure:
    """For each side the share of features whose partner's cosine is above a value, SAEs and controls."""
    records, table = result.records, result.summary["table"]
    sides = list(dict.fromkeys(row["side"] for row in table))
    figure, axes = new_figure(5.2 * len(sides), 3.8, len(sides))
    styles = {None: (ATOM, "-", "two SAEs"), "beside": (INK, "--", "an SAE and a lookup")}
    styles |= {LOOKUP: (INK, ":", "two lookups"), NOISE: (RANDOM, "-", "random directions")}
    for axis, side in zip(axes, sides, strict=True):
        seen = set()
        for row in (row for row in table if row["side"] == side):
            color, line, label = styles[_kind(row)]
            mine = (records["first"] == row["first"]) & (records["second"] == row["second"])
            cosines = np.sort(records.loc[mine & (records.side == side), "cosine"])[::-1]
            share = 2 * np.arange(1, len(cosines) + 1) / (row["n_first"] + row["n_second"])
            axis.step(
                cosines, share, where="post", color=color, ls=line, label=None if label in seen else label
            )
            seen.add(label)
        for threshold in THRESHOLDS.values():
            axis.axvline(threshold, color=RANDOM, lw=0.8, ls=":")
        axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.02))
        axis.set_xlabel("cosine of the partners")
        axis.set_ylabel("share of features above")
        axis.set_title(f"{PLURALS[side].capitalize()} with a partner elsewhere", fontsize=11, loc="left")
        axis.legend(frameon=False, fontsize=9)
    return figure
