"""What each active feature has in the writes of a prompt: the part that removing it takes away."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.features.activity import NUMBERS_AT_ONCE, Activity
from writesae_lens.experiments.firings import activity_of, atom_factors, is_codes
from writesae_lens.saes.rank1 import Factors


@dataclasses.dataclass(frozen=True)
class CellParts:
    """The features of one SAE in the writes of a prompt.

    The part of an atom is its coefficient times itself. Codes share a stand-in (sum_i a_i u_i)(sum_j b_j
    w_j)^T: the part of a key code is a_i u_i times all value codes of the position, that of a value code all
    its key codes times b_j w_j. So the parts of either side sum to the stand-in.

    Args:
        sae: the SAE.
        cell: its cell.
        active: what is active at which position.
    """

    sae: SAE[Any]
    cell: Cell
    active: Activity

    @classmethod
    def of(
        cls, sae: SAE[Any], cell: Cell, key: Float[Tensor, "pos d_k"], value: Float[Tensor, "pos d_v"]
    ) -> CellParts:
        """Encode the cell's writes key value^T."""
        return cls(sae, cell, activity_of(sae, key.contiguous(), value.contiguous()))

    @property
    def summed_side(self) -> range:
        """The features whose parts sum to the whole stand-in: all atoms, or of codes the value codes."""
        return list(self.active.sides.values())[-1]

    @functools.cached_property
    def _stand_ins(self) -> Factors:
        """Of codes: key and value of what takes the place of the write at every position."""
        sae: Any = self.sae
        features, sizes = self.active.by_position()
        step, sides = max(1, NUMBERS_AT_ONCE // sae.cfg.d_sae), []
        for of, size in zip(features.split(step), sizes.split(step), strict=True):
            acts = size.new_zeros(len(size), sae.cfg.d_sae).scatter_add_(1, of, size)
            sides.append([side[:, 0].float() for side in sae.stand_in_of(acts)])
        return Factors(*(torch.cat(side) for side in zip(*sides, strict=True)))

    @torch.no_grad()
    def parts(
        self,
        positions: Int[Tensor, " part"],
        features: Int[Tensor, " part"],
        coefficients: Float[Tensor, " part"],
    ) -> Factors:
        """The parts of features in the writes at some positions, each at a coefficient."""
        size = coefficients.float()[:, None]
        if not is_codes(self.sae):
            atoms = atom_factors(self.sae, features, self.cell.d_k, self.cell.d_v)
            return Factors(atoms.key * size[..., None], atoms.value)
        sae: Any = self.sae
        n_key = sae.cfg.n_key
        is_key = (features < n_key)[:, None]
        whole_key, whole_value = (side[positions] for side in self._stand_ins)
        of_key = sae.dec_key[features.clamp(max=n_key - 1)].float() * size
        of_value = sae.dec_value[(features - n_key).clamp(min=0)].float() * size
        key = torch.where(is_key, of_key, whole_key)
        value = torch.where(is_key, whole_value, of_value)
        return Factors(key[:, None], value[:, None])

    @torch.no_grad()
    def products(self, gradients: Float[Tensor, "row pos d_k d_v"]) -> Float[Tensor, "row entry"]:
        """<G_s, part> of everything that is active, for one gradient by the writes or several."""
        active = self.active
        sides = self.cell.d_k, self.cell.d_v
        rank = (
            1
            if is_codes(self.sae)
            else atom_factors(self.sae, active.feature[:1].long(), *sides).key.shape[1]
        )
        step = max(1, NUMBERS_AT_ONCE // (max(rank, self.cell.d_k) * sum(sides)))
        found = []
        for some in torch.arange(len(active.position), device=active.position.device).split(step):
            position = active.position[some].long()
            key, value = self.parts(position, active.feature[some].long(), active.coefficient[some])
            carried = value @ gradients[:, position].to(value).mT  # [row, some, rank, d_k]
            found.append((key * carried).sum((-1, -2)))
        return torch.cat(found, dim=1) if found else gradients.new_zeros(len(gradients), 0)
