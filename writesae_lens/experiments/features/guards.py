"""Guards: figures that tell a dictionary from a copy of its input, to be read beside what is recovered.

A copy of the write recovers everything and explains nothing. So each result also gives how many bits a write
naming the features takes, how many free dimensions a stand-in has beside those of a write, how many firings
use features that all recur in the text, and how near the tested writes are to training writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae_lens.experiments.features.activity import Activity
from writesae_lens.experiments.firings import native_of
from writesae_lens.saes.rank1 import Factors, overlaps

SEEN_OFTEN = 5
"""A feature with fewer uses than this in a text counts as rarely used (`seen_share`)."""
# Cosines of writes to training writes that are computed at once: bounds memory.
_COSINES = 2**26


class Guards:
    """Counts, over firings, of the features that stand-ins are made of.

    A firing *uses* the features of its stand-in: the dominant atom, or every active code. A position without
    an active atom, or without active codes on both sides, is no firing.
    """

    def __init__(self) -> None:
        self._uses: dict[str, Tensor] = {}
        self._used: list[tuple[Int[Tensor, " use"], Int[Tensor, " use"]]] = []
        self._n_firings = 0
        self._active = torch.zeros(0, dtype=torch.bool)
        self._free = 0
        self._native: list[Factors] = []

    @torch.no_grad()
    def add(self, active: Activity) -> None:
        """Count the firings among the positions of a passage, of the same SAE in every call."""
        active = active.at((active.dominant >= 0).nonzero().squeeze(-1))
        native = native_of(active)
        self._native.append(native)
        on = active.coefficient > 0
        firing, feature = active.position[on].cpu(), active.feature[on].cpu()
        any_active = feature.bincount(minlength=active.d_sae) > 0
        self._active = self._active | any_active if len(self._active) else any_active
        if "atom" in active.sides:
            firing, feature = torch.arange(len(active), dtype=torch.int), active.dominant.cpu().int()
            self._free += len(active)
        else:
            is_key = feature < active.n_key
            numbers = [firing[side].bincount(minlength=len(active)) for side in (is_key, ~is_key)]
            # Active codes span no more than their side has dimensions.
            free = [n.clamp(max=x.shape[-1]) for n, x in zip(numbers, native, strict=True)]
            self._free += int((free[0] + free[1] - 1).sum())
        uses = feature.bincount(minlength=active.d_sae)
        for name, side in active.sides.items():
            self._uses[name] = self._uses.get(name, 0) + uses[side.start : side.stop]
        self._used.append((firing + self._n_firings, feature))
        self._n_firings += len(active)

    @property
    def native(self) -> Factors:
        """The writes at all firings."""
        return Factors(*(torch.cat(x) for x in zip(*self._native, strict=True)))

    def summary(self, train: Factors | None = None) -> dict[str, Any]:
        """The guards' figures; those of which there is nothing are None.

        Args:
            train: writes that the SAE was trained on, or others of that text, of rank 1.

        Returns:
            bits: mean over firings of the sum over used features of log2(1 / share), where share is the
            feature's share of all uses on its side: how many bits naming the features takes, without their
            coefficients. It is an upper bound: the order in which a firing's features are named is not
            discounted, nor that some come together. free_dimensions: how many numbers of a write
            x -> stand_in(x) follows while the active features stay the same, mean: 1 for an atom,
            min(n, d_k) + min(m, d_v) - 1 for n key codes and m value codes; free_dimensions_of_a_write:
            d_k + d_v - 1, those of a copy. seen_share: share of firings whose rarest used feature the text
            uses at least 5 times. nearest_train_cosine: median over firings of the write's cosine to the
            nearest of the n_train_writes in ``train``; both None without those.
            n_features_active: features that are active at one firing at least.
        """
        counts = {name: uses.double() for name, uses in self._uses.items() if bool(uses.any())}
        n_firings = self._n_firings
        summary: dict[str, Any] = dict.fromkeys(
            ("bits", "free_dimensions", "free_dimensions_of_a_write", "seen_share")
        )
        if n_firings:
            # A sum over firings of their features' bits is one over features of their uses' bits.
            bits = sum(float(-torch.xlogy(uses, uses / uses.sum()).sum()) for uses in counts.values())
            summary["bits"] = bits / math.log(2) / n_firings
            summary["free_dimensions"] = self._free / n_firings
            summary["free_dimensions_of_a_write"] = sum(x.shape[-1] for x in self._native[0]) - 1
            summary["seen_share"] = float((self._rarest() >= SEEN_OFTEN).double().mean())
        nearest = None
        if train is not None and n_firings:
            nearest = float(nearest_cosines(self.native, train).quantile(0.5))
        return summary | {
            "nearest_train_cosine": nearest,
            "n_train_writes": None if train is None else len(train.key),
            "n_features_active": int(self._active.sum()),
        }

    def _rarest(self) -> Int[Tensor, " firing"]:
        """How often the text uses the feature of each firing that it uses least."""
        firing, feature = (torch.cat(x).long() for x in zip(*self._used, strict=True))
        uses = feature.bincount()[feature]
        return uses.new_zeros(self._n_firings).scatter_reduce(0, firing, uses, "amin", include_self=False)


def nearest_cosines(writes: Factors, others: Factors) -> Float[Tensor, " write"]:
    """The largest cosine, as matrices, of each write to any of the others; all are of rank 1."""
    unit, units = writes.normalized(), others.normalized()
    blocks = torch.arange(len(unit.key), device=unit.key.device).split(max(1, _COSINES // len(units.key)))
    return torch.cat([overlaps(unit[rows], units).amax(-1) for rows in blocks])
