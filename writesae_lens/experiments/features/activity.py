"""What is active in one passage: coefficients of an SAE's features, few a position, and the native writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUMBERS_AT_ONCE = 2**24
"""Numbers that are built at once, for as many positions as they are enough for: 64 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class Activity:
    """The coefficients other than 0 at every position of one passage, and the native writes there.

    Coefficients are entries (position, feature, coefficient) in the order of positions, then of features: a
    few a position where the SAE is sparse. An SAE that is not, of ReLU say, has up to d_sae of them a
    position, and they take three times the memory of the dense matrix.
    """

    position: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"]
    coefficient: Float[Tensor, " entry"]
    largest: Int[Tensor, "side pos"]
    """The feature with the largest coefficient of each side (of atoms: the one side); -1 where none fires."""
    write_key: Float[Tensor, "pos d_k"]
    write_value: Float[Tensor, "pos d_v"]
    d_sae: int
    n_key: int = 0
    """How many of the features, the first ones, are key codes; 0 for atoms."""

    @classmethod
    def of(
        cls,
        parts: Iterable[Float[Tensor, "_ d_sae"]],
        write_key: Float[Tensor, "pos d_k"],
        write_value: Float[Tensor, "pos d_v"],
        n_key: int = 0,
    ) -> Activity:
        """From the dense coefficients of consecutive positions, of which one part is held at a time."""
        entries, largest, start, d_sae = [], [], 0, 0
        for acts in parts:
            position, feature = acts.nonzero(as_tuple=True)
            entries.append(((position + start).int(), feature.int(), acts[position, feature]))
            largest.append(torch.stack([_largest(acts, side) for side in _sides(acts.shape[1], n_key)]))
            start, d_sae = start + len(acts), acts.shape[1]
        position, feature, coefficient = (torch.cat(x) for x in zip(*entries, strict=True))
        found = torch.cat(largest, dim=1)
        return cls(position, feature, coefficient, found, write_key, write_value, d_sae, n_key)

    def __len__(self) -> int:
        return len(self.write_key)

    @property
    def sides(self) -> dict[str, range]:
        """The features of each side: of "atom" alone, or of "key" and "value"."""
        names = ("key", "value") if self.n_key else ("atom",)
        return dict(zip(names, _sides(self.d_sae, self.n_key), strict=True))

    @property
    def dominant(self) -> Int[Tensor, " pos"]:
        """The atom (of codes: the value code) with the largest coefficient; -1 where nothing fires."""
        return torch.where(self._fires, self.largest[-1], -1)

    @property
    def dominant_key(self) -> Int[Tensor, " pos"]:
        """The key code with the largest coefficient; -1 where nothing fires, and with atoms."""
        fires = self._fires if self.n_key else torch.zeros_like(self._fires)
        return torch.where(fires, self.largest[0], -1)

    @property
    def _fires(self) -> Bool[Tensor, " pos"]:
        return (self.largest >= 0).all(dim=0)

    def of_feature(self, feature: int) -> Float[Tensor, " pos"]:
        """Coefficients of one feature at every position."""
        mine = self.feature == feature
        coefficients = self.coefficient.new_zeros(len(self))
        coefficients[self.position[mine].long()] = self.coefficient[mine]
        return coefficients

    def greatest(self) -> Float[Tensor, " pos"]:
        """The largest coefficient at every position, 0 where none is positive."""
        greatest = self.coefficient.new_zeros(len(self))
        return greatest.scatter_reduce_(0, self.position.long(), self.coefficient, "amax")

    def uses(self) -> Int[Tensor, " d_sae"]:
        """At how many positions each feature is active."""
        return self.feature[self.coefficient > 0].bincount(minlength=self.d_sae)

    def strongest(
        self, count: int
    ) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " found"]]:
        """Of each active feature the (up to) ``count`` positions where its coefficient is largest.

        Returns:
            features, positions and coefficients, largest first and then by position.
        """
        active = self._entries(self.coefficient > 0)
        order = active.coefficient.argsort(descending=True, stable=True)
        order = order[active.feature[order].argsort(stable=True)]
        feature, uses = active.feature[order].long(), active.uses()
        rank = torch.arange(len(order), device=order.device) - (uses.cumsum(0) - uses)[feature]
        kept = order[rank < count]
        return active.feature[kept].long(), active.position[kept].long(), active.coefficient[kept]

    def at(self, positions: Int[Tensor, " chosen"]) -> Activity:
        """What is active at some positions, in rising order, which are then numbered from 0."""
        number = torch.full((len(self),), -1, dtype=torch.int, device=positions.device)
        number[positions] = torch.arange(len(positions), dtype=torch.int, device=positions.device)
        position = number[self.position.long()]
        chosen = dataclasses.replace(
            self._entries(position >= 0),
            largest=self.largest[:, positions],
            write_key=self.write_key[positions],
            write_value=self.write_value[positions],
        )
        return dataclasses.replace(chosen, position=position[position >= 0])

    def alone(self, feature: int) -> Activity:
        """Without the other features of the feature's side; what is `largest` is not changed."""
        side = next(side for side in self.sides.values() if feature in side)
        others = (self.feature >= side.start) & (self.feature < side.stop) & (self.feature != feature)
        return self._entries(~others)

    def with_coefficients(self, feature: int, coefficients: Float[Tensor, " pos"]) -> Activity:
        """With one feature at other coefficients; what is `largest` is not changed."""
        kept = self._entries(self.feature != feature)
        position = torch.cat([kept.position, torch.arange(len(self)).to(kept.position)])
        order = position.argsort(stable=True)
        return dataclasses.replace(
            kept,
            position=position[order],
            feature=torch.cat([kept.feature, kept.feature.new_full((len(self),), feature)])[order],
            coefficient=torch.cat([kept.coefficient, coefficients.to(kept.coefficient)])[order],
        )

    def _entries(self, chosen: Bool[Tensor, " entry"]) -> Activity:
        entries = (self.position[chosen], self.feature[chosen], self.coefficient[chosen])
        names = ("position", "feature", "coefficient")
        return dataclasses.replace(self, **dict(zip(names, entries, strict=True)))

    def by_position(self) -> tuple[Int[Tensor, "pos active"], Float[Tensor, "pos active"]]:
        """Features and coefficients in rows, largest first, 0 where a position has fewer than another."""
        position = self.position.long()
        number = position.bincount(minlength=len(self))
        column = torch.arange(len(position), device=position.device) - (number.cumsum(0) - number)[position]
        shape = (len(self), max(1, int(number.amax())) if len(self) else 1)
        coefficient, feature = self.coefficient.new_zeros(shape), position.new_zeros(shape)
        coefficient[position, column], feature[position, column] = self.coefficient, self.feature.long()
        coefficient, order = coefficient.sort(dim=-1, descending=True)
        return feature.gather(-1, order), coefficient


def _sides(d_sae: int, n_key: int) -> list[range]:
    return [range(n_key), range(n_key, d_sae)] if n_key else [range(d_sae)]


def _largest(acts: Float[Tensor, "pos d_sae"], side: range) -> Int[Tensor, " pos"]:
    """The feature of a side with the largest coefficient; -1 where none has a positive one."""
    size, feature = acts[:, side.start : side.stop].max(dim=-1)
    return torch.where(size > 0, feature + side.start, -1)
