"""What steering adds to a cell's writes: features at some coefficients, as matrices and directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell, Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.features.sides import PLURALS, features_by_side, side_of
from writesae_lens.experiments.firings import atom_factors, check_atom, is_codes
from writesae_lens.experiments.options import is_number, is_whole, shown
from writesae_lens.saes.codes import split
from writesae_lens.saes.rank1 import Factors
from writesae_lens.use.sizes import firing_sizes

_LARGEST = torch.finfo(torch.float32).max

Features = int | tuple[int, ...]
"""A feature as users name it: its number, a pair of codes, or one of these with layer and head before it."""


class Chosen(NamedTuple):
    """An atom or a code of one SAE, or a pair of codes."""

    site: Site
    features: tuple[int, ...]

    @property
    def name(self) -> str:
        """As messages and figures call it."""
        cell = self.site.cell
        return f"{cell.layer}:{cell.head} {' x '.join(map(str, self.features))}"


@dataclasses.dataclass(frozen=True)
class Addition:
    """What is added to each write k v^T of a cell: matrix + key v^T + k value^T.

    Args:
        cell: the cell.
        matrix: the atoms and the pairs of codes, summed.
        key: the key codes, summed (None: there are none).
        value: the value codes, summed (None: there are none).
        signs: the rule for the signs of k and v, of an SAE of codes (`saes.codes.split`).
    """

    cell: Cell
    matrix: Float[Tensor, "d_k d_v"]
    key: Float[Tensor, " d_k"] | None = None
    value: Float[Tensor, " d_v"] | None = None
    signs: tuple[Float[Tensor, " d_k"], Float[Tensor, " d_v"]] | None = None

    @property
    def moves(self) -> bool:
        """Whether what is added depends on the write at hand."""
        return self.key is not None or self.value is not None

    def to(
        self,
        shape: tuple[int, ...],
        native_key: Float[Tensor, "batch pos d_k"] | None,
        native_value: Float[Tensor, "batch pos d_v"] | None,
    ) -> Float[Tensor, "batch pos d_k_d_v"]:
        """What is added to native writes, flattened; their factors count where codes move them."""
        total = self.matrix.expand(*shape, -1, -1)
        if self.moves:
            assert native_key is not None
            assert native_value is not None
            assert self.signs is not None
            signs = [sign.to(native_key) for sign in self.signs]
            rows = Factors(native_key.flatten(0, 1)[:, None], native_value.flatten(0, 1)[:, None])
            address, content, norm = split(rows, *signs)
            address, content = (x.unflatten(0, shape) for x in (address, content * norm[:, None]))
            total = total.to(native_key)
            if self.key is not None:
                total = total + self.key.to(total)[:, None] * content[..., None, :]
            if self.value is not None:
                total = total + address[..., None] * self.value.to(total)
        return total.flatten(-2)


def parse_features(saes: Mapping[Site, SAE[Any]], features: Any) -> dict[Chosen, float]:
    """The features that a user names, and their sizes.

    Args:
        saes: by the write that they were trained on.
        features: as in `steering`.

    Raises:
        WriteSAEError: a feature is named in another way or does not exist, a size is no number, there are no
            features, or an SAE is on states.
    """
    for site in saes:
        if site.kind == "state":
            raise WriteSAEError(
                f"the SAE of layer {site.cell.layer} head {site.cell.head} is on states: steering writes "
                "features beside the native writes, so give an SAE on writes"
            )
    if not isinstance(features, Mapping) or not features:
        got = "an empty dict" if isinstance(features, Mapping) else shown(features)
        raise WriteSAEError(f"features must be a dict {{feature: size}}, one at least, got {got}")
    chosen: dict[Chosen, float] = {}
    for name, size in features.items():
        found = _find(saes, name)
        if not is_number(size) or not abs(size) <= _LARGEST:  # NaN is not
            raise WriteSAEError(
                f"the size of feature {name} must be a number within float32, got {shown(size)}"
            )
        if found in chosen:
            raise WriteSAEError(f"feature {found.name} is named twice: give it one size")
        chosen[found] = float(size)
    return chosen


def _find(saes: Mapping[Site, SAE[Any]], name: Any) -> Chosen:
    """The SAE's site and the feature or pair of a name."""
    parts = (name,) if is_whole(name) else name
    if not isinstance(parts, tuple) or len(parts) not in (1, 2, 3, 4) or not all(map(is_whole, parts)):
        raise WriteSAEError(
            f"a feature is a number or a pair of codes (key, value), of several SAEs with layer and head "
            f"before, (layer, head, feature); got {shown(name)}"
        )
    parts = tuple(map(int, parts))
    if len(parts) < 3:
        if len(saes) > 1:
            raise WriteSAEError(
                f"which SAE has feature {shown(name)}? Of several SAEs say (layer, head, feature), in the "
                "shell LAYER:HEAD:FEATURE"
            )
        site, of_sae = next(iter(saes)), parts
    else:
        cell, of_sae = parts[:2], parts[2:]
        found = [site for site in saes if (site.cell.layer, site.cell.head) == cell]
        if not found:
            have = ", ".join(f"{site.cell.layer}:{site.cell.head}" for site in saes)
            raise WriteSAEError(f"{name} is of the cell {cell[0]}:{cell[1]}, but the SAEs are of {have}")
        site = found[0]
    sae = saes[site]
    for feature in of_sae:
        check_atom(sae, feature)
    if len(of_sae) == 2 and [side_of(sae, feature) for feature in of_sae] != ["key", "value"]:
        sides = features_by_side(sae)
        has = " and ".join(f"{PLURALS[side]} {x.start} to {x.stop - 1}" for side, x in sides.items())
        raise WriteSAEError(f"{of_sae} is no pair of a key code and a value code: the SAE has {has}")
    return Chosen(site, of_sae)


