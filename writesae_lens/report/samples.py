"""Where each feature is active in a text: contexts at several strengths, shaded, and a histogram."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.experiments.firings import activity

BEFORE, AFTER = 24, 16
"""Tokens of a context on either side of its position."""
GROUPS = (("Strongest", 0.0, 8), ("Around the median", 0.5, 3), ("Among the weakest tenth", 0.95, 3))
"""Groups of contexts: heading, place in the order of coefficients (0: the largest), how many at most."""
N_BINS = 24
# Positions near a group's place that are looked at for contexts that do not overlap.
_CANDIDATES = 200
# A character is split into at most so many tokens.
_LONGEST_CHARACTER = 8


class Uses(NamedTuple):
    """Positions at which features are active, in the order of features, then of positions.

    Attributes:
        feature: number of the feature.
        at: position in the text, ``passage * length + position``.
        size: coefficient, above 0.
        dominant: whether no other feature of its side has a larger coefficient there.
    """

    feature: np.ndarray
    at: np.ndarray
    size: np.ndarray
    dominant: np.ndarray


@torch.no_grad()
def read_uses(
    model: HookedRecurrent,
    sae: SAE[Any],
    site: Site,
    passages: Int[Tensor, "passage pos"],
    verbose: bool = True,
) -> Uses:
    """Where every feature is active.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell.
        site: the SAE's cell, and whether it is on writes or states.
        passages: text.
        verbose: show a progress bar.
    """
    parts, length = [], passages.shape[1]
    for number, passage in enumerate(tqdm(passages, desc="Contexts", unit="passage", disable=not verbose)):
        active = activity(model, sae, site, passage)
        on = active.coefficient > 0
        position, feature = active.position[on].long(), active.feature[on].long()
        dominant = (active.largest[:, position] == feature).any(0)
        columns = feature, position + number * length, active.coefficient[on].float(), dominant
        parts.append([x.cpu().numpy() for x in columns])
    feature, at, size, dominant = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(feature, kind="stable")  # positions are in order already
    return Uses(feature[order], at[order], size[order], dominant[order])


def samples(uses: Uses, length: int) -> dict[int, dict[str, Any]]:
    """What the page shows of where each feature is active, by its number.

    Args:
        uses: of `read_uses`.
        length: tokens of a passage.

    Returns:
        for each active feature: n (positions where it is active), max (its largest coefficient), bins (how
        many coefficients lie in each of `N_BINS` equal parts from 0 to max), and contexts, in which no
        position stands twice. A context is [number of its group, passage, position, coefficient, whether
        the feature dominates there, then pairs of numbers: a position relative to its own where the feature
        is active, and the coefficient there in percent of the largest].
    """
    numbers, starts = np.unique(uses.feature, return_index=True)
    ends = [*starts[1:], len(uses.feature)]
    found = {}
    for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
        at, size = uses.at[start:end], uses.size[start:end]
        largest = float(size.max())
        bins = np.minimum((size / largest * N_BINS).astype(int), N_BINS - 1)
        percent = np.maximum(1, np.round(100 * size / largest)).astype(int)
        found[number] = {
            "n": len(at),
            "max": float(f"{largest:.3g}"),
            "bins": np.bincount(bins, minlength=N_BINS).tolist(),
            "contexts": [
                _context(group, place, at, size, percent, uses.dominant[start:end], length)
                for group, place in _chosen(at, size, length)
            ],
        }
    return found


def _chosen(at: np.ndarray, size: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Group and place (in ``at``) of the contexts: the nearest to each group's rank that do not overlap."""
    order = np.argsort(-size, kind="stable")
    ranks, shown, chosen = np.arange(len(order)), set(), []
    for group, (_, share, count) in enumerate(GROUPS):
        near = np.argsort(np.abs(ranks - share * (len(order) - 1)), kind="stable")[:_CANDIDATES]
        for place in order[near].tolist():
            if count and int(at[place]) not in shown:
                shown.update(_window(int(at[place]), length))
                chosen.append((group, place))
                count -= 1
    return chosen


def _window(at: int, length: int) -> range:
    """The positions of a context: those around its own in the same passage."""
    first = at - at % length
    return range(max(first, at - BEFORE), min(first + length, at + AFTER + 1))


def _context(
    group: int,
    place: int,
    at: np.ndarray,
    size: np.ndarray,
    percent: np.ndarray,
    dominant: np.ndarray,
    length: int,
) -> list[Any]:
    own = int(at[place])
    window = _window(own, length)
    inside = slice(*np.searchsorted(at, [window.start, window.stop]).tolist())
    shades = np.stack([at[inside] - own, percent[inside]], axis=1).flatten().tolist()
    where = [own // length, own % length, float(f"{size[place]:.3g}"), int(dominant[place])]
    return [group, *where, *shades]


def token_texts(model: HookedRecurrent, passages: Int[Tensor, "passage pos"]) -> dict[str, Any]:
    """The text of every token: the different texts, and for each position which of them it has.

    A character that is split into several tokens stands at the first of them; the others have none.

    Returns:
        ``texts``, and ``tokens``: their numbers, 32 bits each, in base 64.
    """
    rows = passages.tolist()
    if model.tokenizer is None:
        words = [[f"[{i}]" for i in row] for row in rows]
    else:
        ids = sorted({i for row in rows for i in row})
        own = dict(zip(ids, map(str, model.tokenizer.batch_decode([[i] for i in ids])), strict=True))
        words = [_joined(model.tokenizer, row, [own[i] for i in row]) for row in rows]
    texts = {text: n for n, text in enumerate(dict.fromkeys(text for row in words for text in row))}
    numbers = np.array([[texts[text] for text in row] for row in words], dtype="<u4")
    return {"texts": list(texts), "tokens": base64.b64encode(numbers.tobytes()).decode()}


def _joined(tokenizer: Any, ids: list[int], texts: list[str]) -> list[str]:
    """The texts of a passage's tokens, with the parts of a character put together at its first token."""
    texts = list(texts)
    for first, text in enumerate(texts):
        if "\ufffd" not in text:
            continue
        for end in range(first + 2, min(first + _LONGEST_CHARACTER, len(ids)) + 1):
            whole = str(tokenizer.decode(ids[first:end]))
            if "\ufffd" not in whole:
                texts[first:end] = [whole, *[""] * (end - first - 1)]
                break
    return texts