def amounts_of(
    model: HookedRecurrent,
    saes: Mapping[Site, SAE[Any]],
    chosen: Mapping[Chosen, float],
    tokens: Int[Tensor, "passage pos"] | str | None,
    unit: str,
) -> dict[Chosen, float]:
    """Each feature's coefficient: its size times its firing size (of a pair, times those of both codes).

    Raises:
        WriteSAEError: a feature is active nowhere in the text.
    """
    if unit == "absolute":
        return dict(chosen)
    sizes = firing_sizes(model, {site: saes[site] for site in {x.site for x in chosen}}, tokens)
    amounts = {}
    for one, size in chosen.items():
        own = [float(sizes[one.site][feature]) for feature in one.features]
        if missing := [f for f, x in zip(one.features, own, strict=True) if math.isnan(x)]:
            cell = one.site.cell
            raise WriteSAEError(
                f"feature {missing[0]} of layer {cell.layer} head {cell.head} is active nowhere in the text "
                "that sizes are measured on: give tokens where it is, or unit='absolute'"
            )
        amounts[one] = size * math.prod(own)
    return amounts


@torch.no_grad()
def additions(saes: Mapping[Site, SAE[Any]], amounts: Mapping[Chosen, float]) -> list[Addition]:
    """What some features add to the writes of their cells, at given coefficients; a cell each.

    Raises:
        WriteSAEError: the coefficients are so large that what is added is not finite in float32.
    """
    by_site: dict[Site, dict[tuple[int, ...], float]] = {}
    for one, amount in amounts.items():
        by_site.setdefault(one.site, {})[one.features] = amount
    added = [_of_cell(site.cell, saes[site], features) for site, features in by_site.items()]
    for one in added:
        parts = [part for part in (one.matrix, one.key, one.value) if part is not None]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise WriteSAEError(
                f"what the features of {one.cell.layer}:{one.cell.head} add is not finite in float32: give "
                "smaller sizes"
            )
    return added


def _of_cell(cell: Cell, sae: SAE[Any], features: Mapping[tuple[int, ...], float]) -> Addition:
    codes: Any = sae
    matrix = next(sae.parameters()).new_zeros(cell.d_k, cell.d_v, dtype=torch.float32)
    if not is_codes(sae):
        atoms = torch.tensor([feature for (feature,) in features], device=matrix.device)
        sizes = torch.tensor(list(features.values()), device=matrix.device)
        factors = atom_factors(sae, atoms, cell.d_k, cell.d_v)
        return Addition(cell, torch.einsum("n,nrk,nrv->kv", sizes, *factors))
    sums: dict[str, Tensor | None] = {"key": None, "value": None}
    for numbers, amount in features.items():
        sides = [_code(codes, feature) for feature in numbers]
        if len(sides) == 2:
            matrix = matrix + amount * torch.outer(sides[0][1], sides[1][1])
        else:
            ((side, code),) = sides
            before = sums[side]
            sums[side] = amount * code if before is None else before + amount * code
    return Addition(cell, matrix, sums["key"], sums["value"], (codes.sign_key, codes.sign_value))


def _code(codes: Any, feature: int) -> tuple[str, Float[Tensor, " d"]]:
    """The side of a code, and its direction."""
    n_key = codes.cfg.n_key
    if feature < n_key:
        return "key", codes.dec_key[feature].float()
    return "value", codes.dec_value[feature - n_key].float()
